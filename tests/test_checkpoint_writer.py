"""Checkpoints written beside the training hold what they would have held, and none is lost."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import assert_identical
from test_training import StopAt, train_steps
from tiny import tiny
from torch import Tensor, nn

from colddiff import checkpoint_writer
from colddiff.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from colddiff.checkpoint_writer import CheckpointWriter, on_host
from colddiff.interruption import Interrupted
from colddiff.journal import read_records
from colddiff.ranks import ALONE, Group
from colddiff.run_folder import RunFolder
from colddiff.trainer import Trainer
from colddiff.training import train
from jobs.diagnosis import DISK

CPU = torch.device("cpu")


def names(folder: RunFolder) -> list[str]:
    """Of all files among the checkpoints, but for checksums."""
    return sorted(p.name for p in folder.checkpoints.iterdir() if p.suffix != ".sha256")


def held_back(
    monkeypatch: pytest.MonkeyPatch, held: int, seconds: float | None = None
) -> threading.Event:
    """Writing step ``held`` waits for the event, or takes so many seconds longer."""
    opened = threading.Event()

    def slow(folder: Path, step: int, state: dict[str, Any]) -> Path:
        if step == held and not opened.wait(seconds or 20) and seconds is None:
            raise TimeoutError("the training waited for the write")
        return save_checkpoint(folder, step, state)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    return opened


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def test_training_goes_on_and_the_file_holds_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 is written when step 12 is done; a view of the state would be that of step 12."""
    config = tiny(steps=14, log_every=4, checkpoint_every=7)
    folder, opened = RunFolder.create(tmp_path / "slow", config), held_back(monkeypatch, 7)

    def report(step: int, _: object) -> None:
        if step == 12:
            assert names(folder) == []  # the write has not begun
            opened.set()

    (folder.checkpoints).mkdir()
    train(folder, report=report)
    assert names(folder) == ["step-00000007.pt", "step-00000014.pt"]
    (folder.checkpoints / "step-00000014.pt").unlink()
    saved = load_checkpoint(folder.checkpoints, CPU)
    assert saved is not None and saved["step"] == 7

    stepwise = Trainer(RunFolder.create(tmp_path / "a", config), config, Group(ALONE, CPU))
    train_steps(stepwise, 7)
    assert_equal(saved["model"], stepwise.restorer.state_dict())
    assert_equal(saved["average"], stepwise.average.state_dict())
    assert_equal(saved["optimiser"], stepwise.optimiser.state_dict())

    every = RunFolder.create(tmp_path / "b", tiny(steps=14, log_every=1, checkpoint_every=14))
    train(every)
    records = [r for r in read_records(every.journal)[0] if "train/loss" in r.metrics]
    losses = {record.step: record.metrics["train/loss"] for record in records}
    assert saved["interval_steps"] == 3  # since the record of step 4
    sums = saved["interval_sums"]
    assert sums[0, 0].item() == pytest.approx(losses[5] + losses[6] + losses[7], rel=1e-6)


def test_the_copy_shares_no_memory_and_is_what_would_have_been_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    sums = torch.ones(2, dtype=torch.float64)
    wide = torch.arange(6.0).reshape(2, 3).t()  # not contiguous
    state = {
        "model": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "sums": sums[None],
        "nested": [(wide, 3), {"text": None}],
    }
    copied = on_host(state)
    load = {"weights_only": True, "map_location": CPU}
    torch.save(state, tmp_path / "before")
    before = torch.load(tmp_path / "before", **load)
    with torch.no_grad():
        for value in (*network.state_dict().values(), sums, wide):
            value.zero_()
        for slot in optimiser.state.values():
            for value in slot.values():
                value.zero_()
    torch.save(copied, tmp_path / "after")
    after = torch.load(tmp_path / "after", **load)
    assert_equal(after, before)
    assert isinstance(copied["model"], OrderedDict)
    assert after["model"]._metadata == before["model"]._metadata  # BatchNorm's is version 2


def test_the_next_save_waits_for_the_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(monkeypatch, 2, seconds=0.3)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, {"step": 1})
        start = time.monotonic()
        writer.save(2, {"step": 2})
        assert time.monotonic() - start < 0.2  # which is written meanwhile
        assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001.pt"]
        writer.save(3, {"step": 3})
        assert "step-00000002.pt" in [p.name for p in checkpoints(tmp_path)]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000003.pt"]


@pytest.mark.parametrize("stop", [7, 9])
def test_an_interruption_waits_for_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Of a checkpoint that was due at that step, and of one that was due before."""
    folder, seen = RunFolder.create(tmp_path, tiny()), []
    held_back(monkeypatch, 7, seconds=0.3)
    monkeypatch.setattr(Group, "barrier", lambda self: seen.append(names(folder)))
    with pytest.raises(Interrupted, match=f"at step {stop}"):
        train(folder, stop=StopAt(stop))
    wanted = [f"step-{step:08d}.pt" for step in sorted({7, stop})]
    assert seen == [wanted]  # before the other ranks, and all else, go on


def test_a_failure_waits_for_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    held_back(monkeypatch, 7, seconds=0.3)

    def report(step: int, _: object) -> None:
        if step == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(folder, report=report)
    assert names(folder) == ["step-00000007.pt"]


class Disk:
    """Full, from when it is told, for what the training thread does not write itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self._fsync = False, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.full and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


def test_a_full_disk_ends_the_run_at_the_next_save_and_it_goes_on_from_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(checkpoint_every=7, log_every=4)
    folder, undisturbed = (RunFolder.create(tmp_path / name, config) for name in "ab")
    disk, reached = Disk(monkeypatch), []

    def report(step: int, _: object) -> None:
        disk.full = step >= 8
        reached.append(step)

    with pytest.raises(OSError, match="No space left on device"):
        train(folder, report=report)
    assert reached[-1] == 20  # the write of 14 fails, the save of 21 says so
    assert names(folder) == ["step-00000007.pt"]  # and nothing half written
    status = folder.status()
    assert status is not None and (status.state, status.step) == ("failed", 21)
    assert status.message.startswith("OSError: ") and DISK.search(status.message)
    disk.full = False
    train(folder)
    train(undisturbed)
    assert_identical(folder, undisturbed)


def test_a_full_disk_at_the_end_leaves_the_run_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, disk = RunFolder.create(tmp_path, tiny(steps=14)), Disk(monkeypatch)

    def report(step: int, _: object) -> None:
        disk.full = step >= 8

    with pytest.raises(OSError, match="No space left on device"):
        train(folder, report=report)
    assert names(folder) == ["step-00000007.pt"]
    assert not folder.is_trained and not folder.weights.exists()


def test_the_training_s_own_failure_is_told_before_that_of_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, disk = RunFolder.create(tmp_path, tiny()), Disk(monkeypatch)
    disk.full = True

    def report(step: int, _: object) -> None:
        if step == 8:
            raise ZeroDivisionError("of the training")

    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError, match="of the training"):
        train(folder, report=report)
    assert "checkpoint was not written: OSError: [Errno 28]" in caplog.text
    status = folder.status()
    assert status is not None and "ZeroDivisionError" in status.message
