"""The process a task runs in: its rank, its signals, and how it leaves."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import sys
import time
from pathlib import Path
from signal import SIGTERM, SIGUSR2
from typing import Any

from colddiff.interruption import StopRequest
from colddiff.ranks import Ranks
from jobs import slurm
from jobs.ledger import Ledger

log = logging.getLogger("colddiff.jobs")
GRACE_S = {int(SIGUSR2): 20.0, int(SIGTERM): 2.0}
"""How long a job that was told to go sends its record: USR2 comes a minute or more ahead, after
TERM some sites kill within seconds."""
LEAVE_TOGETHER_S = 300.0
PACKED = "COLDDIFF_PACKED"
"""Set in the processes of a pack, whose parent deals with the scheduler."""


def in_submitit() -> bool:
    """Whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ and "SUBMITIT_FOLDER" in os.environ


def ranks() -> Ranks:
    """This process's place among the job's processes; a single one outside submitit."""
    if not in_submitit():
        return Ranks()
    import submitit

    job = submitit.JobEnvironment()
    if job.num_tasks == 1:
        return Ranks()
    # The same on every rank, another one for every job that may share the node.
    port = random.Random(job.job_id).randint(20000, 32000)
    return Ranks(
        rank=job.global_rank,
        world_size=job.num_tasks,
        local_rank=job.local_rank,
        address=f"{_address(job.hostnames[0])}:{port}",
    )


def _address(host: str) -> str:
    """The node's address; Slurm's names need not be known to the resolver."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:
        found = re.search(r"NodeAddr=(\S+)", slurm.node(host))
        return found[1] if found else host
    return host


def restarts() -> int:
    """How often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def process() -> dict[str, Any]:
    """Who this is."""
    values: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
    if in_submitit():
        import submitit

        values["job_id"] = submitit.JobEnvironment().job_id
        values["cluster"] = os.environ["SUBMITIT_EXECUTOR"]
    return values


def seconds_to_leave(signum: int | None) -> float:
    """How long a process may take to send the rest of its record."""
    return 30.0 if signum is None or not in_submitit() else GRACE_S.get(signum, 10.0)


def leave(stop: StopRequest, signum: int, runs: Path) -> None:
    """End an interrupted job as its scheduler expects; does nothing outside of submitit.

    ``runs`` has the ledger, which tells whether the job was cancelled while it saved: that must
    not requeue it.

    USR2 announces a time limit: submitit's own handler, which ``stop`` replaced, requeues the job.
    Only now, when everything is saved, may it run. TERM means that the scheduler takes the job off:
    Slurm requeues what it preempts, and any other exit than 143 would look like a success or like
    the job's own failure.
    """
    if PACKED in os.environ:
        sys.exit(128 + signum)
    if not in_submitit():
        return
    if signum == SIGUSR2 and Ledger(runs).is_cancelled(str(process()["job_id"])):
        signum = SIGTERM
    if signum != SIGUSR2:
        sys.exit(128 + signum)
    if ranks().is_main:
        _remove_torn_pickle()
        handler = stop.previous[SIGUSR2]
        assert callable(handler), "submitit installs a handler for USR2"
        handler(SIGUSR2, None)  # does not return
    # The requeueing kills all ranks. One that left before it would take rank 0 along with it.
    if os.environ["SUBMITIT_EXECUTOR"] == "slurm":
        time.sleep(LEAVE_TOGETHER_S)
    sys.exit(128 + signum)


def set_up_logging() -> None:
    """Lines of this suite into the job's log, with their time; no-op where there are handlers."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("colddiff").setLevel(logging.INFO)
    logging.getLogger("submitit").propagate = False  # it has a handler of its own


def _remove_torn_pickle() -> None:
    """A killed requeueing leaves a temporary file with which submitit refuses every later one."""
    import submitit

    pickle: Path = submitit.JobEnvironment().paths.submitted_pickle
    for torn in pickle.parent.glob(f"{pickle.name}.save_tmp*"):
        torn.unlink(missing_ok=True)
