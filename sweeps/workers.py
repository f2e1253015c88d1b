"""The workers of a study as jobs: which of them live, and how missing ones are submitted."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colddiff.uris import mask_secrets
from jobs.cluster import run_here
from jobs.ledger import Entry, Ledger
from jobs.options import Launch, say
from jobs.planning import Planned, table
from jobs.profiles import Profile
from jobs.states import Job, find_jobs
from sweeps.orphans import ORPHAN_AFTER_S
from sweeps.storage import failures
from sweeps.study import StudyConfig, create_study
from sweeps.worker import WorkerTask, worker_name

if TYPE_CHECKING:
    from optuna import Study


class StorageError(Exception):
    """A study's storage cannot be reached, or refuses; the message holds no secrets."""


@dataclass(frozen=True)
class Team:
    """The workers that a study is to have."""

    config: StudyConfig
    launch: Launch
    """Where and how they run."""
    workers: int
    profile: Profile | None = None
    """The resources of each, on Slurm."""
    orphan_after_s: float = ORPHAN_AFTER_S

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot work, before anything is made."""
        self.launch.check_options()
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} is not allowed: it must be at least 1")
        if self.orphan_after_s < 0:
            raise ValueError("--orphan-after must be at least 0 minutes")
        processes = self.launch.ranks
        if self.profile is not None:
            processes = self.profile.nodes * self.profile.processes_per_node
            self.launch.refuse_shared_sqlite(self.workers, self.profile)
        if processes != 1:
            raise ValueError(
                f"a worker of {processes} processes is not allowed: each trains on one GPU, so "
                "give it one (--ranks 1; on Slurm --sbatch nodes=1 --sbatch gpus=1), and take more "
                "--workers"
            )

    def send(self) -> int:
        """Create the study or find it, and submit the workers that it lacks; the exit code."""
        if self.launch.dry_run:
            return self._preview()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with storage_errors():
            study = create_study(self.config)
        self._introduce()
        if self.launch.cluster == "debug":
            return self._work_here(study)
        with Ledger(self.launch.runs).launching():
            living = living_workers(self.launch.runs, self.config.name)
            with storage_errors():
                planned = self._planned(study, living)
            launch = self.launch
            if launch.cluster == "local" and not launch.at_once:
                # One on each GPU; without any all of them, beside those that have their places.
                launch = dataclasses.replace(launch, at_once=len(living) + len(planned))
            submitted = launch.submit(planned, self.profile)
        if planned:
            say(table(planned, submitted))
        self._say_what_is_there(study, living, len(planned))
        return 0

    def _planned(self, study: Study, living: list[Job]) -> list[Planned]:
        """The workers that are missing: no more than there are trials to do."""
        from sweeps.desk import Counts

        counts = Counts.of(study.get_trials(deepcopy=False))
        wanted = min(self.workers, self.config.trials - counts.finished)
        missing = max(0, wanted - sum(is_at_work(job) for job in living))
        taken = {number_of(job.entry) for job in living}
        free = [number for number in range(missing + len(taken)) if number not in taken]
        tasks = [self._task(number, counts.failed) for number in free[:missing]]
        return [Planned(task, "new", wanted=True) for task in tasks]

    def _task(self, number: int, failed: int) -> WorkerTask:
        return WorkerTask(
            folder=str(self.config.folder.absolute()),
            tracking_uri=self.launch.jobs_uri,
            experiment=self.launch.experiment,
            number=number,
            failed_before=failed,
            orphan_after_s=self.orphan_after_s,
        )

    def _introduce(self) -> None:
        """To MLflow: the store's tables and the study's run, before workers race to make them."""
        if self.launch.offline:
            return
        from sweeps.record import parent_run

        with self.launch.tolerated():
            self.launch.initialise()
            parent_run(self.config, self.launch.uri, self.launch.experiment)

    def _work_here(self, study: Study) -> int:
        for planned in self._planned(study, [])[:1]:
            run_here([planned.task])
        self._say_what_is_there(study, [], 0)
        return 0

    def _preview(self) -> int:
        living = living_workers(self.launch.runs, self.config.name)
        there = sum(is_at_work(job) for job in living)
        count = max(0, min(self.workers, self.config.trials) - there)
        planned = [Planned(self._task(n, 0), "new", wanted=True) for n in range(count)]
        say(f"the study would be kept in {mask_secrets(self.config.storage_url)}")
        return self.launch.preview(planned, self.profile)

    def _say_what_is_there(self, study: Study, living: list[Job], new: int) -> None:
        from sweeps.desk import Counts

        counts = Counts.of(study.get_trials(deepcopy=False))
        name, wanted = self.config.name, self.config.trials
        there = sum(is_at_work(job) for job in living)
        say(f"{name}: {counts.finished} of {wanted} trials finished; workers: {there} + {new} new")
        if new:
            say(f"status: python sweeps/launch.py status --runs {self.launch.runs} --study {name}")
            self.launch.say_where()


def living_workers(runs: Path, study: str) -> list[Job]:
    """The queued and running workers of a study.

    Raises:
        slurm.SlurmError: where there are Slurm jobs and Slurm cannot be asked.
    """
    jobs = find_jobs(runs, wanted=lambda entry: is_worker(entry, study), ended=False)
    return [job for job in jobs if job.is_living]


def is_at_work(job: Job) -> bool:
    """Whether a living worker is to go on; a cancelled one saves and ends."""
    return job.entry.event != "cancelled"


def is_worker(entry: Entry, study: str) -> bool:
    """Whether a job is one of the study's workers."""
    return entry.kind == WorkerTask.kind and entry.run == worker_name(study, number_of(entry))


def number_of(entry: Entry) -> int:
    """Of a worker; -1 for what is none."""
    found = re.search(r"-worker-(\d+)$", entry.run)
    return int(found[1]) if found else -1


def last_launch(runs: Path, study: str) -> Entry | None:
    """The job that was submitted last for a study; None for one without."""
    entries = [entry for entry in Ledger(runs).entries() if is_worker(entry, study)]
    return entries[-1] if entries else None


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what a database or a proxy raises into :class:`StorageError`."""
    try:
        yield
    except failures() as error:
        raise StorageError(mask_secrets(f"{type(error).__name__}: {error}")) from None
