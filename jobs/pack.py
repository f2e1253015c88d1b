"""Several tasks as one job: one process each, side by side on the job's GPU or cores.

A small network leaves most of a large GPU idle, and processes that share it need nothing from the
training: each task is the same as alone, with its own run folder, log and MLflow run.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from colddiff.interruption import Interrupted, StopRequest
from jobs import environment

if TYPE_CHECKING:
    import submitit

    from jobs.cluster import Submitted
    from jobs.tasks import AnyTask

log = logging.getLogger("colddiff.jobs")
POLL_S = 0.2
PR_SET_PDEATHSIG = 1


class PackError(RuntimeError):
    """Some of a pack's tasks failed; the others came to their ends."""


@dataclass(frozen=True)
class PackedTask:
    """What one job does: all of ``tasks`` at once, each in a process of its own."""

    tasks: tuple[AnyTask, ...]
    logs: tuple[str, ...]
    """Of each task the path of its logs, without ``.out`` and ``.err``."""

    @property
    def kind(self) -> str:
        """That of its tasks."""
        return self.tasks[0].kind

    @property
    def run(self) -> str:
        """The names of its runs."""
        return " ".join(task.run for task in self.tasks)

    def __call__(self) -> str:
        """Paths of what was made, in lines.

        A signal goes on to all tasks; when each has saved, the job ends as its scheduler expects.

        Raises:
            PackError: where tasks failed, once the others are at their ends.
        """
        environment.set_up_logging()
        with StopRequest() as stop:
            children = [self._start(i) for i in range(len(self.tasks))]
            told = None
            while any(child.poll() is None for child in children):
                if stop.signum is not None and stop.signum != told:
                    told = stop.signum
                    for child in children:
                        child.send_signal(told)  # does nothing where it has ended
                time.sleep(POLL_S)
            if stop.signum is not None:
                environment.leave(stop, stop.signum, Path(self.logs[0]).parents[2])
                raise Interrupted(0, stop.signum)
        pairs = zip(self.tasks, self.logs, children, strict=True)
        failed = [f"{task.run} ({logs}.err)" for task, logs, child in pairs if child.returncode]
        if failed:
            raise PackError(f"{len(failed)} of {len(self.tasks)} tasks failed: {', '.join(failed)}")
        return "\n".join(task.run for task in self.tasks)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        task, logs = self.tasks[number], Path(self.logs[number])
        logs.parent.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("OMP_NUM_THREADS", "")  # the job's: the tasks share them
        threads = int(given) if given.isdigit() else len(os.sched_getaffinity(0))
        share = {"OMP_NUM_THREADS": str(max(1, threads // len(self.tasks)))}
        variables = os.environ | share | {environment.PACKED: "1"}
        out, err = logs.with_name(f"{logs.name}.out"), logs.with_name(f"{logs.name}.err")
        with out.open("ab") as stdout, err.open("ab") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.pack", str(logs)],  # the name is for ps
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=variables,
            )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it ended already: its code tells
            child.stdin.write(pickle.dumps(task))
        log.info("%s %s, process %d, log %s", task.kind, task.run, child.pid, err)
        return child

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same again. What is complete ends at once."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def packs(tasks: Sequence[AnyTask], size: int, runs: Path) -> list[AnyTask | PackedTask]:
    """The tasks, ``size`` to a job, in their order; a job of one is the task itself."""
    if size == 1:
        return list(tasks)
    folder = runs.absolute() / "jobs" / f"pack-{secrets.token_hex(4)}"
    made: list[AnyTask | PackedTask] = []
    for start in range(0, len(tasks), size):
        part = tuple(tasks[start : start + size])
        logs = tuple(str(folder / f"{task.run}-{task.kind}") for task in part)
        made.append(PackedTask(part, logs) if len(part) > 1 else part[0])
    return made


def unpacked(
    jobs: Iterable[tuple[AnyTask | PackedTask, Submitted]],
) -> Iterator[tuple[AnyTask, Submitted]]:
    """Each task with its job and its own logs."""
    for task, job in jobs:
        if not isinstance(task, PackedTask):
            yield task, job
            continue
        for each, logs in zip(task.tasks, task.logs, strict=True):
            out, err = Path(f"{logs}.out"), Path(f"{logs}.err")
            yield each, dataclasses.replace(job, stdout=out, stderr=err)


def main(stdin: BinaryIO) -> int:
    """Be one task of a pack, whose pickle is in ``stdin``; the exit code."""
    # A parent that is killed must not leave processes behind that no scheduler knows.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    pickle.loads(stdin.read())()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
