"""Depth-wise convolutions: a third of a training step on a CPU if left to the library."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_IMAGE = 64
"""Pixels up to which a depth-wise convolution is a matrix product on the CPU."""


class Depthwise(nn.Conv2d):
    """A depth-wise k x k convolution that keeps the size; the same sums another way on the CPU.

    There the library's own kernels are slow (docs/experiments.md). Small images are
    cheaper as one matrix product a channel, with the matrix of the taps; larger ones in float32.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """``b c h w -> b c h w``, of the input's type."""
        # Their backward pass is what is slow in float32 (a quarter of the speed at 4x4).
        forward_only = x.dtype == torch.float32 and not torch.is_grad_enabled()
        if x.device.type != "cpu" or forward_only:
            return super().forward(x)
        if x.shape[-2] * x.shape[-1] > SMALL_IMAGE:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        assert self.bias is not None
        b, c, h, w = x.shape
        taps = F.pad(self.weight.flatten(1), (0, 1)).to(x.dtype)  # a zero tap for what is outside
        matrix = taps.index_select(1, _taps_between(h, w, self.kernel_size[0]))
        rows = x.permute(1, 0, 2, 3).reshape(c, b, h * w)
        bias = self.bias[:, None, None].to(x.dtype)
        out = torch.baddbmm(bias, rows, matrix.view(c, h * w, h * w))
        images = out.view(c, b, h, w).permute(1, 0, 2, 3)
        return images.contiguous(memory_format=torch.channels_last)


@functools.cache
def _taps_between(height: int, width: int, size: int) -> Tensor:
    """For each input and output pixel the index of the tap between them, size^2 for none."""
    offsets = []
    for n in (height, width):
        place = torch.arange(n)
        offsets.append(place[:, None] - place + size // 2)
    down, right = offsets[0][:, None, :, None], offsets[1][None, :, None, :]
    inside = (down >= 0) & (down < size) & (right >= 0) & (right < size)
    return torch.where(inside, down * size + right, size**2).flatten()
