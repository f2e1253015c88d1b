"""Tensors as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colddiff.files import write_atomic


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """``n c h w`` in [-1, 1] -> ``n h w c`` grey levels, rounded."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return array


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """``n h w c`` grey levels -> float32 ``n c h w`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(path: Path, rows: Sequence[Tensor], scale: int = 2, gap: int = 2) -> None:
    """Write rows of images (``n c h w`` each, in [-1, 1]) as one PNG, enlarged ``scale`` times."""
    from PIL import Image

    strips = []
    for row in rows:
        padded = torch.nn.functional.pad(row.cpu(), (0, gap, 0, gap), value=1.0)
        strips.append(torch.cat(tuple(padded), dim=-1))
    picture = torch.cat(strips, dim=-2)
    height, width = picture.shape[-2] - gap, picture.shape[-1] - gap
    array = to_uint8(picture[None, :, :height, :width])[0]
    array = array.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
