"""Why jobs failed, from what Slurm 22.05, submitit and Python really write."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import submitted
from tiny import tiny

from colddiff.run_folder import RunFolder
from jobs.diagnosis import Diagnosis, diagnose, diagnose_folder
from jobs.job_logs import end_of, log_files
from jobs.ledger import Entry
from jobs.slurm import JobState
from jobs.states import Job, Phase

WORK = "2026-11-23 18:40:01 step 20/3000: loss 0.3012, 410 images/s"
TRACEBACK = """\
submitit ERROR (2026-11-23 18:41:00,123) - Submitted job triggered an exception
Traceback (most recent call last):
  File "/usr/lib/python3.11/runpy.py", line 196, in _run_module_as_main
    return _run_code(code, main_globals, None,
  File "/site/submitit/core/submission.py", line 72, in process_job
    raise error
  File "/site/submitit/core/submission.py", line 55, in process_job
    result = delayed.result()
  File "/code/jobs/tasks.py", line 61, in __call__
    return self.work(folder, stop, ranks)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/code/colddiff/data.py", line 90, in load_images
    raise ValueError("no images")
ValueError: no images below /data
srun: error: c1: task 0: Exited with exit code 1
"""
OVER_MEMORY = """\
slurmstepd-c1: error: StepId=136.0 exceeded memory limit (642633728 > 209715200), being killed
slurmstepd-c1: error: *** STEP 136.0 ON c1 CANCELLED AT 2026-11-23T18:48:35 ***
slurmstepd-c1: error: Exceeded job memory limit
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: c1: task 0: Killed
"""
OOM_KILL = """\
slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM \
Killed.
srun: error: c1: task 0: Out Of Memory
"""
PREEMPTED = (
    "slurmstepd-c1: error: *** STEP 65.0 ON c1 CANCELLED AT 2026-11-23T18:38:29 DUE TO %s ***"
)
CUDA = """\
Traceback (most recent call last):
  File "/code/colddiff/unet.py", line 1, in forward
    x = self.conv(x)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", tiny())


def slurm_job(entry: Entry, state: str, **values: str) -> Job:
    return Job(entry, "ended", JobState(entry.job_id, state, **({"nodes": "c1"} | values)))


def found(job: Job, folder: RunFolder) -> Diagnosis:
    diagnosis = diagnose(job, folder)
    assert diagnosis is not None
    return diagnosis


@pytest.mark.parametrize(
    ("state", "code", "log", "cause", "text", "advice"),
    [
        ("OUT_OF_MEMORY", "0:125", OOM_KILL, "out of memory", "asked for 32G", "--mem 64G"),
        ("FAILED", "9:0", OVER_MEMORY, "out of memory", "exceeded memory limit", "--mem 64G"),
        ("CANCELLED", "0:0", OVER_MEMORY, "out of memory", "exceeded memory", "--mem 64G"),
        ("FAILED", "1:0", OOM_KILL, "out of memory", "oom_kill event", "--mem 64G"),
        ("FAILED", "1:0", CUDA, "out of memory", "CUDA out of memory", "gres=gpu"),
        ("FAILED", "1:0", "MemoryError\n", "out of memory", "MemoryError", "--mem 64G"),
        (
            "FAILED",
            "1:0",
            "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough "
            "memory: you tried to allocate 4000000000000 bytes.\n",
            "out of memory",
            "not enough memory",
            "--mem 64G",
        ),
        ("TIMEOUT", "0:0", WORK, "timeout", "time limit of 4:00:00", "--time 8:00:00"),
        ("DEADLINE", "0:0", "", "timeout", "time limit", "--time 8:00:00"),
        ("PREEMPTED", "0:0", PREEMPTED % "PREEMPTION", "preempted", "on c1", "retry"),
        ("NODE_FAIL", "0:0", "", "node failure", "on c1", "retry"),
        ("BOOT_FAIL", "0:0", "", "node failure", "on c1", "retry"),
        ("FAILED", "1:0", TRACEBACK, "exception", "ValueError: no images below /data", "retry"),
        ("FAILED", "1:0", "OSError: [Errno 28] No space left on device", "exception", "", "room"),
        ("FAILED", "0:9", WORK, "unknown", "SIGKILL", "--mem 64G"),
        ("FAILED", "9:0", WORK, "unknown", "SIGKILL", "--mem 64G"),
        ("FAILED", "137:0", WORK, "unknown", "SIGKILL", "--mem 64G"),
        ("FAILED", "139:0", WORK, "unknown", "SIGSEGV", "logs"),
        ("FAILED", "15:0", WORK, "unknown", "SIGTERM", "retry"),
        ("FAILED", "3:0", WORK, "unknown", "exit code 3", "logs"),
        ("CANCELLED", "0:0", WORK, "cancelled", "not by this suite", "retry"),
        ("CANCELLED", "0:0", TRACEBACK, "cancelled", "not by this suite", "retry"),
    ],
)
def test_slurm_jobs(
    folder: RunFolder, state: str, code: str, log: str, cause: str, text: str, advice: str
) -> None:
    entry = submitted(folder)
    Path(entry.stderr).write_text(f"{WORK}\n{log}")
    diagnosis = found(slurm_job(entry, state, exit_code=code), folder)
    assert diagnosis.cause == cause
    assert text in diagnosis.text and advice in diagnosis.advice
    assert folder.path.name in diagnosis.advice


def test_the_trace_ends_with_the_exception_and_has_the_frames_before_it(
    folder: RunFolder,
) -> None:
    entry = submitted(folder)
    Path(entry.stderr).write_text(f"{WORK}\n{TRACEBACK}")
    trace = found(slurm_job(entry, "FAILED", exit_code="1:0"), folder).trace
    assert [line.strip() for line in trace] == [
        "result = delayed.result()",
        'File "/code/jobs/tasks.py", line 61, in __call__',
        "return self.work(folder, stop, ranks)",
        'File "/code/colddiff/data.py", line 90, in load_images',
        'raise ValueError("no images")',
        "ValueError: no images below /data",
    ]


def test_a_real_traceback_of_a_chained_exception(folder: RunFolder) -> None:
    entry = submitted(folder)
    code = "try: {}['a']\nexcept KeyError as e: raise RuntimeError('two\\nlines') from e"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    Path(entry.stderr).write_text(done.stderr)
    diagnosis = found(slurm_job(entry, "FAILED", exit_code="1:0"), folder)
    assert (diagnosis.cause, diagnosis.text) == ("exception", "RuntimeError: two")


@pytest.mark.parametrize("state", ["FAILED", "unknown"])
@pytest.mark.parametrize(
    "earlier",
    [
        PREEMPTED % "PREEMPTION",
        PREEMPTED % "TIME LIMIT",
        PREEMPTED % "JOB REQUEUE",
        f"{TRACEBACK}{PREEMPTED % 'NODE FAILURE'}",
        f"{OVER_MEMORY}{PREEMPTED % 'NODE FAILURE'}",
    ],
)
def test_only_the_last_attempt_counts(folder: RunFolder, earlier: str, state: str) -> None:
    """Slurm appends to the log of a job that it starts again."""
    entry = submitted(folder)
    resumed = WORK.replace("18:40", "18:50")
    path = Path(entry.stderr)
    ended = slurm_job(entry, "FAILED", exit_code="3:0")
    job = ended if state == "FAILED" else Job(entry, "unknown")
    path.write_text(f"{WORK}\n{earlier}\n{resumed}\n")
    diagnosis = found(job, folder)
    assert (diagnosis.cause, diagnosis.trace) == ("unknown", ())
    path.write_text(
        f"{WORK}\n{earlier}\n{resumed}\nTraceback (most recent call last):\n  f\nEOFError: e\n"
    )
    assert found(job, folder).text == "EOFError: e"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (PREEMPTED % "TIME LIMIT", "timeout"),
        (PREEMPTED % "PREEMPTION", "preempted"),
        (PREEMPTED % "NODE FAILURE", "node failure"),
        (OVER_MEMORY, "out of memory"),
        (TRACEBACK, "exception"),
        ("", "unknown"),
    ],
)
def test_without_accounting_the_log_tells(folder: RunFolder, log: str, cause: str) -> None:
    entry = submitted(folder)
    Path(entry.stderr).write_text(f"{WORK}\n{log}\n")
    assert found(Job(entry, "unknown"), folder).cause == cause


