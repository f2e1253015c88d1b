"""What was submitted: ``runs/jobs.jsonl``, one line a job, only ever appended to.

It is how a launcher knows that a run is queued already, how ``status`` finds a run's job, and what
``retry`` submits again. What became of a job is asked of Slurm, never written here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from colddiff.schema import build

log = logging.getLogger("colddiff.jobs")
LAUNCH_TIMEOUT_S = 600
"""How long a launcher waits for another one that is submitting."""


Work = tuple[str, str, str]
"""A run, what is done with it, and the settings of that, as JSON; see :func:`work_of`."""


def work_of(run: str, kind: str, task: Mapping[str, Any]) -> Work:
    """What tells one piece of work from another.

    Two trainings of a run are the same work, two evaluations or generations only with equal
    settings.
    """
    settings = {name: task[name] for name in ("evaluation", "settings") if name in task}
    return run, kind, json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """One submitted job, or (``event = "cancelled"``) the end that a user gave it."""

    run: str
    """Name of the run folder."""
    kind: str
    """What the job does with it: train, evaluate, generate, report."""
    cluster: Literal["slurm", "local"]
    job_id: str
    """Slurm's, ``12_3`` in an array; locally the name of the queue and a number."""
    event: Literal["submitted", "cancelled"] = "submitted"
    time_ms: int = 0
    """Unix time."""
    stdout: str = ""
    stderr: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    """The task's fields: what ``retry`` submits again."""
    profile: dict[str, Any] = field(default_factory=dict)
    """The resources it was given."""
    code: str = ""
    """Digest of the code snapshot it runs from."""
    command: str = ""
    """The command line that submitted it."""

    @property
    def work(self) -> Work:
        """What the job does, see :func:`work_of`."""
        return work_of(self.run, self.kind, self.task)


class Ledger:
    """The ledger of a runs folder; safe with several launchers at once."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / "jobs.jsonl"

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Held while a launcher looks what is queued, submits, and records it: one at a time.

        Raises:
            TimeoutError: where another launcher holds it for ten minutes.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(".launch.lock"), timeout=LAUNCH_TIMEOUT_S)
        try:
            held = lock.acquire()
        except Timeout:
            raise TimeoutError(
                f"another launcher has been submitting for {LAUNCH_TIMEOUT_S} s: {lock.lock_file}"
            ) from None
        with held:
            yield

    def append(self, entries: Sequence[Entry]) -> None:
        """Record jobs, durably, as soon as the scheduler has them."""
        now = time.time_ns() // 10**6
        lines = [
            json.dumps(dataclasses.asdict(dataclasses.replace(entry, time_ms=entry.time_ms or now)))
            for entry in entries
        ]
        data = "".join(f"{line}\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(".jobs.lock"))
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with lock:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                os.write(descriptor, b"\n" + data if torn else data)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def entries(self) -> list[Entry]:
        """All of them, oldest first; a line that a crash tore is reported and left out."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return []
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line:
                continue
            try:
                found.append(build(Entry, json.loads(line)))
            except ValueError as error:
                log.warning("%s: line %d is ignored: %s", self.path, number, error)
        return found

    def latest(self) -> dict[tuple[str, str], Entry]:
        """The last job of each (run, kind), cancelled or not."""
        return {(entry.run, entry.kind): entry for entry in self.entries()}

    def latest_of_each_work(self) -> list[Entry]:
        """The last job of each piece of work, cancelled or not, oldest first."""
        found = {entry.work: entry for entry in self.entries()}
        return sorted(found.values(), key=lambda entry: entry.time_ms)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether a user has cancelled this very job."""
        entries = [entry for entry in self.entries() if entry.job_id == job_id]
        return bool(entries) and entries[-1].event == "cancelled"
