"""Signals become a request to stop at the next step boundary.

Handlers run between any two bytecodes, possibly between the optimiser's step and the average's:
they only set a flag, and the training loop saves and stops where the state is whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

Handler = Callable[[int, FrameType | None], Any] | int | None
"""What ``signal.signal`` takes and returns."""

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""The signals that ask to stop, the most telling first.

Slurm sends USR2 ahead of a time limit, where the job must requeue itself, TERM when it takes the
node away and requeues the job by itself, and often one after the other. Ctrl-C is INT.
"""


class Interrupted(Exception):
    """Work stopped on request; ``step`` steps of the training are saved."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
        self.step, self.signum = step, signum


class StopSource(Protocol):
    """Anything with a ``signum``: None to go on, else the signal that asked to stop."""

    @property
    def signum(self) -> int | None:
        """The signal, once there is one."""
        ...


def strongest(signums: list[int | None]) -> int | None:
    """The most telling of several ranks' signals, None where none has one."""
    return next((int(name) for name in SIGNALS if name in signums), None)


class StopRequest:
    """Context manager: while it is open, the :data:`SIGNALS` set :attr:`signum`.

    A second Ctrl-C raises ``KeyboardInterrupt`` at once, for a user who will not wait; what was
    saved before stays good. Must be opened in the main thread. Forked children inherit the
    handlers, which then do nothing there.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.previous: dict[int, Handler] = {}
        """What each signal's handler was before, for who wants to pass the signal on."""
        self._pid = os.getpid()
        self._immediate: int | None = None

    def __enter__(self) -> Self:
        for name in SIGNALS:
            self.previous[name] = signal.signal(name, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, previous in self.previous.items():
            signal.signal(name, previous)

    @contextlib.contextmanager
    def immediate(self, step: int) -> Iterator[None]:
        """For work without steps, which leaves nothing half done: a signal ends it at once.

        Raises:
            Interrupted: in the midst of the block, or before it where a signal came already.
        """
        if self.signum is not None:
            raise Interrupted(step, self.signum)
        self._immediate = step
        try:
            yield
        finally:
            self._immediate = None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = strongest([self.signum, signum])
        if self._immediate is not None:
            step, self._immediate = self._immediate, None  # raised once: cleaning up goes on
            raise Interrupted(step, signum)
