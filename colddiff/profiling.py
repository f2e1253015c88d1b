"""A profile of some training steps: a trace to look at, and a table of what takes the time.

Profiling reads clocks and changes no result. What it keeps in memory grows with the steps that are
recorded, and is freed after the last of them.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from colddiff.files import write_atomic
from colddiff.run_folder import RunFolder

WAIT, WARM_UP = 2, 3
"""Steps before the first that is recorded: some that compile and allocate, then some that the
profiler itself warms up on."""
ROWS = 25


class StepProfiler:
    """Profiles ``wanted`` steps of a training that goes on from ``step`` to ``steps``, 0 for none.

    Where fewer are left, it records those that warming up leaves, at least one. An interrupted or
    failed training writes nothing: a job that must leave has no time for it.
    """

    def __init__(
        self, folder: RunFolder, wanted: int, step: int, steps: int, device: torch.device
    ) -> None:
        left = steps - step
        recorded = min(wanted, max(1, left - WAIT - WARM_UP))
        before = min(WAIT + WARM_UP, left - recorded)
        self._folder, self._device = folder, device
        self._first, self._last = step + before + 1, step + before + recorded
        self._step = step
        self._profiler = _profiler(device, before, recorded) if wanted and left else None

    def step(self) -> None:
        """To be called after each step; after the last that is recorded, writes the files."""
        if self._profiler is None:
            return
        self._profiler.step()
        self._step += 1
        if self._step == self._last:
            self._write(self._profiler)
            self._close()

    def _write(self, profiler: profile) -> None:
        trace = self._folder.profile_trace
        trace.parent.mkdir(exist_ok=True)
        temporary = trace.with_name(f".{trace.name}")  # what a kill leaves, the next one replaces
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(trace)
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        rows = profiler.key_averages().table(sort_by=order, row_limit=ROWS)
        title = f"steps {self._first} to {self._last} on {self._device}, by {order}"
        write_atomic(self._folder.profile_table, f"{title}\n{rows}")

    def _close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def _profiler(device: torch.device, before: int, recorded: int) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wait = max(0, before - WARM_UP)
    with warnings.catch_warnings():  # where one step is left, there is none to warm up on
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")
        stages = schedule(wait=wait, warmup=before - wait, active=recorded, repeat=1)
    return profile(activities=activities, schedule=stages)
