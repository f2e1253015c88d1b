"""A small job that looks around where jobs will run, and what its report means."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

import colddiff
from colddiff.files import read_json, write_json
from jobs import environment, slurm
from jobs.cluster import SlurmJobs, Submitted
from jobs.doctor.checks import Check, last_line
from jobs.profiles import Profile
from jobs.scratch import end_slurm_jobs, scratch_folder, shortened
from jobs.snapshot import snapshot
from jobs.tasks import Task

MINUTES = 5
"""Time limit: torch from a cold network disk can take more than one."""
QUEUE_S = 120.0
"""How long doctor waits for the start."""
ARRIVAL_S = 15.0
"""How long a file of another node takes to show, on a network disk."""
POLL_S = 1.0
QUESTION, LOCK, REPORT = "question.txt", "lock", "report.json"


@dataclass(frozen=True)
class ProbeTask(Task):
    """Look around and write it down; ``folder`` is not a run's, but the probe's own."""

    kind: ClassVar[str] = "probe"

    def __call__(self) -> str:
        """The folder."""
        environment.set_up_logging()
        if environment.ranks().is_main:
            write_json(Path(self.folder) / REPORT, self.look())
        return self.folder

    def look(self) -> dict[str, Any]:
        """What there is to see here, as JSON values."""
        from jobs.doctor.tracking_checks import check_store

        folder = Path(self.folder)
        seen: dict[str, Any] = {
            "answer": (folder / QUESTION).read_text(),
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "code": str(Path(colddiff.__file__).parent.parent),
            "is_locked": _is_locked(folder / LOCK),
        }
        if self.tracking_uri:
            seen["tracking"] = dataclasses.asdict(check_store(self.tracking_uri, self.experiment))
        return seen | _gpus()


def _is_locked(lock: Path) -> bool:
    try:
        FileLock(lock).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def _gpus() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that the node lacks
        return {"torch": "", "trouble": str(error), "gpus": []}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "trouble": "", "gpus": names}


def probe(runs: Path, profile: Profile, uri: str, experiment: str) -> Iterator[Check]:
    """Send a job to look around, wait for its report, judge it; leaves nothing behind."""
    with scratch_folder(runs, "doctor") as folder:
        question, code = secrets.token_hex(8), snapshot(runs)
        (folder / QUESTION).write_text(question)
        task = ProbeTask(str(folder), uri, experiment)
        wanted = SlurmJobs([task], shortened(profile, MINUTES), folder / "jobs", code.path)
        with FileLock(folder / LOCK, timeout=5):
            try:
                ((_, job),) = next(wanted.submit())
            except slurm.SlurmError as error:
                yield Check("job", "FAIL", str(error), "change the profile")
                return
            try:
                trouble = wait(job, folder / REPORT)
            finally:
                end_slurm_jobs([job.job_id])
        if trouble is not None:
            yield trouble
            return
        yield from judge(read_json(folder / REPORT), question, str(code.path), profile)


def wait(job: Submitted, report: Path) -> Check | None:
    """Wait for the report; what is wrong where there is none."""
    start, ended = time.monotonic(), 0.0
    while not report.exists():
        now = time.monotonic()
        state = slurm.job_states([job.job_id], ended=False).get(job.job_id)
        if state is None:
            ended = ended or now
            if now > ended + ARRIVAL_S:
                return _without_report(job)
        elif state.state == "PENDING" and now > start + QUEUE_S:
            expected = (
                f", expected to start {state.start}" if state.start not in ("", "N/A") else ""
            )
            found = f"pending for {QUEUE_S:.0f} s ({state.reason}){expected}; cancelled"
            mend = "when nodes are free, or with a profile that starts sooner (sinfo, squeue)"
            return Check("job", "warning", found, f"repeat doctor --probe {mend}")
        time.sleep(POLL_S)
    return None


def _without_report(job: Submitted) -> Check:
    mend = (
        "its code, Python and the runs folder must be on a disk that nodes share; see the profile"
    )
    if job.stderr.exists():
        found = f"ended without a report: {last_line(job.stderr.read_text(errors='replace'))}"
    else:
        found = "ended, and neither report nor log are to be seen here"
    return Check("job", "FAIL", found, mend)


def judge(seen: dict[str, Any], question: str, code: str, profile: Profile) -> Iterator[Check]:
    """What the report means, check by check."""
    yield Check("job", "ok", f"ran on {seen['host']}, Python {seen['python']}")
    if seen["answer"] == question:
        yield Check("job: disk", "ok", "reads and writes the runs folder")
    else:
        mend = "jobs and this machine must share one disk: another --runs"
        yield Check("job: disk", "FAIL", "reads something else in the runs folder", mend)
    yield _code(seen["code"], code)
    if seen["is_locked"]:
        yield Check("job: locks", "ok", "a lock that is held here holds there")
    else:
        mend = "mount the disk with locks for all nodes; until then start no run twice"
        yield Check("job: locks", "warning", "a lock that is held here does not hold there", mend)
    yield _devices(seen, profile.gpus_per_node)
    if "tracking" in seen:
        found = Check(**seen["tracking"])
        yield dataclasses.replace(found, name=f"job: {found.name}")


def _code(seen: str, code: str) -> Check:
    if Path(seen).resolve() == Path(code).resolve():
        return Check("job: code", "ok", "is the copy that the launch made")
    mend = "let the profile's setup and python keep PYTHONPATH and PYTHONSAFEPATH"
    return Check("job: code", "FAIL", f"is that of {seen}, not the launch's copy {code}", mend)


def _devices(seen: dict[str, Any], wanted: int) -> Check:
    name, names = "job: GPUs", seen["gpus"]
    if not seen["torch"]:
        mend = "give the profile the setup lines or the python that have torch"
        return Check(name, "FAIL", f"cannot import torch: {seen['trouble']}", mend)
    if len(names) < wanted:
        mend = "take a torch for the nodes' driver, or gpus = 0 in the profile"
        found = f"torch {seen['torch']} sees {len(names)} of the {wanted} asked for"
        return Check(name, "FAIL", found, mend)
    return Check(name, "ok", ", ".join(names) or f"none asked for; torch {seen['torch']}")
