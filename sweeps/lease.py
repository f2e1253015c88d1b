"""Who works on a trial: a lease that is renewed while it lasts, and taken over when it is dead.

The leases of trial 7 are ``leases/trial-7.1.json``, ``trial-7.2.json``, …: each holder's in turn.
The last one counts. A new one is a hard link made at once with its content, and making a link that
is there fails: of all who find a holder dead, exactly one becomes the next. Nothing is renamed or
removed, so whoever crashes leaves the trial held or free, never between.

A renewal sets the file's time by the clock of the disk's server. Ages are told by comparing it with
another file touched just then, never with the clock of this host.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from colddiff.files import sync_folder, write_json
from colddiff.schema import build
from jobs import environment

log = logging.getLogger("colddiff.sweeps")
RENEW_S = 30.0


class LeaseLostError(Exception):
    """Another worker has taken the trial over: this one was held for dead."""


@dataclass(frozen=True)
class Holder:
    """A process that works on trials, with all that tells whether it still does."""

    worker: str
    host: str
    pid: int
    started: float = 0.0
    """When the process began: a number can be used again."""
    cluster: str = ""
    """slurm, local, or empty for a process that no scheduler started."""
    job_id: str = ""
    """Slurm's, ``12_3`` in an array."""
    restarts: int = 0
    """How often Slurm had requeued the job."""

    @classmethod
    def here(cls, worker: str) -> Self:
        """This process."""
        import psutil

        values = environment.process()
        return cls(
            worker=worker,
            host=values["host"],
            pid=values["pid"],
            started=psutil.Process().create_time(),
            cluster=values.get("cluster", ""),
            job_id=str(values.get("job_id", "")),
            restarts=environment.restarts(),
        )

    @property
    def where(self) -> str:
        """Its job or its process, as people look for it."""
        job = self.cluster == "slurm" and self.job_id
        return f"{job or f'process {self.pid}'} on {self.host}"

    def __str__(self) -> str:
        return f"{self.worker} ({self.where})"


@dataclass(frozen=True)
class Lease:
    """A lease as it is found on disk."""

    trial: int
    turn: int
    """1 for the trial's first holder."""
    holder: Holder
    step: int = 0
    """Where the training stood when it was taken."""
    released: str = ""
    """Why the holder gave it back; empty while it is held, and for ever if the holder died."""


class Leases:
    """The leases of a study's trials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def current(self, trials: Iterable[int]) -> dict[int, Lease]:
        """The last lease of each of these trials that has one."""
        turns = self._turns()
        wanted = [(trial, max(turns[trial])) for trial in trials if trial in turns]
        return {trial: self._read(trial, turn) for trial, turn in wanted}

    def history(self, trial: int) -> list[Lease]:
        """All leases of a trial, the oldest first."""
        return [self._read(trial, turn) for turn in sorted(self._turns().get(trial, ()))]

    def take(
        self, trial: int, holder: Holder, *, after: Lease | None = None, step: int = 0
    ) -> HeldLease | None:
        """Take a trial; None where another process was faster.

        Args:
            trial: its number in the study.
            holder: who takes it.
            after: the last lease, found dead or released; None for a trial that has none.
            step: where the training stands.
        """
        lease = Lease(trial, after.turn + 1 if after else 1, holder, step)
        path = self.path(lease)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("x") as file:
                json.dump(dataclasses.asdict(lease), file)
                file.flush()
                os.fsync(file.fileno())
            if not _linked(temporary, path):
                return None
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return HeldLease(self, lease)

    def ages_s(self, leases: Collection[Lease]) -> dict[int, float]:
        """Seconds since the last renewal, by trial."""
        if not leases:
            return {}
        now = self._now()
        return {lease.trial: now - self.path(lease).stat().st_mtime for lease in leases}

    def path(self, lease: Lease) -> Path:
        """Its file."""
        return self.folder / f"trial-{lease.trial}.{lease.turn}.json"

    def is_superseded(self, lease: Lease) -> bool:
        """Whether there is a later lease of the trial."""
        return self.path(dataclasses.replace(lease, turn=lease.turn + 1)).exists()

    def _read(self, trial: int, turn: int) -> Lease:
        path = self.folder / f"trial-{trial}.{turn}.json"
        return build(Lease, json.loads(path.read_text()))

    def _turns(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                parts = re.fullmatch(r"trial-(\d+)\.(\d+)\.json", path.name)
                if parts:
                    found.setdefault(int(parts[1]), []).append(int(parts[2]))
        return found

    def _now(self) -> float:
        """The time by the clock of the disk."""
        probe = self.folder / f".now.{secrets.token_hex(8)}.tmp"
        probe.touch(exist_ok=False)
        try:
            os.utime(probe)
            return probe.stat().st_mtime
        finally:
            probe.unlink()


class HeldLease:
    """A lease that this process holds; as a context it is renewed by a thread."""

    def __init__(self, leases: Leases, lease: Lease) -> None:
        self.lease = lease
        self._leases = leases
        self._ending = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="colddiff-lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()

    def check(self) -> None:
        """Raise :class:`LeaseLostError` where the last renewal found another holder. Free."""
        if self._lost.is_set():
            raise LeaseLostError(f"trial {self.lease.trial} was taken over by another worker")

    def confirm(self) -> None:
        """As :meth:`check`, after a look at the disk."""
        if self._leases.is_superseded(self.lease):
            self._lost.set()
        self.check()

    def release(self, reason: str) -> None:
        """Give the trial back, unfinished."""
        released = dataclasses.replace(self.lease, released=reason)
        write_json(self._leases.path(self.lease), dataclasses.asdict(released))

    def _loop(self) -> None:
        failing = False
        while not self._ending.wait(RENEW_S):
            try:
                os.utime(self._leases.path(self.lease))  # without times: the server's clock
                if self._leases.is_superseded(self.lease):
                    self._lost.set()
                    return
                failing = False
            except OSError as error:
                if not failing:
                    log.warning("the lease of trial %d is not renewed: %s", self.lease.trial, error)
                failing = True


def _linked(temporary: Path, path: Path) -> bool:
    """Give the file its final name, unless that is taken."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        # Over NFS the answer to a link that was made can be lost, and its repetition fails.
        return temporary.stat().st_nlink == 2
    return True
