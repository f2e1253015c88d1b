"""One trial, from its parameters to the value that the study is told."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colddiff.files import write_json
from colddiff.interruption import Interrupted, StopRequest
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder
from jobs import environment
from jobs.tasks import AlreadyRunningError, claim
from sweeps.desk import Assignment, fail
from sweeps.lease import HeldLease, LeaseLostError
from sweeps.objective import intermediate, measure
from sweeps.space import suggest

if TYPE_CHECKING:
    from optuna import Trial

    from colddiff.config import RunConfig
    from sweeps.study import StudyConfig

log = logging.getLogger("colddiff.sweeps")
FAILURES = (RuntimeError, ValueError, ArithmeticError, MemoryError)
"""What a trial's own parameters bring about: a loss that is not finite, a GPU's memory too small.

Anything else, such as a full disk or a storage that is down, is no fault of the trial: the worker
ends, and the trial goes on elsewhere or later.
"""
LONGEST_MESSAGE = 1000
Tracked = Callable[[RunFolder], AbstractContextManager[None]]
"""A context in which the record of a run is sent to MLflow."""


@dataclass
class Reporter:
    """Reports validations to the study, each step once, and asks whether to go on."""

    trial: Trial
    study: StudyConfig
    held: HeldLease

    def __post_init__(self) -> None:
        frozen = self.trial.study.get_trials(deepcopy=False)[self.trial.number]
        self._seen = set(frozen.intermediate_values)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training calls.

        Raises:
            LeaseLostError: where another worker has taken the trial over.
            optuna.TrialPruned: where the trial is not worth going on.
        """
        from optuna import TrialPruned

        self.held.check()
        if self.note(step, metrics) and self.trial.should_prune():
            raise TrialPruned(f"pruned at step {step}")

    def note(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Report a record, unless it was before; whether there is something to report in it."""
        value = intermediate(self.study.objective, metrics, self.study.metric)
        if value is None:
            return False
        if step not in self._seen:
            self.trial.report(value, step)
            self._seen.add(step)
        return True


def carry_out(
    assignment: Assignment, study: StudyConfig, stop: StopRequest, tracked: Tracked
) -> None:
    """Bring the trial to its end and tell the study, unless another worker has it by then.

    Raises:
        Interrupted: where ``stop`` asked for it. The training is saved, and the trial free for
            whoever may go on with it.
    """
    from optuna import TrialPruned
    from optuna.trial import TrialState

    trial, held = assignment.trial, assignment.held
    with held, _released_on_error(held):
        try:
            values = _values(trial, held, study, stop, tracked)
            held.confirm()
            trial.study.tell(trial.number, list(values), skip_if_finished=True)
            log.info("trial %d is complete: %s", trial.number, ", ".join(map(str, values)))
        except TrialPruned as pruned:
            held.confirm()
            trial.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
            log.info("trial %d was %s", trial.number, pruned)
        except FAILURES as error:
            held.confirm()
            log.warning("trial %d", trial.number, exc_info=True)
            fail(trial, f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE])


@contextlib.contextmanager
def _released_on_error(held: HeldLease) -> Iterator[None]:
    """Give the trial back where it is left unfinished."""
    try:
        yield
    except Interrupted as interruption:
        held.release(f"interrupted by {signal.Signals(interruption.signum).name}")
        raise
    except LeaseLostError as error:
        log.warning("%s", error)  # who holds it goes on with it
    except BaseException as error:
        held.release(f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE])
        raise


def _values(
    trial: Trial, held: HeldLease, study: StudyConfig, stop: StopRequest, tracked: Tracked
) -> tuple[float, ...]:
    config = suggest(study.space, trial, study.base)
    folder = _run_of(study, config)
    trial.set_user_attr("run", folder.path.name)
    trial.set_user_attr("worker", held.lease.holder.worker)
    log.info("trial %d is %s", trial.number, folder.path.name)
    with tracked(folder):
        _train(folder, Reporter(trial, study, held), stop)
        return measure(folder, study, stop, config)


def _run_of(study: StudyConfig, config: RunConfig) -> RunFolder:
    """The trial's run, which may be another trial's too."""
    # Trials of the space levels differ in what is made of a run that is not theirs alone.
    own = study.base if study.space == "levels" else config
    return RunFolder.create(Path(study.runs), own)


def _train(folder: RunFolder, reporter: Reporter, stop: StopRequest) -> None:
    """Train the run to its end, from wherever it stands."""
    from optuna import TrialPruned

    from colddiff.training import train

    trial, lease = reporter.trial, reporter.held.lease
    with _claimed(folder, reporter.held, stop):
        if folder.is_trained and lease.turn == 1 and reporter.study.space != "levels":
            trial.set_user_attr("repeated", True)
        # Of what was trained under another trial, or before a kill came between the two records.
        for record in read_records(folder.journal)[0] if folder.journal.exists() else ():
            reporter.note(record.step, record.metrics)
        if folder.is_trained:
            return
        introduction = environment.process() | {"kind": "train", "trial": trial.number}
        write_json(folder.path / "process.json", introduction)
        try:
            train(folder, stop=stop, report=reporter)
        except TrialPruned as pruned:
            status = folder.status()
            assert status is not None, "training has begun"
            folder.write_status("interrupted", status.step, status.steps, str(pruned))
            raise


@contextlib.contextmanager
def _claimed(folder: RunFolder, held: HeldLease, stop: StopRequest) -> Iterator[None]:
    """The run's lock; waits for another trial of the same configuration to come to its end."""
    waiting = False
    while True:
        try:
            lock = claim(folder, timeout_s=0.2)
            break
        except AlreadyRunningError as error:
            if not waiting:
                log.info("waiting: %s", error)
            waiting = True
        held.check()
        if stop.signum is not None:
            raise Interrupted(0, stop.signum)
    with lock:
        yield
