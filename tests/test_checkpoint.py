from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn

from colddiff import files
from colddiff.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)

CPU = torch.device("cpu")


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((3,), float(step))}}


def test_the_last_two_are_kept_and_the_newest_loaded(tmp_path: Path) -> None:
    for step in (5, 10, 1000):
        save_checkpoint(tmp_path, step, state(step))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010.pt", "step-00001000.pt"]
    assert len(list(tmp_path.iterdir())) == 4  # with their checksums, nothing else
    loaded = load_checkpoint(tmp_path, CPU)
    assert loaded is not None and loaded["step"] == 1000
    torch.testing.assert_close(loaded["model"]["w"], torch.full((3,), 1000.0))


def test_none_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", CPU) is None


@pytest.mark.parametrize("damage", ["torn", "flipped", "no checksum", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    newest = save_checkpoint(tmp_path, 2, state(2))
    data = bytearray(newest.read_bytes())
    match damage:
        case "torn":
            newest.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[len(data) // 2] ^= 1
            newest.write_bytes(data)
        case "no checksum":
            newest.with_suffix(".sha256").unlink()
        case "empty":
            newest.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(tmp_path, CPU)
    assert loaded is not None and loaded["step"] == 1
    assert newest.name in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step)).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"step-00000001.pt, step-00000002.pt"):
        load_checkpoint(tmp_path, CPU)


def test_a_full_disk_leaves_the_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    save_checkpoint(tmp_path, 2, state(2))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 3, state(3))
    monkeypatch.undo()
    loaded = load_checkpoint(tmp_path, CPU)
    assert loaded is not None and loaded["step"] == 2
    assert not list(tmp_path.glob(".*tmp"))


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    save_checkpoint(tmp_path, 1, {"step": 1, "evil": Payload()})
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path, CPU)
    assert not (tmp_path / "executed").exists()


def test_weights_carry_their_configuration(tmp_path: Path) -> None:
    module, config = nn.Linear(3, 2), tiny()
    save_weights(tmp_path / "ema.safetensors", module, config, 77)
    tensors, loaded, step = load_weights(tmp_path / "ema.safetensors")
    assert (loaded, step) == (config, 77)
    assert set(tensors) == {"weight", "bias"}
    assert torch.equal(tensors["weight"], module.weight)


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        load_weights(tmp_path / "absent")
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ValueError, match="holds no trained weights"):
        load_weights(tmp_path / "text")


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    """Whatever order safetensors gives its metadata this time; and it still reads the file."""
    module, config = nn.Linear(3, 5), tiny()
    contents = set()
    for i in range(12):
        save_weights(tmp_path / f"{i}.safetensors", module, config, 7)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    (data,) = contents
    assert int.from_bytes(data[:8], "little") % 8 == 0
    tensors, read, step = load_weights(tmp_path / "3.safetensors")
    assert (read, step) == (config, 7)
    assert all(torch.equal(tensors[name], value) for name, value in module.state_dict().items())
