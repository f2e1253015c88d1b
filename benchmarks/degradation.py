"""How much faster the closed form of D(x, t) is than the authors' sequence of convolutions.

Both degrade the same batch with the same mixed levels, in turn, in one process; the ratio is that
of the medians. ``python benchmarks/degradation.py`` takes under two minutes on two cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from colddiff.config import DegradationConfig, RunConfig
from colddiff.degradation import Blur, taps_of_step
from colddiff.presets import preset

PRESETS = {"MNIST": "mnist", "CIFAR-10": "cifar10", "CelebA": "celeba"}


class SequentialBlur:
    """The authors' way: blur the whole batch up to its largest t, keep every state, pick."""

    def __init__(self, config: DegradationConfig, channels: int) -> None:
        self.padding: str = config.padding
        steps = (taps_of_step(config, i).float() for i in range(config.T))
        self.kernels = [(taps[:, None] * taps).expand(channels, 1, -1, -1) for taps in steps]

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        """``b c h w`` and int64 ``b`` in 1..T -> x_t."""
        states, x = [], x0
        for kernel in self.kernels[: int(t.max())]:
            half = kernel.shape[-1] // 2
            padded = F.pad(x, (half,) * 4, mode=self.padding)
            x = F.conv2d(padded, kernel, groups=len(kernel))
            states.append(x)
        return torch.stack(states)[t - 1, torch.arange(len(t))]


@dataclass(frozen=True)
class Comparison:
    """Medians in milliseconds a batch, and the largest difference between the two results."""

    closed_ms: float
    sequential_ms: float
    repeats: int
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster the closed form is."""
        return self.sequential_ms / self.closed_ms


def compare(config: RunConfig, batch: int, seconds: float) -> Comparison:
    """Time both on random images in [-1, 1], in turn, for about ``seconds`` and at least twice."""
    size, channels, T = config.data.image_size, config.data.channels, config.degradation.T
    source = torch.Generator().manual_seed(0)
    x0 = 2 * torch.rand(batch, channels, size, size, generator=source) - 1
    # Levels spread over 1..T, so that every run and machine does the same work.
    t = torch.linspace(1, T, batch).round().long()
    closed = Blur(config.degradation, size)
    sequential = SequentialBlur(config.degradation, channels)
    closed(x0, t)
    sequential(x0, t.clamp(max=2))  # warm up
    closed_times: list[float] = []
    sequential_times: list[float] = []
    start = time.perf_counter()
    while len(closed_times) < 2 or time.perf_counter() - start < seconds:
        ours = timed(lambda: closed(x0, t), closed_times)
        theirs = timed(lambda: sequential(x0, t), sequential_times)
    return Comparison(
        1000 * statistics.median(closed_times),
        1000 * statistics.median(sequential_times),
        len(closed_times),
        float((ours - theirs).abs().max()),
    )


def timed(run: Callable[[], Tensor], times: list[float]) -> Tensor:
    """The result of ``run``; its seconds are appended to ``times``."""
    start = time.perf_counter()
    result = run()
    times.append(time.perf_counter() - start)
    return result


def main(batch: int = 32, seconds: float = 10.0) -> None:
    """Print the table.

    Args:
        batch: images a batch, with mixed levels.
        seconds: time spent on each schedule; two repeats of CelebA may take longer.
    """
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}, mixed t\n")
    print(
        "| schedule | image | T | closed form | sequential | ratio | largest difference | repeats |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name, key in PRESETS.items():
            config = preset(key)
            size, channels, T = config.data.image_size, config.data.channels, config.degradation.T
            result = compare(config, batch, seconds)
            print(
                f"| {name} | {channels}x{size}x{size} | {T} | {result.closed_ms:.2f} ms "
                f"| {result.sequential_ms:.1f} ms | {result.ratio:.0f}x | {result.difference:.1e} "
                f"| {result.repeats} |",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
