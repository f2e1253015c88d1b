"""Processes as /proc shows them, and waiting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def processes() -> list[int]:
    """Every living process of this machine."""
    numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in numbers if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Running, and no zombie that waits for its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def name_of(pid: int) -> str:
    """The program's name, at most 15 letters of it; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def variables_of(pid: int) -> set[str]:
    """The environment the process was started with, as NAME=VALUE; empty when it is gone."""
    with suppress(OSError):
        return set(os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0"))
    return set()


def files_of(pid: int) -> set[str]:
    """What the process has open; empty when it is gone."""
    opened = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                opened.add(str(entry.readlink()).removesuffix(" (deleted)"))
    return opened


def end(find: Callable[[], list[int]], grace: float = 0) -> None:
    """End the processes that are found, and those that they start meanwhile.

    Args:
        find: The processes that are left.
        grace: For how many seconds they may clean up after TERM before they are killed.
    """
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + seconds
        sent: set[int] = set()
        while time.monotonic() < deadline and (left := find()):
            for pid in left:
                if pid not in sent:
                    sent.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.02)
    if left := find():
        raise TimeoutError(f"cannot end {[f'{name_of(pid)} ({pid})' for pid in left]}")


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
