"""How everything here is timed: in turn, in one process, as medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from colddiff.machine import git_dirty, git_sha, processor

TURN_S = 0.05
"""Seconds of a way's turn, at least."""
WARM_UP_S = 1.0
"""A first call that takes longer is no short way's, however cold it was."""


@dataclass(frozen=True)
class Result:
    """One thing measured, as a ratio that should be large."""

    name: str
    ratio: float
    """The reference's time over ours, or what is allowed over what was measured; 0 for neither."""
    target: float
    """The ratio asked for; 0 where none is."""
    text: str
    """What was measured, in units."""

    @property
    def missed(self) -> bool:
        """Whether less was reached than was asked for."""
        return self.ratio < self.target


def interleaved(
    *ways: Callable[[], object], seconds: float = 10.0, repeats: int = 3
) -> list[float]:
    """Median seconds of each of ``ways``, run in turn so that a busy machine slows all alike.

    One warm-up each, then rounds for about ``seconds`` and at least ``repeats``. In each round a
    way that takes less than ``TURN_S`` is called several times in a row, as ``timeit`` does: a
    single call of a tenth of a millisecond would measure how the other way left the caches.
    """
    calls = [_calls(way) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    start = time.perf_counter()
    while len(times[0]) < repeats or time.perf_counter() - start < seconds:
        for way, count, measured in zip(ways, calls, times, strict=True):
            measured.append(_elapsed(way, count) / count)
    return [statistics.median(measured) for measured in times]


def _calls(way: Callable[[], object]) -> int:
    """Warms it up; so many calls fill a turn."""
    if _elapsed(way) >= WARM_UP_S:
        return 1
    return max(1, round(TURN_S / _elapsed(way)))


def _elapsed(way: Callable[[], object], calls: int = 1) -> float:
    before = time.perf_counter()
    for _ in range(calls):
        way()
    return time.perf_counter() - before


def machine() -> str:
    """Where and of what: processor, cores, threads, load, torch, commit."""
    dirty = " with uncommitted changes" if git_dirty() else ""
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f} before; torch {torch.__version__}; "
        f"commit {git_sha()[:12]}{dirty}"
    )


def table(results: Iterable[Result]) -> None:
    """Print a line of Markdown for each result as it comes."""
    print("| what | ratio | wanted | measured |")
    print("|---|---|---|---|")
    for result in results:
        print(row(result), flush=True)


def row(result: Result) -> str:
    """A result as a line of the table."""
    wanted = "" if not result.target else f"{result.target:g}" + (" (missed)" * result.missed)
    ratio = f"{result.ratio:.3g}" if result.ratio else ""
    return f"| {result.name} | {ratio} | {wanted} | {result.text} |"
