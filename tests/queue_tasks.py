"""Tasks for the local queue that do nothing but say when and where they ran."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jobs
from colddiff.interruption import StopRequest
from jobs.environment import leave, ranks
from jobs.tasks import AlreadyRunningError, Task


@dataclass(frozen=True)
class Nap(Task):
    """Leaves ``folder/rank-<k>.json``; there already while it lasts, then without an end."""

    kind: ClassVar[str] = "nap"

    seconds: float = 0.0
    gate: str = ""
    """If given: lasts until this file is there."""

    def __call__(self) -> str:
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / f"rank-{ranks().rank}.json"
        values: dict[str, Any] = {
            "begin": time.monotonic(),
            "pid": os.getpid(),
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "world_size": ranks().world_size,
            "jobs": jobs.__file__,
        }
        note.write_text(json.dumps(values))
        sys.stdout.write(f"{self.run} naps\n")
        time.sleep(self.seconds)
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.02)
        values["end"] = time.monotonic()
        note.with_suffix(".tmp").write_text(json.dumps(values))
        note.with_suffix(".tmp").replace(note)
        return self.folder


class Long(Task):
    """Stops as its scheduler wants it, and comes to its end when it is started again."""

    kind = "long"

    def __call__(self) -> str:
        begun = Path(self.folder)
        if begun.exists():
            begun.with_suffix(".end").touch()
            return self.folder
        with StopRequest() as stop:
            begun.touch()
            while stop.signum is None:
                time.sleep(0.02)
            leave(stop, stop.signum, begun.parent)
        raise AssertionError("it did not leave")


class Broken(Task):
    """Fails."""

    kind = "broken"

    def __call__(self) -> str:
        raise ValueError("this is broken")


class Lonely(Task):
    """Rank 1 fails, and rank 0 waits for it, deaf to signals."""

    kind = "lonely"

    def __call__(self) -> str:
        if ranks().rank:
            raise ValueError("this rank is broken")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(0.02)


class Busy(Task):
    """Finds another process at work."""

    kind = "busy"

    def __call__(self) -> str:
        raise AlreadyRunningError(f"{self.run} is being worked on")
