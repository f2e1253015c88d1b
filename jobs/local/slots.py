"""The places on this machine that local jobs share, and the file locks that say who has one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Slot:
    """Room for one process on this machine, for whichever launch takes it.

    There are two locks, because a job takes a while to start, and to start again after a time
    limit. Meanwhile its queue reserves the slot; a job whose queue was killed still uses it.
    """

    path: str
    """Of the lock files, without suffix."""
    device: str = ""
    """The GPU, as CUDA_VISIBLE_DEVICES has it; empty for a place on the CPU."""

    @property
    def reserved(self) -> Path:
        """Held by the queue whose job has the slot."""
        return Path(f"{self.path}.reserved")

    @property
    def used(self) -> Path:
        """Held by the job."""
        return Path(f"{self.path}.used")


def find_slots(at_once: int = 0) -> list[Slot]:
    """One on each GPU that is visible here, or without any ``at_once`` on the CPU (0 means 1)."""
    names = {f"gpu-{device.replace('/', '_')}": device for device in _gpus()}
    names = names or {f"cpu-{index}": "" for index in range(max(at_once, 1))}
    folder = Path(tempfile.gettempdir()) / f"colddiff-{os.getuid()}"
    return [Slot(str(folder / name), device) for name, device in names.items()]


def slots_for(at_once: int, ranks: int) -> list[Slot]:
    """:func:`find_slots`; raises ``ValueError`` for numbers that this machine cannot serve."""
    if at_once < 0:
        raise ValueError(f"at_once = {at_once} is not allowed: give 0 (one on each GPU) or more")
    slots = find_slots(at_once)
    if ranks < 1 or (slots[0].device and ranks > len(slots)):
        limit = f"1..{len(slots)}, a GPU for each" if slots[0].device else "1 or more"
        raise ValueError(f"ranks = {ranks} is not allowed here: it must be {limit}")
    return slots


def reserve(slots: Iterable[Slot], count: int) -> dict[Slot, int]:
    """So many free slots, with the descriptors that reserve them; none where there are fewer.

    Never a part of them: queues that each hold a part would wait for each other.
    """
    taken: dict[Slot, int] = {}
    for slot in slots:
        descriptor = try_to_hold(slot.reserved)
        if descriptor is None:
            continue
        taken[slot] = descriptor
        if is_held(slot.used):
            os.close(taken.pop(slot))
        elif len(taken) == count:
            return taken
    for descriptor in taken.values():
        os.close(descriptor)
    return {}


def hold(lock: Path) -> int:
    """Wait for the lock and take it; the descriptor, whose closing frees it, or the process's end.

    Not by filelock, whose locks can neither be inherited nor looked at without taking them.
    """
    descriptor = _open(lock)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def try_to_hold(lock: Path) -> int | None:
    """As :func:`hold`, but None where another process has it."""
    descriptor = _open(lock)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_held(lock: Path) -> bool:
    """Whether a process holds it. Looks by a shared lock, which others who look do not notice."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(lock: Path) -> int:
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _gpus() -> list[str]:
    """Their names, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index, _ in enumerate(lines)]
