"""Questions to Slurm and orders to it, through its own commands.

The living are asked of squeue, which knows at once; the dead of sacct, which a site may lack and
which lags behind. Every answer is a plain record; what it means for a run is decided elsewhere.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("colddiff.jobs")
COMMAND_TIMEOUT_S = 60
IDS_PER_CALL = 500
SACCT_FIELDS = "JobID State ExitCode NodeList Elapsed ReqMem Timelimit Reason".split()
SQUEUE_FIELDS = ("%i", "%T", "%r", "%N", "%S", "%V")
LIVING = frozenset(
    "PENDING RUNNING SUSPENDED COMPLETING CONFIGURING RESIZING REQUEUED REQUEUE_FED "
    "REQUEUE_HOLD SIGNALING STAGE_OUT STOPPED SPECIAL_EXIT RESV_DEL_HOLD".split()
)


class SlurmError(RuntimeError):
    """Slurm refused, or cannot be reached; the message is Slurm's own."""


class RefusedError(SlurmError, ValueError):
    """Slurm does not take a job as it is asked for: the user's mistake, in Slurm's words."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    job_id: str
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, …"""
    reason: str = ""
    """Why it is pending, or what it was waiting for when it ended."""
    nodes: str = ""
    exit_code: str = ""
    """``code:signal``, of a job that has ended."""
    start: str = ""
    """When it started, or is expected to."""
    elapsed: str = ""
    memory: str = ""
    """Requested."""
    time_limit: str = ""

    @property
    def is_living(self) -> bool:
        """Whether it is queued or running."""
        return self.state in LIVING


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def job_states(job_ids: Iterable[str], *, ended: bool = True) -> dict[str, JobState]:
    """The states of jobs (``12`` or ``12_3``); unknown ones are left out.

    Args:
        job_ids: as submitit names them.
        ended: also ask sacct for those that squeue does not know.

    Raises:
        SlurmError: where Slurm cannot be reached.
    """
    wanted = list(dict.fromkeys(job_ids))
    seen: dict[str, JobState] = {}
    for part in _parts(wanted):
        seen |= {s.job_id: s for s in _squeue(part) if s.job_id in part}
    if not ended:
        return {job_id: state for job_id, state in seen.items() if state.is_living}
    rest = [job_id for job_id in wanted if job_id not in seen or not seen[job_id].is_living]
    for part in _parts(rest):
        # sacct lags behind, and may take a job for running for ever that a crash of Slurm lost.
        ends = [s for s in _sacct(part) if s.job_id in part and not s.is_living]
        seen |= {s.job_id: s for s in ends}
    return seen


def settings() -> dict[str, str]:
    """``scontrol show config`` as a dictionary; raises ``SlurmError``."""
    lines = run("scontrol", "show", "config").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def max_array_size() -> int:
    """Most elements that one job array may have; raises ``SlurmError``."""
    return int(settings().get("MaxArraySize", "1001"))


def node(name: str) -> str:
    """``scontrol show node``; raises ``SlurmError``."""
    return run("scontrol", "show", "node", name)


def try_submission(script: Path) -> str:
    """``sbatch --test-only``: when and where the job would start, in Slurm's words.

    Raises:
        RefusedError: where Slurm would refuse the job, or never start it.
    """
    done = _call("sbatch", "--test-only", str(script))
    text = words(done.stderr or done.stdout)
    if done.returncode:
        raise RefusedError(f"Slurm refuses the job: {text}")
    return text


def time_limit(partition: str) -> str:
    """The longest time of a partition's jobs (the default one's for ""), as sinfo writes it."""
    lines = run("sinfo", "--noheader", "--format=%P|%l").splitlines()
    limits = dict(line.strip().split("|") for line in lines)
    default = next((name.rstrip("*") for name in limits if name.endswith("*")), "")
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    return limits.get(partition or default, "infinite")


def cancel(job_ids: Sequence[str]) -> None:
    """``scancel``; jobs that have ended are left alone. Raises ``SlurmError``."""
    for part in _parts(job_ids):
        run("scancel", *part)


def start_now(job_ids: Iterable[str]) -> list[str]:
    """Skip the two minutes that Slurm lets a requeued job wait; the ids for which that worked.

    Only for jobs that are pending with the reason BeginTime. While one is still completing, Slurm
    forgets the order, and within a second after it the node may refuse the job: hence the 3 s.
    """
    return [
        job_id
        for job_id in job_ids
        if _call("scontrol", "update", f"JobId={job_id}", "StartTime=now+3").returncode == 0
    ]


def has_accounting() -> bool:
    """Whether sacct answers."""
    return _call("sacct", "--noheader", "--starttime=now-1minutes").returncode == 0


def _squeue(job_ids: Sequence[str]) -> Iterator[JobState]:
    # Whole arrays: squeue refuses a list with a single id that it does not know any more, but it
    # leaves out unknown ones among several.
    bases = sorted({job_id.partition("_")[0] for job_id in job_ids})
    form = "|".join(SQUEUE_FIELDS)
    arguments = ("--array", "--noheader", "--states=all", f"--format={form}")
    done = _call("squeue", *arguments, "--jobs=" + ",".join(bases))
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return
        raise SlurmError(words(done.stderr))
    for line in done.stdout.splitlines():
        job_id, state, reason, nodes, start, _ = line.strip().split("|")
        yield JobState(job_id, state, "" if reason == "None" else reason, nodes, start=start)


def _sacct(job_ids: Sequence[str]) -> Iterator[JobState]:
    form = ",".join(SACCT_FIELDS)
    arguments = ("-X", "--parsable2", "--noheader", f"--format={form}", "--starttime=now-365days")
    # Whole arrays: elements that never started have no line of their own.
    bases = sorted({job_id.partition("_")[0] for job_id in job_ids})
    done = _call("sacct", *arguments, "--jobs=" + ",".join(bases))
    if done.returncode:
        log.debug("sacct: %s", done.stderr.strip())
        return  # no accounting: what has ended is judged by the run folder alone
    for line in done.stdout.splitlines():
        names, state, exit_code, nodes, elapsed, memory, limit, reason = line.split("|")
        for job_id in elements(names):
            yield JobState(
                job_id,
                state.split(" ", 1)[0],  # CANCELLED by 0
                "" if reason == "None" else reason,
                nodes="" if nodes == "None assigned" else nodes,
                exit_code=exit_code,
                elapsed=elapsed,
                memory=memory,
                time_limit=limit,
            )


def elements(name: str) -> list[str]:
    """The jobs that Slurm means by ``12_[3,5-7%2]``; the name itself where it is of one job."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if found is None:
        return [name]
    numbers: list[int] = []
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{found[1]}_{number}" for number in numbers]


def _parts(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(job_ids), IDS_PER_CALL):
        yield job_ids[start : start + IDS_PER_CALL]


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not there: is this a login node of a cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer in {COMMAND_TIMEOUT_S} s") from None


def run(*command: str) -> str:
    """What one of Slurm's commands prints; raises ``SlurmError`` in its own words."""
    done = _call(*command)
    if done.returncode:
        raise SlurmError(words(done.stderr) or f"{command[0]} failed")
    return done.stdout


def words(text: str) -> str:
    """A message of Slurm without the names of its commands."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))
