"""One of a drill's two runs: wait for it, hit it, and measure what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from colddiff.files import read_json
from colddiff.run_folder import RunFolder
from jobs.cluster import Submitted
from jobs.doctor.checks import last_line
from jobs.drill.hosts import DrillError, Host, Sight
from jobs.options import say
from jobs.slurm import SlurmError
from jobs.tasks import Task

ARRIVAL_S = 15.0
"""How long a file of another node takes to show, on a network disk."""
NUDGE_S = 10.0
"""A start that is nearer than this is waited for."""


class TooQuickError(RuntimeError):
    """The run ended before it could be hit."""


@dataclass(frozen=True)
class Hit:
    """An interruption and what it cost."""

    order: str
    step: int
    """The last step that the run is known to have done."""
    resumed: int
    """The step from which it went on."""
    saved_s: float | None
    """From the order until the state was saved; None where it was not."""
    left_s: float
    """From the order until the job had left."""
    queued_s: float
    """From there until it was started again."""
    planned_s: float | None
    """The same as the scheduler had planned it before it was asked to start at once."""

    @property
    def lost(self) -> int:
        """Steps that were computed again."""
        return max(0, self.step - self.resumed)

    def __str__(self) -> str:
        saved = "did not save" if self.saved_s is None else f"saved after {self.saved_s:.1f} s"
        planned = f" ({self.planned_s:.0f} s unless nudged)" if self.planned_s is not None else ""
        return (
            f"{self.order} at step {self.step}: {saved}, gone after {self.left_s:.1f} s, started "
            f"again {self.queued_s:.1f} s later{planned}, resumed at step {self.resumed}: "
            f"{self.lost} steps lost"
        )


class DrilledRun:
    """A run and its job; says what it sees."""

    def __init__(
        self, name: str, task: Task, job: Submitted, host: Host, patience_s: float
    ) -> None:
        self.name, self.task, self.job = name, task, job
        self.folder = RunFolder(Path(task.folder))
        self.host, self.patience_s = host, patience_s
        self.seen = Sight("queued")
        self.planned: datetime | None = None
        """The latest start that the scheduler has named since the last hit."""
        self.said = ""

    @property
    def step(self) -> int:
        """The last step it tells of."""
        status = self.folder.status()
        return status.step if status else 0

    @property
    def attempts(self) -> int:
        """How often it has been started."""
        try:
            return len(read_json(self.folder.environment)["attempts"])
        except FileNotFoundError:
            return 0

    def reach(self, step: int) -> None:
        """Wait until this process, not one before it, has come to the step or gone on from it."""
        attempts = read_json(self.folder.environment)["attempts"] if self.attempts else []
        target = max(step, attempts[-1]["resumed_from_step"] + 1 if attempts else 0)
        self.wait(lambda: self.step >= target, f"step {target}")
        if self.folder.is_trained:
            raise TooQuickError

    def finish(self) -> None:
        """Wait until it is trained."""
        self.wait(lambda: self.folder.is_trained, "its end")
        say(f"{self.name} is trained")

    def strike(self, name: str, order: Callable[[Submitted, RunFolder], None]) -> Hit:
        """Give the order and wait until the run is at work again."""
        before, attempt = self.step, self.attempts
        say(f"{self.name}: {name} after step {before}")
        self.planned = None
        start = time.monotonic()
        try:
            order(self.job, self.folder)
        except SlurmError:
            if self.folder.is_trained:
                raise TooQuickError from None
            raise
        saved_s, left_s = self._leaving(start)
        left = datetime.now()
        if self.folder.is_trained:
            raise TooQuickError
        status = self.folder.status()
        step = max(before, status.step) if status else before
        self._start_again(name)
        queued_s = time.monotonic() - start - left_s
        self.wait(lambda: self.attempts > attempt, "its next attempt")
        resumed = read_json(self.folder.environment)["attempts"][-1]["resumed_from_step"]
        say(f"{self.name} goes on from step {resumed}")
        planned_s = max(0.0, (self.planned - left).total_seconds()) if self.planned else None
        return Hit(name, step, resumed, saved_s, left_s, queued_s, planned_s)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it, as long as something moves.

        Raises:
            DrillError: where nothing has moved for as long as patience lasts, or the job is gone.
        """
        asked, moved, last = 0.0, time.monotonic(), object()
        ended = 0.0
        while not condition():
            now = time.monotonic()
            if now >= asked + self.host.poll_s:
                asked = now
                self._look()
            if (sign := (self.seen.phase, self.step, self.attempts)) != last:
                last, moved = sign, now
            elif now > moved + self.patience_s:
                raise DrillError(f"{self.standing()}, and {self._waited()} for {what} in vain")
            ended = (ended or now) if self.seen.phase == "ended" else 0.0
            if ended and now > ended + ARRIVAL_S:
                raise DrillError(f"{self.name}'s job has ended before {what}: {self._last_words()}")
            time.sleep(0.1)

    def standing(self) -> str:
        """Where it stands, in words."""
        if self.seen.phase == "queued":
            reason = f" ({self.seen.reason})" if self.seen.reason else ""
            return f"{self.name} is queued as {self.job.job_id}{reason}"
        if self.seen.phase == "running":
            nodes = f" on {self.seen.nodes}" if self.seen.nodes else ""
            return f"{self.name} is running as {self.job.job_id}{nodes}"
        return f"{self.name}'s job {self.job.job_id} has ended"

    def _waited(self) -> str:
        return f"{self.patience_s / 60:.4g} minutes (--patience) were waited"

    def _look(self) -> None:
        self.seen = self.host.sight(self.job, self.folder)
        if self.seen.phase == "queued":
            self._nudge()
        if (words := self.standing()) != self.said:
            say(words)
            self.said = words

    def _nudge(self) -> None:
        try:
            start = datetime.fromisoformat(self.seen.start)
        except ValueError:  # N/A: the scheduler has no plan yet
            return
        self.planned = max(self.planned or start, start)
        # Slurm takes "now" as some seconds from now: asked all the time, it never starts the job.
        away_s = (start - datetime.now()).total_seconds()
        if self.seen.reason == "BeginTime" and away_s > NUDGE_S:
            self.host.nudge(self.job)

    def _leaving(self, start: float) -> tuple[float | None, float]:
        """Seconds until it had saved, and until it had left."""
        saved_s, asked = None, 0.0
        while True:
            now = time.monotonic()
            if now >= asked + self.host.poll_s:
                asked = now
                self._look()
            now_s = time.monotonic() - start
            if saved_s is None and self._is_saved():
                saved_s = now_s
            if self.seen.phase != "running":
                return saved_s, now_s
            if now_s > self.patience_s:
                raise DrillError(f"{self.standing()}, though it was told to go")
            time.sleep(0.05)

    def _is_saved(self) -> bool:
        status = self.folder.status()
        return status is not None and status.state == "interrupted"

    def _start_again(self, name: str) -> None:
        """Wait until it is started again; what has ended is submitted again, if that is how."""
        self.wait(lambda: self.seen.phase != "queued", "its next start")
        if self.seen.phase == "running":
            return
        job = self.host.again(self.task)
        if job is None:
            raise DrillError(
                f"the job was not requeued after {name}: {self._last_words()}; see requeue and "
                "preemption in python jobs/launch.py doctor"
            )
        self.job, self.seen = job, Sight("queued")
        self.wait(lambda: self.seen.phase != "queued", "its next start")

    def _last_words(self) -> str:
        path = self.job.stderr
        return last_line(path.read_text(errors="replace")) if path.exists() else "it left no log"
