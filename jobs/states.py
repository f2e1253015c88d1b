"""Where the jobs of runs are: the ledger's entries beside what Slurm and the local queue say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs import slurm
from jobs.ledger import Entry, Ledger, Work

Phase = Literal["queued", "running", "ended", "unknown"]


@dataclass(frozen=True)
class Job:
    """A submitted job and where it is now."""

    entry: Entry
    phase: Phase
    """``unknown``: its scheduler does not know it, or cannot be asked."""
    slurm: slurm.JobState | None = None

    @property
    def is_living(self) -> bool:
        """Whether it is queued or running."""
        return self.phase in ("queued", "running")

    def __str__(self) -> str:
        state = self.slurm
        if self.phase == "queued" and state and state.reason:
            return f"queued as {self.entry.job_id} ({state.reason})"
        if self.phase == "running" and state and state.nodes:
            return f"running as {self.entry.job_id} on {state.nodes}"
        return f"{self.phase} as {self.entry.job_id}"


def find_jobs(
    runs: Path, *, wanted: Callable[[Entry], bool] = lambda entry: True, ended: bool = True
) -> list[Job]:
    """The jobs that tell where runs stand, oldest first.

    That is the last one of each run and kind, and whatever else lives: a run may be generated from
    with several settings.

    Args:
        runs: the folder of the run folders, with the ledger.
        wanted: which entries to look at.
        ended: also ask Slurm's accounting what became of those that have ended.
    """
    entries = [entry for entry in Ledger(runs).latest_of_each_work() if wanted(entry)]
    states = _slurm_states(entries, ended)
    phases = _local_phases(runs, entries)
    jobs = [_job(entry, states, phases) for entry in entries]
    last = {(job.entry.run, job.entry.kind): job for job in jobs}
    return [job for job in jobs if job.is_living or job in last.values()]


def living_jobs(runs: Path, names: Iterable[str]) -> dict[Work, Job]:
    """The queued and running jobs of the named runs, by what they do.

    Raises:
        slurm.SlurmError: where there are Slurm jobs and Slurm cannot be asked: submitting then
            might run one twice.
    """
    known = set(names)
    jobs = find_jobs(runs, wanted=lambda entry: entry.run in known, ended=False)
    return {job.entry.work: job for job in jobs if job.is_living}


def _slurm_states(entries: list[Entry], ended: bool) -> dict[str, slurm.JobState]:
    asked = [entry.job_id for entry in entries if entry.cluster == "slurm"]
    return slurm.job_states(asked, ended=ended) if asked else {}


def _local_phases(runs: Path, entries: list[Entry]) -> dict[str, Phase]:
    asked = [entry.job_id for entry in entries if entry.cluster == "local"]
    if not asked:
        return {}
    from jobs.local.queue import local_phases

    return dict(local_phases(runs, asked))


def _job(entry: Entry, states: dict[str, slurm.JobState], phases: dict[str, Phase]) -> Job:
    if entry.cluster == "local":
        return Job(entry, phases.get(entry.job_id, "unknown"))
    state = states.get(entry.job_id)
    if state is None:
        return Job(entry, "unknown")
    if not state.is_living or state.reason == "DependencyNeverSatisfied":  # taken out soon
        return Job(entry, "ended", state)
    running = state.state in ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT")
    return Job(entry, "running" if running else "queued", state)
