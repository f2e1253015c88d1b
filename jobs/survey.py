"""The jobs of runs as their schedulers see them, and which of them tells where a run stands."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colddiff.files import read_json
from colddiff.run_folder import RunFolder
from jobs import slurm
from jobs.ledger import Entry, Ledger
from jobs.states import Job, find_jobs
from jobs.tasks import GenerateTask, from_dict

SOON_S = 10.0
CHAIN = ("train", "evaluate", "generate", "report")


@dataclass(frozen=True)
class Survey:
    """The jobs that tell where runs stand, oldest first; see :func:`jobs.states.find_jobs`."""

    jobs: tuple[Job, ...]
    trouble: str = ""
    """Why Slurm cannot be asked; its jobs' phases are ``unknown`` then."""
    started: frozenset[str] = frozenset()
    """Requeued jobs that need not wait any more."""

    def of(self, run: str) -> list[Job]:
        """The jobs of one run."""
        return [job for job in self.jobs if job.entry.run == run]

    def main_job(self, folder: RunFolder) -> Job | None:
        """The job that tells where the run stands.

        That is the one that runs, else the one that is queued, else the first of a chain that did
        not do its work, else the last. None where the run was taken up without a job since.
        """
        jobs = self.of(folder.path.name)
        for phase in ("running", "queued"):
            for job in reversed(jobs):
                if job.phase == phase:
                    return job
        if not jobs or _went_on_without(folder, jobs[-1]):
            return None
        undone = [job for job in jobs if not is_done(folder, job)]
        return min(undone, key=place_in_chain, default=jobs[-1])

    def is_blind(self, job: Job) -> bool:
        """Whether the job's scheduler could not be asked."""
        return bool(self.trouble) and job.entry.cluster == "slurm"


def survey(
    runs: Path, names: Collection[str] | None = None, *, ended: bool = True, nudge: bool = False
) -> Survey:
    """Ask all schedulers; where Slurm does not answer, ``trouble`` says why.

    Args:
        runs: the folder of the run folders, with the ledger.
        names: of the runs to ask about; all by default.
        ended: also ask what became of jobs that ended.
        nudge: start requeued jobs now, for which Slurm has a wait of two minutes.
    """

    def wanted(entry: Entry) -> bool:
        return names is None or entry.run in names

    try:
        jobs = find_jobs(runs, wanted=wanted, ended=ended)
        return Survey(tuple(jobs), started=frozenset(_start_now(jobs) if nudge else ()))
    except slurm.SlurmError as error:
        local = find_jobs(runs, wanted=lambda entry: wanted(entry) and entry.cluster == "local")
        entries = [entry for entry in Ledger(runs).latest().values() if wanted(entry)]
        asked = [Job(entry, "unknown") for entry in entries if entry.cluster == "slurm"]
        jobs = sorted([*local, *asked], key=lambda job: job.entry.time_ms)
        return Survey(tuple(jobs), trouble=str(error))


def place_in_chain(job: Job) -> int:
    """For sorting: each kind needs what those before it make."""
    return (*CHAIN, job.entry.kind).index(job.entry.kind)


def is_done(folder: RunFolder, job: Job) -> bool:
    """Whether what the job was to make is there, going by the run folder where that tells."""
    task = job.entry.task
    match job.entry.kind:
        case "train":
            if not folder.is_trained:
                return False
            settings = dataclasses.asdict(folder.config.evaluation)
            return not task.get("evaluate", True) or _is_measured(folder, settings)
        case "evaluate":
            return _is_measured(folder, task["evaluation"])
        case "generate":
            made = from_dict(task)
            assert isinstance(made, GenerateTask), "the ledger's kind is the task's"
            return folder.is_generated(made.settings)
        case "report" if _is_newer(Path(task["out"]) / f"{_last_report(task)}.md", job.entry):
            return True  # which is made last; also where Slurm keeps no accounts
    return job.slurm is not None and job.slurm.state == "COMPLETED"


def _last_report(task: Mapping[str, Any]) -> str:
    return str((task.get("reports") or ["figure3"])[-1])


def last_process(folder: RunFolder) -> dict[str, Any]:
    """Which process works on the run, or did so last."""
    try:
        found: dict[str, Any] = read_json(folder.path / "process.json")
    except FileNotFoundError:
        return {}
    return found


def _went_on_without(folder: RunFolder, job: Job) -> bool:
    """Whether a process that no scheduler started worked on the run after this submission."""
    last = last_process(folder)
    if not last or "job_id" in last:
        return False
    return (folder.path / "process.json").stat().st_mtime_ns // 10**6 > job.entry.time_ms


def _is_newer(file: Path, entry: Entry) -> bool:
    """Whether the file was written since the job was submitted."""
    return file.exists() and file.stat().st_mtime_ns // 10**6 >= entry.time_ms


def _is_measured(folder: RunFolder, settings: dict[str, Any]) -> bool:
    """``jobs.planning.is_measured`` without its imports."""
    try:
        done = read_json(folder.evaluation)
    except FileNotFoundError:
        return False
    same: bool = done["settings"] == json.loads(json.dumps(settings))
    complete = same and done["step"] == folder.config.training.steps
    return complete and all(map(folder.is_generated, folder.config.generation))


def _start_now(jobs: Sequence[Job]) -> list[str]:
    """End the wait of requeued jobs; the suite itself submits none that wait for a time."""
    waiting = [
        job.entry.job_id
        for job in jobs
        if job.phase == "queued"
        and job.slurm is not None
        and job.slurm.reason == "BeginTime"
        and not _starts_soon(job.slurm.start)
        and "begin" not in job.entry.profile.get("sbatch", {})
    ]
    return slurm.start_now(waiting)


def _starts_soon(start: str) -> bool:
    """Whether a time of Slurm's is near: told again and again, a job would never start."""
    try:
        return time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S")) - time.time() < SOON_S
    except ValueError:  # N/A
        return False
