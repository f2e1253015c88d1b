"""Where a drill's jobs run, and how they are hit there: as Slurm would, or by signals."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from colddiff.files import read_json
from colddiff.run_folder import RunFolder
from jobs import slurm
from jobs.cluster import SlurmJobs, Submitted
from jobs.local.slots import is_held
from jobs.profiles import Profile
from jobs.scratch import END_TIMEOUT_S, end_slurm_jobs
from jobs.tasks import AnyTask

Phase = Literal["queued", "running", "ended"]


class DrillError(RuntimeError):
    """The drill could not be carried out; nothing is proven."""


@dataclass(frozen=True)
class Sight:
    """What the scheduler says of a job now."""

    phase: Phase
    nodes: str = ""
    reason: str = ""
    """Why it is queued."""
    start: str = ""
    """When the scheduler means to start it."""


class Host(Protocol):
    """A scheduler, as far as a drill needs one."""

    poll_s: float
    """Seconds between two questions."""
    orders: tuple[str, str]
    """What :meth:`warn` and :meth:`preempt` do, for people."""

    def submit(self, tasks: Sequence[AnyTask]) -> list[Submitted]:
        """Hand the tasks to the scheduler."""
        ...

    def sight(self, job: Submitted, folder: RunFolder) -> Sight:
        """Where the job of this run stands."""
        ...

    def warn(self, job: Submitted, folder: RunFolder) -> None:
        """Do what a time limit does."""
        ...

    def preempt(self, job: Submitted, folder: RunFolder) -> None:
        """Do what a preemption does."""
        ...

    def again(self, task: AnyTask) -> Submitted | None:
        """Submit what has ended once more; None where the scheduler should have done so."""
        ...

    def nudge(self, job: Submitted) -> None:
        """Let a requeued job start at once."""
        ...

    def end(self) -> None:
        """Cancel what was submitted, and wait until it is gone."""
        ...


class SlurmHost:
    """Jobs of a profile on a cluster."""

    poll_s = 1.0
    orders = ("scancel --signal=USR2", "scontrol requeue")

    def __init__(self, profile: Profile, folder: Path, code: Path) -> None:
        self.profile, self.folder, self.code = profile, folder, code
        self.jobs: list[str] = []

    def submit(self, tasks: Sequence[AnyTask]) -> list[Submitted]:
        """As an array, like every launch."""
        made = []
        for part in SlurmJobs(tasks, self.profile, self.folder, self.code).submit():
            self.jobs += [job.job_id for _, job in part]
            made += [job for _, job in part]
        return made

    def sight(self, job: Submitted, folder: RunFolder) -> Sight:
        """What squeue says."""
        state = slurm.job_states([job.job_id], ended=False).get(job.job_id)
        if state is None:
            return Sight("ended")
        running = state.state in ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT")
        phase: Phase = "running" if running else "queued"
        return Sight(phase, state.nodes, state.reason, state.start)

    def warn(self, job: Submitted, folder: RunFolder) -> None:
        """Slurm's signal ahead of a time limit."""
        slurm.run("scancel", "--signal=USR2", job.job_id)

    def preempt(self, job: Submitted, folder: RunFolder) -> None:
        """TERM, KILL after KillWait, and back into the queue."""
        slurm.run("scontrol", "requeue", job.job_id)

    def again(self, task: AnyTask) -> Submitted | None:
        """Slurm requeues by itself."""
        return None

    def nudge(self, job: Submitted) -> None:
        """Skip the two minutes that Slurm lets requeued jobs wait."""
        slurm.start_now([job.job_id])

    def end(self) -> None:
        """Cancel."""
        if self.jobs:
            end_slurm_jobs(self.jobs)


class LocalHost:
    """Jobs of this machine's queue."""

    poll_s = 0.1
    orders = ("signal USR2", "signal TERM and resubmission")

    def __init__(self, folder: Path, code: Path) -> None:
        self.folder, self.code = folder, code
        self.jobs: list[str] = []

    def submit(self, tasks: Sequence[AnyTask]) -> list[Submitted]:
        """Into the queue that all launches of this machine share."""
        from jobs.local.queue import submit_locally

        jobs = submit_locally(tasks, self.folder, code=self.code)
        self.jobs += [job.job_id for job in jobs]
        return jobs

    def sight(self, job: Submitted, folder: RunFolder) -> Sight:
        """What the queue says; between two processes of one job, it is queued."""
        from jobs.local.queue import local_phases

        phase = local_phases(self.folder, [job.job_id])[job.job_id]
        if phase == "running" and self._process(folder) is None:
            return Sight("queued", reason="starting")
        return Sight(phase, reason="other jobs run here" if phase == "queued" else "")

    def warn(self, job: Submitted, folder: RunFolder) -> None:
        """What submitit sends at the end of its time."""
        self._signal(folder, signal.SIGUSR2)

    def preempt(self, job: Submitted, folder: RunFolder) -> None:
        """What ends a process, whoever wants it to."""
        self._signal(folder, signal.SIGTERM)

    def again(self, task: AnyTask) -> Submitted | None:
        """Submit it."""
        return self.submit([task])[0]

    def nudge(self, job: Submitted) -> None:
        """No queue here lets jobs wait."""

    def end(self) -> None:
        """Cancel, and wait: the jobs save and end, their queues follow."""
        from jobs.local.queue import cancel_locally, local_phases

        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            phases = local_phases(self.folder, self.jobs)
            living = [job_id for job_id, phase in phases.items() if phase != "ended"]
            if not living and not any(map(is_held, self.folder.glob("jobs/*/queue.lock"))):
                return
            cancel_locally(self.folder, living)
            time.sleep(0.2)
        raise DrillError(f"{', '.join(living)} cannot be ended, or their queue")

    def _process(self, folder: RunFolder) -> psutil.Process | None:
        """The run's living process."""
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            process = psutil.Process(read_json(folder.path / "process.json")["pid"])
            if process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _signal(self, folder: RunFolder, number: signal.Signals) -> None:
        process = self._process(folder)
        if process is not None:  # else it has just ended
            os.kill(process.pid, number)
