"""What the two U-Nets share: the embedding of the step, and how the authors' weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn


def step_embedding(step: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the 0-based step ``b``, float32 ``b dim`` (arXiv:1706.03762, 3.5)."""
    half = dim // 2
    decay = math.log(10_000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, device=step.device) * -decay)
    angles = step[:, None].float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def in_float32(module: nn.Module, *inputs: Tensor) -> Tensor:
    """``module(*inputs)`` in float32, whatever autocast says."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        out: Tensor = module(*(each.float() for each in inputs))
    return out


def require_widths(mults: Sequence[int], channels: int) -> None:
    """Raise ``ValueError`` where there is no resolution, or none of a width, or no channel."""
    if not mults or min(mults) < 1:
        raise ValueError(f"mults must be one or more positive integers, got {tuple(mults)}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")


def require_multiple(x: Tensor, stride: int) -> None:
    """Raise ``ValueError`` where height or width of ``b c h w`` is no multiple of ``stride``."""
    if x.shape[-1] % stride or x.shape[-2] % stride:
        raise ValueError(
            f"image height and width must be multiples of {stride}, got {tuple(x.shape)}"
        )


def reference_weights(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    weights: Literal["model", "ema"],
) -> dict[str, Tensor]:
    """The authors' parameters by their bare names, which must be those of ``shapes``.

    Takes a bare network's state dict, or the one of their ``GaussianDiffusion`` with any mix of
    ``module.`` and ``denoise_fn.`` in front, or their whole checkpoint (then ``weights`` says
    which of its two entries). Their blur kernels are left out: ours are computed.

    Raises:
        ValueError: naming the parameters that are missing, unknown or of another shape.
    """
    if weights in state_dict and isinstance(state_dict[weights], Mapping):
        state_dict = state_dict[weights]  # type: ignore[assignment]
    theirs: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        bare = name.replace("module.", "").removeprefix("denoise_fn.")
        if not bare.startswith("gaussian_kernels."):
            theirs[bare] = value
    missing = sorted(set(shapes) - set(theirs))
    unknown = sorted(set(theirs) - set(shapes))
    if missing or unknown:
        raise ValueError(f"reference weights do not fit: missing {missing}, unknown {unknown}")
    wrong = [
        f"{name} is {tuple(theirs[name].shape)} and should be {tuple(shape)}"
        for name, shape in shapes.items()
        if theirs[name].shape != tuple(shape)
    ]
    if wrong:
        raise ValueError(f"reference weights do not fit: other shapes, {'; '.join(wrong)}")
    return theirs
