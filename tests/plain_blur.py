"""The authors' blur, the plain way: one depth-wise convolution after another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from colddiff.config import DegradationConfig
from colddiff.presets import preset

# The schedules of the authors' code: a configuration, and (taps, sigma) of each step by hand.
Kernels = list[tuple[int, float]]
PAPER: dict[str, tuple[DegradationConfig, Kernels]] = {
    "mnist": (preset("mnist").degradation, [(11, 7.0)] * 20),
    "mnist-text": (preset("mnist-paper").degradation, [(11, 7.0)] * 40),
    "cifar10": (preset("cifar10").degradation, [(11, 0.01 * i + 0.35) for i in range(50)]),
    "celeba": (preset("celeba").degradation, [(15, math.exp(0.01 * i)) for i in range(200)]),
    "celeba-generation": (
        DegradationConfig(T=300, schedule="exponential", kernel_size=27, sigma=1.0, growth=0.01),
        [(27, math.exp(0.01 * i)) for i in range(300)],
    ),
    "incremental": (
        DegradationConfig(T=9, schedule="incremental", kernel_size=9, sigma=0.7),
        [(9, 0.7 * (i + 1)) for i in range(9)],
    ),
    "individual": (
        DegradationConfig(T=9, schedule="individual"),
        [(2 * i + 1, 2.0 * (2 * i + 1)) for i in range(9)],
    ),
}
PADDINGS = {"cifar10": "reflect", "celeba": "reflect"}


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def taps_by_hand(size: int, sigma: float) -> Tensor:
    taps = [math.exp(-((j - size // 2) ** 2) / (2 * sigma**2)) for j in range(size)]
    return torch.tensor([tap / sum(taps) for tap in taps], dtype=torch.float64)


def convolve(x: Tensor, size: int, sigma: float, padding: str) -> Tensor:
    """One depth-wise convolution with the whole 2-D kernel, as the authors do it."""
    taps = taps_by_hand(size, sigma).to(x.dtype)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, size, size)
    padded = F.pad(x, (size // 2,) * 4, mode=padding)
    return F.conv2d(padded, kernel, groups=x.shape[1])


def sequence(name: str, x0: Tensor) -> Tensor:
    """D(x0, 0), D(x0, 1), …, D(x0, T) by the sequence of convolutions; ``T+1 b c h w``."""
    states = [x0]
    for size, sigma in PAPER[name][1]:
        start = x0 if name == "individual" else states[-1]
        states.append(convolve(start, size, sigma, PADDINGS.get(name, "circular")))
    return torch.stack(states)
