"""What a worker's bookkeeping costs: empty trials a second, with and without it.

Bare Optuna asks and tells. colddiff also asks under the study's lock, so that exactly as many
trials are made as were wanted, and holds a lease on each, so that another worker can go on with it.
Both in turn, with equal numbers of processes, on new studies.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import optuna
import tyro
from processes import seconds_together

from colddiff.machine import git_dirty, git_sha, processor
from colddiff.uris import mask_secrets
from sweeps.desk import Desk
from sweeps.lease import Holder
from sweeps.storage import journal_path, postgres_url, storage_of

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

Way = Literal["optuna", "colddiff"]
PROCESSES = (1, 4)
WAIT_S = 0.01


@dataclass(frozen=True)
class Work:
    """One measurement, in one process."""

    way: Way
    url: str
    """Of the storage."""
    name: str
    """Of the study."""
    folder: str
    """Of locks and leases."""
    trials: int
    """In all processes together."""
    processes: int

    def storage(self) -> BaseStorage:
        """The storage as the way opens it; both read with the same driver."""
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        if self.way == "colddiff":
            return storage_of(self.url)
        if self.url.startswith("postgresql"):
            return RDBStorage(postgres_url(self.url))
        path = str(journal_path(self.url))
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))

    def __call__(self, number: int, barrier: Barrier) -> None:
        """Do this process's part, between two meetings of all processes."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.RandomSampler(seed=number)
        study = optuna.load_study(
            study_name=self.name,
            storage=self.storage(),
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
        )
        barrier.wait()
        if self.way == "optuna":
            for _ in range(self.trials // self.processes):
                trial = study.ask()
                trial.suggest_float("x", 0, 1)
                study.tell(trial.number, 0.0)
        else:
            self._work_by_desk(study, number)
        barrier.wait()

    def _work_by_desk(self, study: optuna.Study, number: int) -> None:
        """As sweeps/worker.py does, without a run."""
        desk = Desk(
            folder=Path(self.folder),
            study=study,
            me=Holder.here(f"worker-{number}"),
            target=lambda: self.trials,
            suggest=lambda trial: trial.suggest_float("x", 0, 1),
        )
        while not desk.is_complete():
            assignment = desk.next()
            if assignment is None:
                time.sleep(WAIT_S)
                continue
            with assignment.held as held:
                held.confirm()
                study.tell(assignment.trial.number, 0.0, skip_if_finished=True)


def trials_per_second(way: Way, url: str, trials: int, processes: int) -> float:
    """Of one new study; checks that exactly as many trials are complete as were wanted."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"overhead-{uuid.uuid4().hex}"
        work = Work(way, url or str(Path(folder) / "journal.log"), name, folder, trials, processes)
        storage = work.storage()
        study = optuna.create_study(study_name=name, storage=storage)
        try:
            seconds = seconds_together(work, [(number,) for number in range(processes)])
            done = [trial.state.name for trial in study.get_trials(deepcopy=False)]
            if done != ["COMPLETE"] * trials:
                raise RuntimeError(f"{way}: {len(done)} trials, of {trials} wanted")
        finally:
            optuna.delete_study(study_name=name, storage=storage)
    return trials / seconds


def main(trials: int = 200, repeats: int = 3, postgres: str = "") -> None:
    """Print the table.

    Args:
        trials: of a study; a multiple of 4.
        repeats: studies a cell; medians are shown.
        postgres: postgresql://host/database, to measure that too; COLDDIFF_POSTGRES by default.
    """
    if trials % max(PROCESSES):
        sys.exit(f"error: --trials {trials} must be a multiple of {max(PROCESSES)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = postgres or os.environ.get("COLDDIFF_POSTGRES", "")
    dirty = " with uncommitted changes" if git_dirty() else ""
    load = os.getloadavg()[0]
    print(f"{processor()}, {os.cpu_count()} cores, load {load:.1f} before")
    print(f"commit {git_sha()[:12]}{dirty}, Optuna {optuna.__version__}")
    print(f"empty trials a second: medians of {repeats} studies of {trials} trials")
    if url:
        print(f"Postgres: {mask_secrets(url)}")
    print("\n| storage | processes | Optuna alone | colddiff | ratio | colddiff, ms a trial more |")
    print("|---|---|---|---|---|---|")
    for kind, storage in {"journal file": "", "Postgres": url}.items():
        if kind == "Postgres" and not url:
            continue
        for processes in PROCESSES:
            rates: dict[Way, list[float]] = {"optuna": [], "colddiff": []}
            for _ in range(repeats):
                for way, measured in rates.items():
                    measured.append(trials_per_second(way, storage, trials, processes))
            bare, ours = (statistics.median(rates[way]) for way in ("optuna", "colddiff"))
            more = 1000 * processes * (1 / ours - 1 / bare)
            rate = f"{bare:.0f} | {ours:.0f} | {ours / bare:.2f}"
            print(f"| {kind} | {processes} | {rate} | {more:.1f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
