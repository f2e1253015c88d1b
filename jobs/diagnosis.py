"""Why a job ended as it did, from Slurm's word, its logs and the run folder; and what to do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from colddiff.run_folder import RunFolder
from jobs.job_logs import LOG_LINE, last_attempt, log_files
from jobs.profile_values import to_minutes
from jobs.states import Job

Cause = Literal[
    "out of memory",
    "timeout",
    "preempted",
    "node failure",
    "exception",
    "cancelled",
    "dependency",
    "unknown",
]
TRACE_LINES = 5
SIGNALS = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}
GPU_MEMORY = re.compile(r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|HIP out of memory")
MEMORY = re.compile(
    r"oom[-_ ]kill|exceeded (job |step )?memory limit|\bMemoryError\b|: Out Of Memory|"
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|"
    r"Unable to allocate .* for an array",
    re.IGNORECASE,
)
DISK = re.compile(r"No space left on device|Disk quota exceeded")
TOO_OFTEN = re.compile(r"Job not requeued because: timed-out")
REMOVED = re.compile(r"CANCELLED AT \S+ DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE)")
SECONDARY = re.compile(r"NCCL|gloo|Dist\w*Error|Connection (closed|reset)|Broken pipe", re.I)
"""Errors of ranks that only lost another one."""


@dataclass(frozen=True)
class Diagnosis:
    """Why a job failed."""

    cause: Cause
    text: str
    """One or two lines for people."""
    advice: str = ""
    """What to do: a command of ``launch.py``, or a sentence."""
    trace: tuple[str, ...] = ()
    """The end of the traceback, the exception last."""

    @property
    def is_hopeless(self) -> bool:
        """Whether the same again would very likely fail again."""
        return self.cause in ("out of memory", "timeout")


def diagnose(job: Job, folder: RunFolder) -> Diagnosis | None:
    """Why the job ended; None for one that is queued, runs, or ended well as far as is known.

    Whether the run is complete is not asked: do not call this for a job whose work is done.
    """
    entry, state = job.entry, job.slurm
    if job.is_living:
        never = state is not None and state.reason == "DependencyNeverSatisfied"
        return _dependency(entry.run) if never else None
    if entry.event == "cancelled":
        advice = f"train, or retry {entry.run}, takes it up again"
        return Diagnosis("cancelled", "cancelled on request", advice)
    if state and state.state == "COMPLETED":
        return None
    logs = [last_attempt(path) for path in log_files(entry)]
    found = _by_slurm(job, logs) or _by_log(job, logs) or _by_folder(job, folder)
    return found or _by_exit(job, folder)


def diagnose_folder(folder: RunFolder) -> Diagnosis | None:
    """Why a run failed that no job is known of."""
    status = folder.status()
    if status is None or status.state != "failed":
        return None
    return _exception(folder.path.name, status.message)


def _by_slurm(job: Job, logs: Sequence[Sequence[str]]) -> Diagnosis | None:
    """Where Slurm's word is enough."""
    run, state = job.entry.run, job.slurm
    where = f" on {state.nodes}" if state and state.nodes else ""
    match state.state if state else "":
        case "OUT_OF_MEMORY":
            return _gpu_memory(run, logs) or _memory(job, f"out of memory{where}")
        case "TIMEOUT" | "DEADLINE":
            return _timeout(job)
        case "PREEMPTED":
            return _preempted(run, where)
        case "NODE_FAIL" | "BOOT_FAIL":
            return _node_failure(run, where)
        case "CANCELLED" if state and state.reason.startswith("Dependency"):
            return _dependency(run)
        case "CANCELLED":
            text = f"cancelled{where}, but not by this suite: with scancel, or by the site"
            cancelled = Diagnosis("cancelled", text, f"retry {run}")
            # Some sites cancel what takes too much memory or time.
            by_log = _by_log(job, logs)
            return by_log if by_log and by_log.cause != "exception" else cancelled
    return None


def _by_log(job: Job, logs: Sequence[Sequence[str]]) -> Diagnosis | None:
    run, profile = job.entry.run, job.entry.profile
    lines = [line for log in logs for line in log if not LOG_LINE.match(line)]
    if any(TOO_OFTEN.search(line) for line in lines):
        text = f"requeued at its time limit more than max_requeues = {profile.get('max_requeues')}"
        return dataclasses.replace(_timeout(job), text=f"{text} times")
    for line in lines:
        if MEMORY.search(line) and not GPU_MEMORY.search(line):
            return _gpu_memory(run, logs) or _memory(job, _shortened(line), _trace(logs))
    trace = _trace(logs)
    if trace:
        return _exception(run, trace[-1], trace)
    removed = [match[1] for line in lines if (match := REMOVED.search(line))]
    match removed[-1] if removed else "":
        case "TIME LIMIT":
            return _timeout(job)
        case "PREEMPTION":
            return _preempted(run, "")
        case "NODE FAILURE":
            return _node_failure(run, "")
    full = [line for line in lines if DISK.search(line)]
    return _exception(run, full[-1]) if full else None


