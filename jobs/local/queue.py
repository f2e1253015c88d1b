"""The queue of ``--cluster local``: jobs in the background of this machine, one on each GPU.

submitit's local executor starts jobs at once, all on the first GPU. Here every launch leaves one
process behind that starts the launch's jobs in order as slots get free: GPUs, or places on the CPU
of a machine without. All launches of a user share the slots, which are lock files on the machine.

A launch has a folder ``runs/jobs/local-<8 hex>``:

- ``plan.pkl``: what to do; ``queue.log``; ``queue.lock``: held by the queue's process.
- ``<n>/``: submitit's files of job n, ``rank-<k>.lock`` (held by its processes), and the empty
  files ``cancelled`` and ``ended``. ``<n>.out`` and ``<n>.err`` link to its logs once it started.

Processes hold their locks until they die. So whatever was killed, no slot stays taken, and no dead
job seems to run.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from colddiff.files import write_atomic
from colddiff.interruption import StopRequest
from jobs import environment
from jobs.cluster import Submitted
from jobs.local.jobs import Job, Phase, QueuedTask
from jobs.local.slots import Slot, hold, is_held, reserve, slots_for
from jobs.pack import PackedTask
from jobs.tasks import AnyTask

log = logging.getLogger("colddiff.jobs")
TIMEOUT_MINUTES = 7 * 24 * 60
"""submitit interrupts local jobs after this time, and starts them again; its default is 5 min."""
TIMEOUT_NOTICE_S = 120
POLL_S = 0.2
GRACE_S = 60.0
"""How long the ranks of a job that has lost one may take to save."""
YIELD_S = 1.0
"""How long a queue leaves a slot that got free to the queues of other launches."""


@dataclass(frozen=True)
class Plan:
    """What one launch asked for."""

    tasks: tuple[AnyTask | PackedTask, ...]
    slots: tuple[Slot, ...]
    """To choose from."""
    at_once: int
    """Jobs of this launch at the same time, at most."""
    ranks: int
    """Processes of each job."""

    @property
    def slots_per_job(self) -> int:
        """A GPU for each rank; ranks on the CPU share one slot."""
        return self.ranks if self.slots[0].device else 1


@dataclass(frozen=True)
class Started:
    """A job that the queue has started, with the descriptors of its slots' reservations."""

    process: Any
    reservations: tuple[int, ...]


class Queue:
    """The process of one launch."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self.waiting = [Job(folder, number) for number in range(len(plan.tasks))]
        self.running: dict[Job, Started] = {}
        self.told: set[Job] = set()
        self.incomplete: dict[Job, float] = {}
        """Since when a rank is missing."""
        self.failed = 0

    def work(self, stop: StopRequest) -> int:
        """Start the jobs in order and wait for them; the exit code.

        A signal to stop cancels them all: what runs saves and ends, what waits never starts.
        """
        yielding_until = 0.0
        while self.waiting or self.running:
            if stop.signum is not None:
                for job in [*self.waiting, *self.running]:
                    job.cancelled.touch()
            self.heed_cancellations()
            self.end_incomplete()
            if self.collect():
                yielding_until = time.monotonic() + YIELD_S
            while time.monotonic() >= yielding_until and self.start_next():
                pass
            time.sleep(POLL_S)
        return 128 + stop.signum if stop.signum is not None else min(self.failed, 1)

    def heed_cancellations(self) -> None:
        """Drop cancelled jobs, and tell those that run; once, or they could not end in peace."""
        for job in [job for job in self.waiting if job.cancelled.exists()]:
            log.info("%s was cancelled before its start", self.name(job))
            job.ended.touch()
            self.waiting.remove(job)
        for job in self.running.keys() - self.told:
            if job.cancelled.exists() and job.terminate():
                log.info("%s was cancelled", self.name(job))
                self.told.add(job)

    def end_incomplete(self) -> None:
        """End jobs of which a rank failed or was cancelled: the others might wait for it for long.

        They are told first, and have :data:`GRACE_S` to save.
        """
        for job, started in self.running.items():
            gone = job.ranks_gone()
            if not gone or not job.lives():
                continue
            if not job.cancelled.exists() and all(_succeeded(started.process, k) for k in gone):
                continue  # rank 0 evaluates when the others have left
            since = self.incomplete.setdefault(job, time.monotonic())
            if job not in self.told and job.terminate():
                log.info("%s: rank %d has gone, the others end", self.name(job), gone[0])
                self.told.add(job)
            if time.monotonic() - since > GRACE_S:
                job.terminate(signal.SIGKILL)

    def collect(self) -> bool:
        """Free the slots of jobs that ended; whether there were any."""
        over = [
            job
            for job, started in self.running.items()
            if started.process.done() and not job.lives()
        ]
        for job in over:
            started = self.running.pop(job)
            job.ended.touch()
            log.info("%s %s", self.name(job), self.outcome(started.process))
            for descriptor in started.reservations:
                os.close(descriptor)
        return bool(over)

    def start_next(self) -> bool:
        """Start the next job if it may; whether it did."""
        if not self.waiting or len(self.running) >= self.plan.at_once:
            return False
        reserved = reserve(self.plan.slots, self.plan.slots_per_job)
        if not reserved:
            return False
        job = self.waiting.pop(0)
        log.info("%s starts on %s", self.name(job), ", ".join(Path(s.path).name for s in reserved))
        executor = submitit.LocalExecutor(folder=job.folder)
        executor.update_parameters(
            timeout_min=TIMEOUT_MINUTES,
            signal_delay_s=TIMEOUT_NOTICE_S,
            tasks_per_node=self.plan.ranks,
        )
        process = executor.submit(QueuedTask(self.plan.tasks[job.number], job, tuple(reserved)))
        self.running[job] = Started(process, tuple(reserved.values()))
        for link, target in zip(
            job.logs, (process.paths.stdout, process.paths.stderr), strict=True
        ):
            link.symlink_to(target.relative_to(link.parent))
        return True

    def outcome(self, process: Any) -> str:
        """How a job ended, and a note of it where it failed."""
        found = [_result(process, rank) for rank in range(self.plan.ranks)]
        kinds = [kind for kind in found if kind]
        if "error" in kinds:
            self.failed += 1
            return "failed"
        # submitit has no result of what left on a signal.
        return "ended" if len(kinds) == self.plan.ranks else "was stopped"

    def name(self, job: Job) -> str:
        """For the log."""
        task = self.plan.tasks[job.number]
        return f"job {job.number} ({task.kind} {task.run})"


def _result(process: Any, rank: int) -> str:
    """What submitit says of a rank's end: success, error, or nothing where it left on a signal."""
    path = process.task(rank).paths.result_pickle
    return str(pickle.loads(path.read_bytes())[0]) if path.exists() else ""


