"""Commands of colddiff as processes of their own: how long they take, and how much of that is work.

Both are told, because on a busy machine a process mostly waits for its turn.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import Result

SOURCE = Path(__file__).parents[1]
TRACKING = ("MLFLOW_TRACKING_URI", "COLDDIFF_INCEPTION_WEIGHTS")
"""Variables of the user's that would change what is measured."""


@dataclass(frozen=True)
class Ended:
    """A process that ended well."""

    began: float
    """Unix time."""
    seconds: float
    cpu_seconds: float
    """Of all processors, and of the processes it started and waited for."""
    output: str


def run_script(script: str, *words: str, folder: Path, programs: Path | None = None) -> Ended:
    """Run a script of the source tree in ``folder``, with ``programs`` first on PATH.

    Raises:
        RuntimeError: with what it wrote, where it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in TRACKING}
    environment["PYTHONPATH"] = str(SOURCE)
    if programs is not None:
        environment["PATH"] = f"{programs}:{environment['PATH']}"
    command = [sys.executable, str(SOURCE / script), *words]
    work, began, start = _work_of_children(), time.time(), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{script} {words[:1]} failed: {done.stderr[-2000:]}")
    return Ended(began, seconds, _work_of_children() - work, done.stdout)


def at_most(name: str, allowed: float, processes: Sequence[Ended], more: str = "") -> Result:
    """The median of equal processes against what is allowed, in seconds."""
    seconds = statistics.median(process.seconds for process in processes)
    work = statistics.median(process.cpu_seconds for process in processes)
    text = f"{seconds:.2f} s, at most {allowed:g} s ({work:.2f} s of processor time{more})"
    return Result(name, allowed / seconds, 1, text)


def seconds_together(target: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> float:
    """From when all of some processes are ready to when all have done their part.

    Each calls ``target`` with its arguments and a barrier, at which it waits before and after.
    """
    context: Any = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(arguments) + 1)
    children = [
        context.Process(target=target, args=(*each, barrier), daemon=True) for each in arguments
    ]
    for child in children:
        child.start()
    barrier.wait(300)
    start = time.perf_counter()
    barrier.wait(600)
    seconds = time.perf_counter() - start
    for child in children:
        child.join()
    return seconds


def _work_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
