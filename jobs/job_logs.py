"""The logs of jobs: which files they are, their ends, and what is new in them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from jobs.ledger import Entry

TAIL_BYTES = 64 * 1024
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
"""How the suite's own lines begin."""
ATTEMPT_END = re.compile(
    r"CANCELLED AT \S+ DUE TO (JOB REQUEUE|PREEMPTION|NODE FAILURE|TIME LIMIT)"
    r"|this job is (timed-out|preempted)"
)
"""What Slurm and submitit write where an attempt ends that another one may follow."""


def log_files(entry: Entry, *, stdout: bool = False) -> list[Path]:
    """The job's logs, one a rank, by rank; none before it starts."""
    path = Path(entry.stdout if stdout else entry.stderr).resolve()  # local ones are links
    beginning, rank_0, kind = path.name.rpartition("_0_log.")
    if not rank_0:
        return [path] if path.is_file() else []
    names = (f"{beginning}_{rank}_log.{kind}" for rank in itertools.count())
    files = map(path.with_name, names)
    return list(itertools.takewhile(Path.is_file, files))  # each rank has one from its start on


def has_begun(entry: Entry) -> bool:
    """Whether the job has run, if only for a moment."""
    return bool(entry.stderr) and Path(entry.stderr).exists()


def end_of(path: Path, lines: int | None = None) -> list[str]:
    """The last lines of a log, at most 64 KiB of them unless ``lines`` asks for more."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        length = TAIL_BYTES
        while True:
            start = max(0, size - length)
            file.seek(start)
            data = file.read(size - start)
            if not start or lines is None or data.count(b"\n") > lines:
                break
            length *= 4
    found = data.decode(errors="replace").splitlines()
    if start:
        found = found[1:]  # the first may be torn
    if lines is not None:
        found = found[-lines:] if lines else []
    return found


def last_attempt(path: Path) -> list[str]:
    """The end of a log without what attempts before the last one wrote.

    Slurm appends to the log when it starts a job again: an end of an attempt, and after it lines
    of the suite.
    """
    lines = end_of(path)
    work = [index for index, line in enumerate(lines) if LOG_LINE.match(line)]
    ends = [i for i, line in enumerate(lines) if work and i < work[-1] and ATTEMPT_END.search(line)]
    return lines[ends[-1] + 1 :] if ends else lines


class Growth:
    """What is new in files that grow."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}

    def skip(self, path: Path) -> None:
        """Take what is in the file now as read."""
        self._read[path] = path.stat().st_size

    def new(self, path: Path) -> str:
        """The whole lines added since the last call."""
        start = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = start + len(whole)
        return whole.decode(errors="replace")
