"""Submit again what failed or was lost: the same tasks on the same resources, or on more."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from colddiff.run_folder import RunFolder
from jobs.cluster import Submitted
from jobs.diagnosis import Diagnosis, diagnose
from jobs.options import Launch, Place
from jobs.planning import Planned, aligned, plan
from jobs.profiles import Profile
from jobs.slurm import SlurmError
from jobs.states import Job
from jobs.survey import CHAIN, Survey, is_done, place_in_chain, survey
from jobs.tasks import AnyTask, Task, from_dict

Jobs = dict[tuple[str, str], str]
"""Job ids by run and kind."""


@dataclass(frozen=True)
class Candidate:
    """A job that may be submitted again."""

    job: Job
    task: AnyTask
    happened: str
    refusal: str = ""
    """Why it is not submitted again; empty if it is."""
    advice: str = ""
    """Where the same again would fail again."""

    @property
    def key(self) -> tuple[str, str]:
        """Run and kind."""
        return self.job.entry.run, self.job.entry.kind


@dataclass(frozen=True)
class Group:
    """Jobs that are submitted together: an array."""

    cluster: str
    kind: str
    profile: str
    """JSON."""
    dependency: str


@dataclass
class Retrial:
    """One call of ``retry``."""

    place: Place
    named: Collection[str] | None
    """Runs that the user named; None for all that failed."""
    overrides: Sequence[str]
    """As for ``--sbatch``."""
    submitted: dict[tuple[str, str], Submitted] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        """What there is to say something about, in the order of submission.

        Raises:
            SlurmError: where Slurm cannot be asked what became of its jobs.
        """
        now = survey(self.place.runs, self.named)
        if now.trouble:
            raise SlurmError(now.trouble)
        # A sweep's workers are in the ledger too; sweeps/launch.py resume looks after those.
        jobs = sorted((job for job in now.jobs if job.entry.kind in CHAIN), key=place_in_chain)
        found = [self._candidate(job, now) for job in jobs]
        return [each for each in found if each is not None]

    def _candidate(self, job: Job, now: Survey) -> Candidate | None:
        """None where there is nothing to say, because nobody asked for this run."""
        entry, folder = job.entry, RunFolder(self.place.runs / job.entry.run)
        task = from_dict(entry.task)
        asked = self.named is not None
        if isinstance(task, Task) and not folder.config_file.exists():
            return Candidate(job, task, "its folder is gone", "no") if asked else None
        if job.is_living:
            return Candidate(job, task, str(job), "no") if asked else None
        completed = job.slurm is not None and job.slurm.state == "COMPLETED"
        if is_done(folder, job) or (completed and entry.kind != "train"):
            return Candidate(job, task, "complete", "no") if asked else None
        return self._undone(job, task, diagnose(job, folder), now)

    def _undone(
        self, job: Job, task: AnyTask, found: Diagnosis | None, now: Survey
    ) -> Candidate | None:
        happened = "ended before its work was done"
        if found:
            happened = found.text if found.cause in ("unknown", "exception") else str(found.cause)
        if found and found.cause == "cancelled" and self.named is None:
            return Candidate(job, task, happened, "no: name it to take it up again")
        planned = plan([task], {})[0]
        if not planned.wanted:
            return Candidate(job, task, planned.found, "no") if self.named is not None else None
        if self._waits_in_vain(job, now):
            return Candidate(job, task, happened, "no: the run is not trained")
        advice = ""
        if found and found.is_hopeless and not self.overrides:
            advice = f"likely to fail again: {found.advice}"
        return Candidate(job, task, happened, advice=advice)

    def _waits_in_vain(self, job: Job, now: Survey) -> bool:
        """Whether it needs a training that nobody takes up: one that was cancelled."""
        folder, kind = RunFolder(self.place.runs / job.entry.run), job.entry.kind
        if kind not in ("evaluate", "generate") or folder.is_trained:
            return False
        training = [each for each in now.of(job.entry.run) if each.entry.kind == "train"]
        cancelled = [
            each
            for each in training
            if (found := diagnose(each, folder)) and found.cause == "cancelled"
        ]
        return not training or (self.named is None and bool(cancelled))

    def check(self, found: Sequence[Candidate]) -> None:
        """Raise ``ValueError`` for overrides that are none, or have nothing to change."""
        clusters = [each.job.entry.cluster for each in found if not each.refusal]
        if self.overrides and clusters and "slurm" not in clusters:
            raise ValueError("--mem, --time and --sbatch are for Slurm; this ran on this machine")
        for each in found:
            if each.job.entry.cluster == "slurm":
                self.profile(each)

    def submit(self, found: Sequence[Candidate]) -> None:
        """Submit what is not refused: one array for each kind of job and distinct profile."""
        wanted = [each for each in found if not each.refusal]
        living = {
            (job.entry.run, job.entry.kind): job.entry.job_id
            for job in survey(self.place.runs, ended=False).jobs
            if job.is_living and job.entry.cluster == "slurm" and job.entry.kind in CHAIN
        }
        for kind in CHAIN:
            groups: dict[Group, list[Candidate]] = {}
            for each in wanted:
                if each.job.entry.kind == kind:
                    groups.setdefault(self._group(each, living), []).append(each)
            for group, members in groups.items():
                self._submit(group, members)

    def _group(self, each: Candidate, living: Jobs) -> Group:
        entry, dependency = each.job.entry, ""
        profile = json.dumps(entry.profile, sort_keys=True)
        if entry.cluster == "slurm":
            profile = json.dumps(self.profile(each).to_dict(), sort_keys=True)
            new = {key: job.job_id for key, job in self.submitted.items()}
            dependency = _dependency(each, new, living)
        return Group(entry.cluster, entry.kind, profile, dependency)

    def profile(self, each: Candidate) -> Profile:
        """The resources it had, with the overrides; raises ``ValueError`` for bad ones."""
        return Profile.from_dict(each.job.entry.profile).overridden(self.overrides)

    def _submit(self, group: Group, members: Sequence[Candidate]) -> None:
        values = json.loads(group.profile)
        launch = Launch(
            runs=self.place.runs,
            experiment=self.place.experiment,
            tracking_uri=self.place.tracking_uri,
            cluster="slurm" if group.cluster == "slurm" else "local",
        )
        profile = None
        if group.cluster == "slurm":
            profile = Profile.from_dict(values)
        else:
            launch = dataclasses.replace(
                launch, at_once=values.get("at_once", 0), ranks=values.get("ranks", 1)
            )
        planned = [Planned(each.task, each.happened, wanted=True) for each in members]
        self.submitted |= launch.submit(planned, profile, group.dependency)

    def table(self, found: Sequence[Candidate], *, dry_run: bool) -> str:
        """What happened, and what was done."""
        rows = [("run", "work", "what happened", "submitted again")]
        for each in found:
            job = self.submitted.get(each.key)
            done = f"as {job.job_id}" if job else "not yet"
            done = each.refusal or ("would be" if dry_run else done)
            rows.append((*each.key, each.happened, "; ".join(filter(None, (done, each.advice)))))
        return aligned(rows)


def _dependency(each: Candidate, new: Jobs, living: Jobs) -> str:
    """What a job of a chain waits for: its run's training; a report for all evaluations."""
    run, kind = each.key
    if kind == "train":
        return ""
    if kind != "report":
        training = (new | living).get((run, "train"))
        return f"afterok:{training}" if training else ""
    waits = []
    own = each.job.entry.task.get("runs") or None
    for word, ids in (("afterok", new), ("afterany", living)):
        needed = {
            job_id.partition("_")[0] if own is None else job_id: None
            for (name, k), job_id in ids.items()
            if k != "report" and (own is None or name in own)
        }
        waits += [":".join([word, *needed])] if needed else []
    return ",".join(waits)
