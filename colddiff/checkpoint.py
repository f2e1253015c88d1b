"""Training state on disk: written atomically, verified when read, the last two kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colddiff.config import RunConfig
from colddiff.files import write_atomic

log = logging.getLogger(__name__)
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as ``folder/step-<step>.pt`` with its checksum, then drop older ones.

    The older checkpoints go last, so a full disk (``OSError``) leaves them as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = folder / f"step-{step:08d}.pt"
    # The checksum first: a checkpoint is complete as soon as it has its name.
    write_atomic(_checksum_file(path), hashlib.sha256(data).hexdigest() + "\n")
    write_atomic(path, data)
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink()
        _checksum_file(old).unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, map_location: torch.device) -> dict[str, Any] | None:
    """The newest good checkpoint, or None where there is none yet.

    A damaged one is reported and the one before it taken.

    Raises:
        ValueError: where checkpoints exist but none is good.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return _read(path, map_location)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            log.warning("checkpoint %s is damaged (%s): trying the one before", path, error)
    if paths:
        raise ValueError(
            f"no checkpoint in {folder} is readable: {', '.join(p.name for p in paths)}. "
            "Delete that folder to start the run again."
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def _read(path: Path, map_location: torch.device) -> dict[str, Any]:
    data = path.read_bytes()
    expected = _checksum_file(path).read_text().strip()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError("its checksum differs")
    state: dict[str, Any] = torch.load(
        io.BytesIO(data), map_location=map_location, weights_only=True
    )
    return state


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_weights(path: Path, module: nn.Module, config: RunConfig, step: int) -> None:
    """Write a module's parameters as safetensors, with the configuration in the header."""
    from safetensors.torch import save

    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    header = {"config": json.dumps(config.to_dict()), "step": str(step)}
    write_atomic(path, _with_sorted_metadata(save(tensors, metadata=header)))


def _with_sorted_metadata(data: bytes) -> bytes:
    """Equal weights as equal bytes: safetensors writes its metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_weights(path: Path) -> tuple[dict[str, Tensor], RunConfig, int]:
    """Read :func:`save_weights`'s file: parameters, configuration and step.

    Raises:
        ValueError: where the file is absent or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, RunConfig.from_json(header["config"]), int(header["step"])
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no trained weights ({error})") from None
