"""Jobs of the local queue, as its tests start them and look at them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from queue_tasks import Nap

from jobs.local.queue import cancel_locally, local_phases, submit_locally


def processes(place: Path, word: str = "") -> list[psutil.Process]:
    """Queues, submitit's controllers and jobs: all have their folder in the command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.pid != os.getpid() and str(place) in line and word in line:
            found.append(process)
    return found


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def nap(place: Path, name: str, **values: Any) -> Nap:
    return Nap(str(place / "naps" / name), **values)


def note(place: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a nap said of itself; empty before it began."""
    path = place / "naps" / name / f"rank-{rank}.json"
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


class Launch:
    """Jobs submitted together."""

    def __init__(self, place: Path, *tasks: Any, **options: Any) -> None:
        self.runs = place / "runs"
        self.submitted = submit_locally(tasks, self.runs, **options)
        self.ids = [each.job_id for each in self.submitted]
        (self.process,) = processes(self.folder, "jobs.local.queue")

    @property
    def phases(self) -> list[str]:
        found = local_phases(self.runs, self.ids)
        assert list(found) == self.ids
        return list(found.values())

    @property
    def folder(self) -> Path:
        return self.submitted[0].stdout.parent

    @property
    def log(self) -> str:
        return (self.folder / "queue.log").read_text()

    def cancel(self, *numbers: int) -> None:
        cancel_locally(self.runs, [self.ids[number] for number in numbers])

    def wait(self) -> None:
        until(lambda: set(self.phases) == {"ended"}, 120)
