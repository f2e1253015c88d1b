"""Waiting: for a storage that is away for a while, and for whatever else, heeding signals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from colddiff.interruption import Interrupted, StopRequest
from colddiff.uris import mask_secrets
from sweeps.storage import failures

log = logging.getLogger("colddiff.sweeps")
PATIENCE_S = 15 * 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LOOK_S = 0.1
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Patience:
    """Asks a study's storage again where it fails: the restart of a database ends no worker."""

    stop: StopRequest

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        """What the storage answers.

        Args:
            ask: may be repeated: what it did before it failed is found, not done again.

        Raises:
            Interrupted: where a signal comes first.
            Exception: one of :func:`sweeps.storage.failures`, after :data:`PATIENCE_S`.
        """
        deadline, pause_s = time.monotonic() + PATIENCE_S, FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except failures() as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("the storage does not answer: %s", mask_secrets(str(error)))
            wait(pause_s, self.stop)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def wait(seconds: float, stop: StopRequest) -> None:
    """Wait, but for a signal no longer; raises ``Interrupted`` there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or stop.signum is not None:
        if stop.signum is not None:
            raise Interrupted(0, stop.signum)
        time.sleep(LOOK_S)
