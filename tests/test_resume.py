"""Kill -9 and Ctrl-C at any moment: the run ends bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_comparison import assert_identical
from tiny import tiny

from colddiff.checkpoint import load_checkpoint
from colddiff.config import RunConfig
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder
from colddiff.training import train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
STEPS = 120


def config() -> RunConfig:
    return tiny(steps=STEPS, log_every=3, checkpoint_every=10, validate_every=25, own_states=0.5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder.create(tmp_path_factory.mktemp("uninterrupted"), config())
    finish(folder)
    return folder


def start(folder: RunFolder) -> subprocess.Popen[bytes]:
    """Training in a process of its own, one thread as in the reference."""
    code = (
        "import logging, sys; from pathlib import Path; logging.basicConfig(level='INFO');"
        "from colddiff.run_folder import RunFolder; from colddiff.training import train;"
        "train(RunFolder(Path(sys.argv[1])))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def finish(folder: RunFolder) -> str:
    process = start(folder)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    return output.decode()


def kill_at(folder: RunFolder, step: int, signum: signal.Signals) -> int:
    """Start, send the signal once the journal has reached ``step``, and give the exit code."""
    process = start(folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if folder.journal.exists():
            records, _ = read_records(folder.journal)
            if records and records[-1].step >= step:
                process.send_signal(signum)
                break
        time.sleep(0.002)
    process.communicate(timeout=120)
    return process.returncode


def test_kill_9_at_random_steps_changes_nothing(tmp_path: Path, uninterrupted: RunFolder) -> None:
    folder = RunFolder.create(tmp_path, config())
    for step in sorted(random.Random(0).sample(range(3, STEPS - 10), 3)):
        assert kill_at(folder, step, signal.SIGKILL) == -signal.SIGKILL
        assert not folder.is_trained
    output = finish(folder)
    assert "resuming" in output
    # The journal compares what is computed again with its record.
    assert "not deterministic" not in output
    assert_identical(folder, uninterrupted)


def test_terminate_saves_and_changes_nothing(tmp_path: Path, uninterrupted: RunFolder) -> None:
    folder = RunFolder.create(tmp_path, config())
    assert kill_at(folder, 40, signal.SIGTERM) == 1  # Interrupted ends the bare process
    status, state = folder.status(), load_checkpoint(folder.checkpoints, CPU)
    assert status is not None and state is not None
    assert status.state == "interrupted" and status.step == state["step"] >= 40
    finish(folder)
    assert_identical(folder, uninterrupted)


def test_training_in_another_process_is_the_same(tmp_path: Path, uninterrupted: RunFolder) -> None:
    """The reference ran elsewhere; here, with other things in memory, nothing may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.randn(7)  # the global generator must not matter
        folder = RunFolder.create(tmp_path, config())
        train(folder)
    finally:
        torch.set_num_threads(threads)
    assert_identical(folder, uninterrupted)
