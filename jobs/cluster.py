"""Where tasks run: in this process (debug), or in the background of this machine (local)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.tasks import TaskList

Cluster = Literal["local", "debug"]
LOCAL_TIMEOUT_MINUTES = 7 * 24 * 60
"""submitit ends local jobs after this time; its default is 2 minutes."""

_BACKGROUND: list[Any] = []
"""submitit's jobs hold their processes, which complain when they are dropped while running."""


@dataclass(frozen=True)
class Submission:
    """A submitted job and where its output goes."""

    job_id: str
    stdout: Path
    stderr: Path


def run_here(tasks: Sequence[Callable[[], str]]) -> list[str]:
    """Run the tasks in this process, in order; exceptions and Ctrl-C come through untouched.

    submitit's DebugExecutor is not used: it opens a debugger on exceptions, which hangs where
    nobody sits at a terminal.
    """
    return [task() for task in tasks]


def submit_locally(tasks: Sequence[Callable[[], str]], logs: Path) -> Submission:
    """Hand the tasks to one background process, which works through them in order.

    submitit's local executor has no queue; one job with a list is one: runs do not compete for
    the machine, and the list goes on after the launcher and its shell are gone.
    """
    import submitit

    executor = submitit.LocalExecutor(folder=logs)
    executor.update_parameters(timeout_min=LOCAL_TIMEOUT_MINUTES)
    job = executor.submit(TaskList(tuple(tasks)))
    _BACKGROUND.append(job)
    return Submission(job.job_id, job.paths.stdout, job.paths.stderr)
