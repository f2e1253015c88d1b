"""Where workers get their trials: each trial to one of them, and never more than were asked for."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from sweeps.lease import HeldLease, Holder, Lease, Leases
from sweeps.orphans import ORPHAN_AFTER_S, free_to_take

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

log = logging.getLogger("colddiff.sweeps")
DEATHS = 3
"""A trial whose holders ended so often at one step is given up: it would end one worker after the
other."""
NO_FAULT = ("interrupted", "storage")
"""How a lease begins to say why it was given back, where that is no sign of a bad trial."""


class TooManyFailuresError(RuntimeError):
    """Trials fail for a reason that new ones will not escape."""


@dataclass(frozen=True)
class Counts:
    """How many trials are in which state."""

    finished: int
    """Complete or pruned."""
    running: int
    waiting: int
    """Enqueued, not asked for yet."""
    failed: int

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> Counts:
        """Those of a study."""
        states = Counter(trial.state.name for trial in trials)
        return cls(
            finished=states["COMPLETE"] + states["PRUNED"],
            running=states["RUNNING"],
            waiting=states["WAITING"],
            failed=states["FAIL"],
        )


@dataclass(frozen=True)
class Assignment:
    """A trial that this worker holds."""

    trial: Trial
    held: HeldLease


@dataclass(frozen=True)
class Desk:
    """One worker's way to the trials of a study."""

    folder: Path
    """The study's, on a disk that all workers share."""
    study: Study
    me: Holder
    target: Callable[[], int]
    """How many finished trials are wanted; it may be raised while workers run."""
    suggest: Callable[[Trial], object]
    """Asks a new trial for its parameters; raises ``ValueError`` where that cannot be done."""
    step_of: Callable[[FrozenTrial], int] = lambda trial: 0
    """Where the training of a trial stands on disk."""
    orphan_after_s: float = ORPHAN_AFTER_S
    failed_before: int = 0
    """Failures of which the user knows, having resumed the study since."""

    @property
    def leases(self) -> Leases:
        """Of the study's trials."""
        return Leases(self.folder / "leases")

    def counts(self) -> Counts:
        """Of the study as it is now."""
        return Counts.of(self.study.get_trials(deepcopy=False))

    def is_complete(self) -> bool:
        """Whether as many trials are finished as were asked for."""
        return self.counts().finished >= self.target()

    def next(self) -> Assignment | None:
        """A trial to work on; None where there is none for now.

        First come trials that somebody left, then those that nobody held yet, then a new one, as
        long as fewer are finished or running than are wanted.

        Raises:
            TooManyFailuresError: naming the failed trials.
        """
        return self._orphan() or self._new()

    def _orphan(self) -> Assignment | None:
        running = self._running()
        found = self.leases.current(running).values()
        ages_s = self.leases.ages_s(found)
        free = free_to_take(found, ages_s, self.me, self.orphan_after_s)
        for lease in free:
            taken = self._take(running[lease.trial], lease)
            if taken:
                log.info("trial %d is taken over from %s", lease.trial, lease.holder)
                return taken
        return None

    def _new(self) -> Assignment | None:
        # Under a lock: workers that count and then ask ask for too many, and a sampler must see
        # what the others were given. Who holds a trial is decided by the leases alone.
        with FileLock(self.folder / ".ask.lock"):
            running, target = self._running(), self.target()
            leases = self.leases.current(running)
            for number, trial in running.items():
                if number not in leases:  # asked for by a worker that died before it took it
                    return self._take(trial, None)
            counts = self.counts()
            if counts.finished + counts.running >= target:
                return None
            self._check_failures(target)
            asked = self.study.ask()
            taken = self.leases.take(asked.number, self.me)
            with contextlib.suppress(ValueError):  # which comes again where it fails the trial
                self.suggest(asked)
            return Assignment(asked, taken) if taken else None

    def _running(self) -> dict[int, FrozenTrial]:
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return {trial.number: trial for trial in trials}

    def _take(self, frozen: FrozenTrial, after: Lease | None) -> Assignment | None:
        from optuna import Trial

        step = self.step_of(frozen)
        held = self.leases.take(frozen.number, self.me, after=after, step=step)
        if held is None or frozen.number not in self._running():  # it was finished just before
            return None
        # Optuna's only way to go on with a trial that another process has begun.
        trial = Trial(self.study, frozen._trial_id)
        if self._is_deadly(trial.number):
            fail(trial, self._cause(trial.number, held.lease.step))
            return None
        return Assignment(trial, held)

    def _is_deadly(self, number: int) -> bool:
        *before, now = self.leases.history(number)
        last = before[-DEATHS:]
        return len(last) == DEATHS and all(
            lease.step == now.step and not lease.released.startswith(NO_FAULT) for lease in last
        )

    def _cause(self, number: int, step: int) -> str:
        """What the last holders said as they ended."""
        said = {lease.released or "without a word" for lease in self.leases.history(number)[:-1]}
        return f"its last {DEATHS} workers ended at step {step}: {'; '.join(sorted(said))}"

    def _check_failures(self, target: int) -> None:
        from optuna.trial import TrialState

        failed = self.study.get_trials(deepcopy=False, states=[TrialState.FAIL])
        new, most = failed[self.failed_before :], max(5, target // 4)
        if len(new) >= most:
            said = "; ".join(f"{t.number}: {t.user_attrs.get('error', '?')}" for t in new[-3:])
            numbers = ", ".join(str(trial.number) for trial in new)
            raise TooManyFailuresError(
                f"{len(new)} trials of {self.study.study_name} have failed ({numbers}), the last "
                f"ones: {said}. Mend the cause, then python sweeps/launch.py resume --study "
                f"{self.study.study_name}"
            )


def fail(trial: Trial, message: str) -> None:
    """Give a trial up; a new one replaces it."""
    from optuna.trial import TrialState

    log.warning("trial %d has failed: %s", trial.number, message)
    trial.set_user_attr("error", message)
    trial.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
