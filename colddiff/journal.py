"""The crash-proof record of a run: one JSON line a record, appended and never rewritten.

A line is ``{"step": int, "timestamp_ms": int, "metrics": {key: float}}``. After a crash the last
line may be torn and is dropped; the steps that a resumed run repeats are not recorded again but
compared with what stands there, which shows at once where a run does not repeat itself.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import operator
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from colddiff.files import sync_folder

log = logging.getLogger(__name__)

MEASURED = ("speed/", "system/")
"""Prefixes of keys that measure the machine, not the model: no two runs agree on them."""


@dataclass(frozen=True)
class Record:
    """Metrics of one step; ``timestamp_ms`` is Unix time in milliseconds."""

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A repeated step gave ``repeated`` where ``recorded`` stands in the journal."""

    step: int
    key: str
    recorded: float
    repeated: float


class Journal:
    """The journal of a run, open for appending; use :meth:`open`."""

    def __init__(self, path: Path, descriptor: int, recorded: dict[int, dict[str, float]]) -> None:
        self.path = path
        self.differences: list[Difference] = []
        self._descriptor = descriptor
        self._recorded = recorded

    @classmethod
    def open(cls, path: Path) -> Self:
        """Create the journal, or open it for appending without its torn last line.

        Raises:
            ValueError: if a line before the last is corrupt.
        """
        recorded: dict[int, dict[str, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            sync_folder(path.parent)
            records, end = read_records(path)
            for record in records:
                recorded.setdefault(record.step, {}).update(record.metrics)
            torn = os.fstat(descriptor).st_size - end
            if torn:
                log.warning("%s: dropped a torn last line of %d bytes", path, torn)
                os.ftruncate(descriptor, end)
                os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, recorded)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the keys that ``step`` does not have yet and compare the others bit for bit.

        A difference is logged and kept in :attr:`differences`; what was recorded first stays.

        Raises:
            ValueError: for a negative step.
            OSError: if the disk is full; the journal is as before then.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step = {step} is not allowed: it must be at least 0")
        known = self._recorded.setdefault(step, {})
        fresh: dict[str, float] = {}
        for key, value in metrics.items():
            if key in known:
                self._compare(step, key, known[key], float(value))
            else:
                fresh[key] = float(value)
        if fresh:
            record = {"step": step, "timestamp_ms": time.time_ns() // 10**6, "metrics": fresh}
            self._write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            known.update(fresh)

    def sync(self) -> None:
        """Make all that was appended survive a power cut."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _compare(self, step: int, key: str, recorded: float, repeated: float) -> None:
        if key.startswith(MEASURED) or same_bits(recorded, repeated):
            return
        self.differences.append(Difference(step, key, recorded, repeated))
        log.warning(
            "%s: step %d repeated with %s = %r, recorded was %r: this run is not deterministic",
            self.path, step, key, repeated, recorded,
        )  # fmt: skip

    def _write(self, line: bytes) -> None:
        start = os.fstat(self._descriptor).st_size
        # One write of the whole line: a reader, or a kill, never finds half of it on a sane disk.
        if os.write(self._descriptor, line) != len(line):
            os.ftruncate(self._descriptor, start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_records(path: Path, start: int = 0, limit: int | None = None) -> tuple[list[Record], int]:
    """The records from byte ``start`` on, at most ``limit``, and the offset after the last.

    A last line that is torn (no newline, or not a record) is left for later: the offset stands
    before it.

    Raises:
        ValueError: if a line before the last is corrupt, naming path, line and byte.
    """
    records: list[Record] = []
    offset = start
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if len(records) == limit or not line.endswith(b"\n"):
                break  # the end, or as much of a line as its writer had written by now
            try:
                record = _parse(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not file.read(1):
                    break
                number = _line_number(path, offset)
                raise ValueError(
                    f"{path}: line {number} (byte {offset}) is corrupt: {line[:80]!r} ({error})"
                ) from None
            records.append(record)
            offset += len(line)
    return records, offset


def same_bits(a: float, b: float) -> bool:
    """Whether two floats are the same 64 bits, any NaN counting as the same."""
    return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))


def _parse(line: bytes) -> Record:
    if not line.endswith(b"\n"):
        raise ValueError("no newline at its end")
    value = json.loads(line)
    metrics = {str(key): float(number) for key, number in value["metrics"].items()}
    return Record(operator.index(value["step"]), operator.index(value["timestamp_ms"]), metrics)


def _line_number(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        return file.read(offset).count(b"\n") + 1
