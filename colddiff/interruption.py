"""Signals become a request to stop at the next step boundary.

Handlers run between any two bytecodes, possibly between the optimiser's step and the average's:
they only set a flag, and the training loop saves and stops where the state is whole.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Protocol, Self


class Interrupted(Exception):
    """Training stopped on request; its state is saved."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
        self.step, self.signum = step, signum


class StopSource(Protocol):
    """Anything with a ``signum``: None to go on, else the signal that asked to stop."""

    @property
    def signum(self) -> int | None:
        """The signal, once there is one."""
        ...


class StopRequest:
    """Context manager: while it is open, SIGINT and SIGTERM set :attr:`signum`.

    A second Ctrl-C raises ``KeyboardInterrupt`` at once, for a user who will not wait; what was
    saved before stays good. Must be opened in the main thread.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for name in self.SIGNALS:
            self._previous[name] = signal.signal(name, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, previous in self._previous.items():
            signal.signal(name, previous)  # type: ignore[arg-type]

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