def _by_folder(job: Job, folder: RunFolder) -> Diagnosis | None:
    status = folder.status()
    if status is None or status.state != "failed" or status.updated_ms < job.entry.time_ms:
        return None  # of another job
    return _exception(job.entry.run, status.message)


def _by_exit(job: Job, folder: RunFolder) -> Diagnosis:
    """What is left: an exit code, or nothing at all."""
    run, state, status = job.entry.run, job.slurm, folder.status()
    code, _, signal = (state.exit_code if state else "").partition(":")
    # A shell reports a signal as 128 + n, which Slurm takes for the signal n, or for exit code n.
    number = int(signal or 0) or int(code or 0) % 128
    if status and status.state == "interrupted" and status.updated_ms >= job.entry.time_ms:
        return Diagnosis("unknown", status.message, f"retry {run}")
    if number == 9:
        text = "killed (SIGKILL) without a word: often too little memory, or the node"
        return Diagnosis("unknown", text, f"retry {run} {_more_memory(job)}".rstrip())
    if number in SIGNALS:
        return Diagnosis("unknown", f"ended by {SIGNALS[number]}", f"logs {run}, then retry {run}")
    if state and state.state == "FAILED" and not state.nodes:
        return Diagnosis("unknown", "Slurm never started it", f"retry {run} with other resources")
    if number:
        return Diagnosis("unknown", f"ended with exit code {code}", f"logs {run}, then retry {run}")
    text = "its job is gone without a word: killed, or the machine was restarted"
    return Diagnosis("unknown", text, f"retry {run}")


def _memory(job: Job, text: str, trace: tuple[str, ...] = ()) -> Diagnosis:
    if job.entry.cluster == "local":
        advice = f"retry {job.entry.run} when this machine has more memory free"
    else:
        asked = job.entry.profile.get("mem")
        text += f"; it had asked for {asked}" if asked else ""
        advice = f"retry {job.entry.run} {_more_memory(job) or '--mem SIZE'}"
    return Diagnosis("out of memory", text, advice, trace)


def _gpu_memory(run: str, logs: Sequence[Sequence[str]]) -> Diagnosis | None:
    lines = [line for log in logs for line in log if GPU_MEMORY.search(line)]
    return _exception(run, lines[-1], _trace(logs)) if lines else None


def _timeout(job: Job) -> Diagnosis:
    asked = str(job.entry.profile.get("time", ""))
    minutes = 2 * (to_minutes(asked) or 0)
    more = f"{minutes // 60}:{minutes % 60:02d}:00" if minutes else "TIME"
    text = f"the time limit{f' of {asked}' if asked else ''} came before the state was saved"
    return Diagnosis("timeout", text, f"retry {job.entry.run} --time {more}")


def _preempted(run: str, where: str) -> Diagnosis:
    text = f"another job took its place{where}, and Slurm did not queue it again"
    return Diagnosis("preempted", text, f"retry {run}")


def _node_failure(run: str, where: str) -> Diagnosis:
    return Diagnosis("node failure", f"its node failed{where}", f"retry {run}")


def _dependency(run: str) -> Diagnosis:
    text = "what it was to follow did not succeed"
    return Diagnosis("dependency", text, "retry, without a name: takes up all of the chain")


def _exception(run: str, line: str, trace: tuple[str, ...] = ()) -> Diagnosis:
    """From an exception's line, as a traceback ends with."""
    if GPU_MEMORY.search(line):
        advice = f"retry {run} --sbatch gres=gpu:TYPE:1 for a larger GPU"
        return Diagnosis("out of memory", _shortened(line), advice, trace)
    if MEMORY.search(line):
        return Diagnosis("out of memory", _shortened(line), f"retry {run} --mem SIZE", trace)
    advice = f"make room on the disk, then retry {run}" if DISK.search(line) else ""
    return Diagnosis("exception", _shortened(line), advice or f"logs {run}; retry {run}", trace)


def _more_memory(job: Job) -> str:
    """The option that asks for twice as much; empty where that cannot be told."""
    asked = re.fullmatch(r"(\d+)([KMGT]?)B?", str(job.entry.profile.get("mem", "")), re.IGNORECASE)
    return f"--mem {2 * int(asked[1])}{asked[2]}" if asked and int(asked[1]) else ""


def _trace(logs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The end of the last traceback, of the rank that failed first as far as can be told."""
    found = [trace for trace in map(_last_trace, logs) if trace]
    own = [trace for trace in found if not SECONDARY.search(trace[-1])]
    return (own or found or [()])[0]


def _last_trace(log: Sequence[str]) -> tuple[str, ...]:
    starts = [i for i, line in enumerate(log) if line.startswith("Traceback (most recent")]
    if not starts:
        return ()
    after = log[starts[-1] + 1 :]
    end = next((i for i, line in enumerate(after) if line[:1].strip()), None)
    if end is None:
        return ()  # torn
    frames = [line for line in after[:end] if line.strip(" ^~")]
    return (*frames[-TRACE_LINES:], after[end])


def _shortened(line: str) -> str:
    line = re.sub(r"^(slurmstepd|srun)[^:]*: (error: )?", "", line.strip())
    return line if len(line) <= 200 else f"{line[:200]}…"
