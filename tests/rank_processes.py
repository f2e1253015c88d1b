"""Ranks as real processes on this machine, which meet over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colddiff.journal import read_records
from colddiff.run_folder import RunFolder

ROOT = Path(__file__).parent.parent

TRAIN = """
import logging, sys
from pathlib import Path
from colddiff.ranks import Ranks
from colddiff.run_folder import RunFolder
from colddiff.training import train

logging.basicConfig(level="INFO")
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
ranks = Ranks(rank, world_size, rank, sys.argv[3])
for path in sys.argv[4:]:
    train(RunFolder(Path(path)), ranks=ranks)
"""
"""Trains the folders one after the other; Interrupted ends it with exit code 1."""


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended."""

    code: int
    output: str


def start_ranks(
    world_size: int, arguments: Sequence[Sequence[Path | str]], script: str = TRAIN
) -> list[subprocess.Popen[str]]:
    """A process for each rank, with ``rank world_size address`` and its own further arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(world_size), address, *map(str, own)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, own in enumerate(arguments)
    ]


def wait(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[Ended]:
    """Until all have ended by themselves; none is left behind."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic())[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def run_ranks(world_size: int, *folders: RunFolder, script: str = TRAIN) -> list[Ended]:
    """All ranks train the folders to their end."""
    paths = [folder.path for folder in folders]
    ended = wait(start_ranks(world_size, [paths] * world_size, script))
    assert [rank.code for rank in ended] == [0] * world_size, "\n".join(r.output for r in ended)
    return ended


def wait_for_step(
    folder: RunFolder, step: int, processes: list[subprocess.Popen[str]], seconds: float = 120
) -> None:
    """Until the journal has reached ``step``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if folder.journal.exists():
            records, _ = read_records(folder.journal)
            if records and records[-1].step >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: " + str(wait(processes, 10)))


def interrupt(
    folder: RunFolder, world_size: int, step: int, signals: dict[int, signal.Signals]
) -> list[Ended]:
    """Start training, and once at ``step`` send each rank in ``signals`` its signal."""
    processes = start_ranks(world_size, [[folder.path]] * world_size)
    wait_for_step(folder, step, processes)
    for rank, name in signals.items():
        processes[rank].send_signal(name)
    return wait(processes)
