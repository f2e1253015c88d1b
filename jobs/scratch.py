"""Folders and jobs that a command makes for itself, and takes away however it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs import slurm
from jobs.profiles import Profile

END_TIMEOUT_S = 90.0
"""KillWait, and what the nodes take to clean up."""
REMOVAL_TRIES = 20


@contextlib.contextmanager
def scratch_folder(runs: Path, name: str, *, keep: bool = False) -> Iterator[Path]:
    """``<runs>/.<name>-<hex>``, absolute, removed at the end with what is in it."""
    folder = runs.absolute() / f".{name}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if not keep:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder into which an ending process may still write."""
    for _ in range(REMOVAL_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)
    shutil.rmtree(folder)  # says why not


def end_slurm_jobs(job_ids: Sequence[str]) -> None:
    """Cancel what lives of these jobs, and wait until it is gone.

    Raises:
        SlurmError: where Slurm cannot be asked.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    while living := sorted(slurm.job_states(job_ids, ended=False)):
        slurm.cancel(living)  # again, because one that is being requeued can miss it
        if time.monotonic() > deadline:
            raise slurm.SlurmError(f"{', '.join(living)} cannot be cancelled: see squeue")
        time.sleep(1)


def shortened(profile: Profile, minutes: int) -> Profile:
    """The profile with a time limit of at most so much, for a job that starts soon."""
    most = min(minutes, profile.minutes)
    delay = min(profile.signal_delay_s, most * 60 // 2)
    return dataclasses.replace(profile, time=str(most), signal_delay_s=delay)