def test_the_rank_that_failed_by_itself_is_shown(folder: RunFolder) -> None:
    entry = submitted(folder)
    lost = (
        "Traceback (most recent call last):\n  f\nRuntimeError: [gloo] Connection closed by peer\n"
    )
    for rank, log in enumerate([lost, lost, TRACEBACK, lost]):
        Path(entry.stderr.replace("_0_log", f"_{rank}_log")).write_text(log)
    job = slurm_job(entry, "FAILED", exit_code="1:0")
    assert found(job, folder).text == "ValueError: no images below /data"
    Path(entry.stderr.replace("_0_log", "_2_log")).write_text(lost)
    assert "Connection closed" in found(job, folder).text


def test_too_many_time_limits(folder: RunFolder) -> None:
    entry = submitted(folder)
    entry = dataclasses.replace(entry, profile={**entry.profile, "max_requeues": 5})
    Path(entry.stderr).write_text(
        f"{TRACEBACK}{WORK}\nTraceback (most recent call last):\n  frame\n"
        "submitit.core.utils.UncompletedJobError: Job not requeued because: timed-out too many "
        "times.\n"
    )
    diagnosis = found(slurm_job(entry, "FAILED", exit_code="1:0"), folder)
    assert diagnosis.cause == "timeout" and "max_requeues = 5" in diagnosis.text


