"""One trial, from its parameters to the value that the study is told."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
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
from colddiff.uris import mask_secrets
from jobs import environment
from jobs.tasks import AlreadyRunningError, claim
from sweeps.desk import Assignment, fail
from sweeps.lease import HeldLease, LeaseLostError
from sweeps.objective import intermediate, measure
from sweeps.patience import Patience
from sweeps.space import suggest
from sweeps.storage import failures

if TYPE_CHECKING:
    from optuna import Trial

    from colddiff.config import RunConfig
    from sweeps.study import StudyConfig

log = logging.getLogger("colddiff.sweeps")
LONGEST_MESSAGE = 1000
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory")
"""How torch says so, of GPUs and of CPUs."""


class UnfitError(Exception):
    """A trial's parameters make no configuration."""


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
        self._failing = False

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """What training calls, which goes on where the storage does not answer.

        The reference is never pruned: there would be nothing to compare the others with.

        Raises:
            LeaseLostError: where another worker has taken the trial over.
            optuna.TrialPruned: where the trial is not worth going on.
        """
        from optuna import TrialPruned

        self.held.check()
        try:
            noted = self.note(step, metrics)
            hopeless = noted and self.trial.number > 0 and self.trial.should_prune()
        except failures() as error:
            if not self._failing:
                log.warning("the storage does not answer: %s", mask_secrets(str(error)))
            self._failing = True
            return
        self._failing = False
        if hopeless:
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

    trial, held, ask = assignment.trial, assignment.held, Patience(stop)
    tell = functools.partial(trial.study.tell, trial.number, skip_if_finished=True)
    with held, _released_on_error(held):
        try:
            values = _values(trial, held, study, stop, tracked)
            held.confirm()
            ask(lambda: tell(list(values)))
            log.info("trial %d is complete: %s", trial.number, ", ".join(map(str, values)))
        except TrialPruned as pruned:
            held.confirm()
            ask(lambda: tell(state=TrialState.PRUNED))
            log.info("trial %d was %s", trial.number, pruned)
        except Exception as error:
            if not is_its_own(error):
                raise
            held.confirm()
            log.warning("trial %d", trial.number, exc_info=True)
            message = f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE]
            ask(lambda: fail(trial, message))


def is_its_own(error: Exception) -> bool:
    """Whether a trial's own parameters brought the error about, and would again.

    Such are parameters that fit no configuration, a loss that is not finite, and too little memory.
    Anything else may be the machine's: a broken GPU, a full disk, data that are not there. Then the
    worker ends, and the trial goes on elsewhere; :class:`sweeps.desk.Desk` gives it up where that
    happens again and again.
    """
    from colddiff.trainer import NonFiniteError

    own = (UnfitError, NonFiniteError, MemoryError)
    full = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, own) or full


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
        others = isinstance(error, (OSError, *failures()))
        why = f"{'storage: ' if others else ''}{type(error).__name__}: {error}"
        held.release(why[:LONGEST_MESSAGE])
        raise


def _values(
    trial: Trial, held: HeldLease, study: StudyConfig, stop: StopRequest, tracked: Tracked
) -> tuple[float, ...]:
    from colddiff.data import load_images

    def begin() -> tuple[RunConfig, RunFolder, Reporter]:
        try:
            config = suggest(study.space, trial, study.base, study.keep)
        except ValueError as error:
            load_images(study.base.data, "train")  # which says so where that was the reason
            raise UnfitError(str(error)) from error
        folder = _run_of(study, config)
        trial.set_user_attr("run", folder.path.name)
        trial.set_user_attr("worker", held.lease.holder.worker)
        return config, folder, Reporter(trial, study, held)

    config, folder, reporter = Patience(stop)(begin)
    log.info("trial %d is %s", trial.number, folder.path.name)
    with tracked(folder):
        _train(folder, reporter, stop)
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

    trial, lease, ask = reporter.trial, reporter.held.lease, Patience(stop)
    with _claimed(folder, reporter.held, stop):
        if folder.is_trained and lease.turn == 1 and reporter.study.space != "levels":
            ask(lambda: trial.set_user_attr("repeated", True))
        # Of what was trained under another trial, or before a kill came between the two records.
        for record in read_records(folder.journal)[0] if folder.journal.exists() else ():
            ask(functools.partial(reporter.note, record.step, record.metrics))
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
