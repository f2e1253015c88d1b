"""A local job as it is found on disk, and what runs in its processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import submitit

from jobs import environment
from jobs.local.slots import Slot, hold, is_held
from jobs.pack import PackedTask
from jobs.tasks import AlreadyRunningError, AnyTask

Phase = Literal["queued", "running", "ended"]

log = logging.getLogger("colddiff.jobs")


@dataclass(frozen=True)
class Job:
    """Where a job is found on disk, by whoever wants to know about it."""

    queue: Path
    number: int

    @classmethod
    def find(cls, runs: Path, job_id: str) -> Job:
        """The job of this id; raises ``ValueError`` for what is no local job's id."""
        parts = re.fullmatch(r"(local-[0-9a-f]{8})-(\d+)", job_id)
        if not parts:
            raise ValueError(f"{job_id!r} is no local job: their ids are local-<8 hex>-<number>")
        return cls(runs / "jobs" / parts[1], int(parts[2]))

    @property
    def folder(self) -> Path:
        """For submitit's files and ours."""
        return self.queue / str(self.number)

    @property
    def logs(self) -> tuple[Path, Path]:
        """Links to the standard output and error; absent before the job starts."""
        return self.queue / f"{self.number}.out", self.queue / f"{self.number}.err"

    @property
    def cancelled(self) -> Path:
        """There once the job must not start, or not go on."""
        return self.folder / "cancelled"

    @property
    def ended(self) -> Path:
        """There once the queue saw the end of it."""
        return self.folder / "ended"

    def lives(self) -> bool:
        """Whether any of its processes does."""
        return any(is_held(lock) for lock in self.folder.glob("rank-*.lock"))

    def phase(self) -> Phase:
        """Where it stands."""
        if self.lives():
            return "running"
        if self.ended.exists() or not is_held(self.queue / "queue.lock"):
            return "ended"
        if self.logs[0].is_symlink():  # it is starting, or its end is about to be seen
            return "running"
        return "ended" if self.cancelled.exists() else "queued"

    def enter(self, rank: int) -> None:
        """Make the calling process known as one of the job's, until it dies."""
        descriptor = hold(self.folder / f"rank-{rank}.lock")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())

    def ranks_gone(self) -> list[int]:
        """Those of its processes that were there and have ended."""
        locks = [lock for lock in self.folder.glob("rank-*.lock") if not is_held(lock)]
        return [int(lock.stem.removeprefix("rank-")) for lock in locks]

    def terminate(self, signum: int = signal.SIGTERM) -> bool:
        """Tell its processes to save and end; False where there are none.

        Raises:
            ProcessLookupError: where they are on another machine that shares the folder.
        """
        told = False
        for lock in self.folder.glob("rank-*.lock"):
            pid, _, host = lock.read_text().partition(" ")
            if not is_held(lock) or not pid:
                continue
            if host != socket.gethostname():
                raise ProcessLookupError(
                    f"{self.folder}: its processes run on {host}: end them there"
                )
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(int(pid), signum)
            told = True
        return told


@dataclass(frozen=True)
class QueuedTask:
    """What submitit runs: the task, while this process holds its job's and its slots' locks."""

    task: AnyTask | PackedTask
    job: Job
    slots: tuple[Slot, ...]

    def __call__(self) -> str:
        """What the task returns; empty where it was cancelled or is at work already."""
        environment.set_up_logging()
        if self.slots[0].device:
            # submitit would only take numbers, and GPUs may have other names.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.device for slot in self.slots)
        # submitit ignores TERM. A task has its own handler while there is something to save.
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
        ranks = environment.ranks()
        self.job.enter(ranks.rank)
        # From here on whoever cancels finds this process; who did so before left the file.
        if self.job.cancelled.exists():
            log.info("cancelled before the start")
            return ""
        if ranks.is_main:
            for slot in self.slots:
                hold(slot.used)
        try:
            return self.task()
        except AlreadyRunningError as error:
            log.warning("nothing to do here: %s", error)
            return ""

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts again after a time limit: the same, on the same slots."""
        return submitit.helpers.DelayedSubmission(self)