def _succeeded(process: Any, rank: int) -> bool:
    return _result(process, rank) == "success"


def submit_locally(
    tasks: Sequence[AnyTask | PackedTask],
    runs: Path,
    *,
    at_once: int = 0,
    ranks: int = 1,
    code: Path | None = None,
) -> list[Submitted]:
    """Queue a job for each task; they go on when the launcher and its shell are gone.

    Args:
        tasks: What to do, in this order.
        runs: The jobs' folders are made below it.
        at_once: How many of these jobs run at the same time: 0 for one on each GPU, or for one on
            a machine without. More than one on each GPU never do.
        ranks: Processes of each job, with a GPU for each where there are GPUs.
        code: A folder to import everything from, instead of the installed sources.

    Raises:
        ValueError: for numbers that this machine cannot serve.
    """
    slots = slots_for(at_once, ranks)
    folder = runs.absolute() / "jobs" / f"local-{secrets.token_hex(4)}"
    jobs = [Job(folder, number) for number in range(len(tasks))]
    for job in jobs:
        job.folder.mkdir(parents=True)
    if jobs:
        plan = Plan(tuple(tasks), tuple(slots), at_once or len(slots), ranks)
        write_atomic(folder / "plan.pkl", pickle.dumps(plan))
        _start_queue(folder, code, plan)
    return [Submitted(f"{folder.name}-{job.number}", *job.logs) for job in jobs]


def local_phases(runs: Path, job_ids: Iterable[str]) -> dict[str, Phase]:
    """Where jobs stand; true also after their queue was killed, or the machine was."""
    return {job_id: Job.find(runs, job_id).phase() for job_id in job_ids}


def cancel_locally(runs: Path, job_ids: Sequence[str]) -> None:
    """Take jobs off the queue, and have those that run save and end; does not wait for them.

    Raises:
        ProcessLookupError: for a job that goes on without its queue on another machine.
    """
    for job in [Job.find(runs, job_id) for job_id in job_ids]:
        if job.folder.is_dir():
            job.cancelled.touch()
            if not is_held(job.queue / "queue.lock"):  # which would do it
                job.terminate()


def _start_queue(folder: Path, code: Path | None, plan: Plan) -> None:
    """Start the queue's process, in a session that no terminal's end or Ctrl-C reaches."""
    variables = dict(os.environ)
    processes = min(plan.at_once, len(plan.slots) // plan.slots_per_job) * plan.ranks
    if processes > 1:  # each would start a thread on every core, and all be slower
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    if code is not None:
        old = variables.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([str(code.absolute()), *([old] if old else [])])
        # The working folder must not come first: it may hold the sources as they are by then.
        variables["PYTHONSAFEPATH"] = "1"
    # Inherited, the lock is held from before the process is there until its end.
    lock = hold(folder / "queue.lock")
    with (folder / "queue.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.local.queue", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=variables,
            start_new_session=True,
            pass_fds=[lock],
        )
    os.close(lock)
    process.returncode = 0  # Python complains of processes that nobody waits for


def main(folder: Path) -> int:
    """Be the queue of a launch's folder."""
    environment.set_up_logging()
    plan = pickle.loads((folder / "plan.pkl").read_bytes())
    with StopRequest() as stop:
        return Queue(folder, plan).work(stop)


if __name__ == "__main__":
    # By its name: pickles would not find the classes of __main__ again.
    from jobs.local import queue

    sys.exit(queue.main(Path(sys.argv[1])))
