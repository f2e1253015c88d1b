"""Take jobs off their schedulers, and keep a record of who ended them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jobs import slurm
from jobs.ledger import Ledger
from jobs.states import Job


def cancel_jobs(runs: Path, jobs: Sequence[Job]) -> None:
    """Cancel living jobs; those that run save and end soon after, with all runs that share them.

    Raises:
        slurm.SlurmError: where Slurm refuses or cannot be asked; local jobs are cancelled then.
        ProcessLookupError: for a local job of another machine.
    """
    from jobs.local.queue import cancel_locally

    local = [job for job in jobs if job.entry.cluster == "local"]
    if local:
        cancel_locally(runs, [job.entry.job_id for job in local])
        _record(runs, local)
    others = [job for job in jobs if job.entry.cluster == "slurm"]
    if others:
        slurm.cancel([job.entry.job_id for job in others])
        _record(runs, others)


def _record(runs: Path, jobs: Sequence[Job]) -> None:
    ledger, ids = Ledger(runs), {job.entry.job_id for job in jobs}
    # Runs that share a job end together.
    entries = [entry for entry in ledger.latest_of_each_work() if entry.job_id in ids]
    ledger.append([dataclasses.replace(each, event="cancelled", time_ms=0) for each in entries])