def test_requests_and_chains(folder: RunFolder) -> None:
    entry = submitted(folder)
    cancelled = dataclasses.replace(entry, event="cancelled")
    assert found(slurm_job(cancelled, "CANCELLED"), folder).text == "cancelled on request"
    never = slurm_job(entry, "CANCELLED", reason="DependencyNeverSatisfied", nodes="")
    assert found(never, folder).cause == "dependency"
    assert found(slurm_job(entry, "CANCELLED", reason="Dependency"), folder).cause == "dependency"
    for phase, state, reason in (
        ("queued", "PENDING", "Priority"),
        ("running", "RUNNING", ""),
        ("ended", "COMPLETED", ""),
    ):
        fine: Phase = phase  # type: ignore[assignment]
        assert diagnose(Job(entry, fine, JobState("12", state, reason)), folder) is None
    waits = Job(entry, "queued", JobState("12", "PENDING", "DependencyNeverSatisfied"))
    assert found(waits, folder).cause == "dependency"


def test_the_run_folder_tells_what_the_log_does_not(folder: RunFolder) -> None:
    entry = submitted(folder, time_ms=1000)
    failed = slurm_job(entry, "FAILED", exit_code="1:0")
    folder.write_status("failed", 5, 30, "NonFiniteError: the loss is nan")
    assert found(failed, folder).text == "NonFiniteError: the loss is nan"
    later = dataclasses.replace(entry, time_ms=2**60)  # the message is of an older job
    assert found(slurm_job(later, "FAILED", exit_code="1:0"), folder).cause == "unknown"
    folder.write_status("interrupted", 5, 30, "stopped by SIGTERM at step 5")
    assert found(failed, folder).text == "stopped by SIGTERM at step 5"
    folder.write_status("failed", 5, 30, "OutOfMemoryError: CUDA out of memory. Tried")
    diagnosis = diagnose_folder(folder)
    assert diagnosis is not None and diagnosis.cause == "out of memory"


@pytest.mark.parametrize("status", ["running", None])
def test_local_jobs(folder: RunFolder, status: Any) -> None:
    jobs = folder.path.parent / "jobs" / "local-0a1b2c3d"
    (jobs / "0").mkdir(parents=True)
    log = jobs / "0" / "4711_0_log.err"
    (jobs / "0.err").symlink_to("0/4711_0_log.err")  # as the queue links them
    entry = submitted(
        folder, "local-0a1b2c3d-0", cluster="local", stderr=str(jobs / "0.err"), profile={}
    )
    if status:
        folder.write_status(status, 5, 30)
    job = Job(entry, "ended")
    assert "gone without a word" in found(job, folder).text  # before its log is there
    log.write_text(TRACEBACK)
    assert log_files(entry) == [log]
    assert found(job, folder).text == "ValueError: no images below /data"
    log.write_text("MemoryError\n")
    diagnosis = found(job, folder)
    assert diagnosis.cause == "out of memory" and "--mem" not in diagnosis.advice


def test_ends_of_logs(tmp_path: Path) -> None:
    lines = [f"line {number} {'x' * 90}" for number in range(5000)]
    path = tmp_path / "log"
    path.write_text("\n".join(lines) + "\n")
    assert end_of(path, 3) == lines[-3:]
    assert end_of(path, 4000) == lines[-4000:]
    assert end_of(path, 9000) == lines
    assert end_of(path, 0) == []
    some = end_of(path)
    assert some == lines[-len(some) :] and 0 < len("".join(some)) <= 64 * 1024
    path.write_bytes(b"\xff torn")
    assert end_of(path, 5) == ["\ufffd torn"]
