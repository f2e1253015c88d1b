"""How much faster the closed form of D(x, t) is than the authors' sequence of convolutions.

Both degrade the same batch with the same mixed levels, in turn, in one process; the ratio is that
of the medians. ``python benchmarks/degradation.py`` takes under two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import tyro
from plain import SequentialBlur
from timing import Result, interleaved, machine, table

from colddiff.config import RunConfig
from colddiff.degradation import Blur
from colddiff.optimisation import resolve_device
from colddiff.presets import preset

SCHEDULES = {"MNIST": ("mnist", 150), "CIFAR-10": ("cifar10", 150), "CelebA": ("celeba", 1000)}
"""Name -> preset and the ratio asked for."""
LARGEST_DIFFERENCE = 1e-6


@torch.inference_mode()
def measure(seconds: float = 10.0, batch: int = 32) -> Iterator[Result]:
    """Each schedule on random images in [-1, 1], with levels spread over 1..T."""
    resolve_device("cpu")  # sets the process up, as a job does
    for name, (key, target) in SCHEDULES.items():
        yield measure_one(name, preset(key), target, seconds, batch)


def measure_one(name: str, config: RunConfig, target: float, seconds: float, batch: int) -> Result:
    """One schedule; raises ``RuntimeError`` where the two ways differ."""
    size, channels, T = config.data.image_size, config.data.channels, config.degradation.T
    source = torch.Generator().manual_seed(0)
    x0 = 2 * torch.rand(batch, channels, size, size, generator=source) - 1
    t = torch.linspace(1, T, batch).round().long()  # the same work at every run
    closed = Blur(config.degradation, size)
    sequential = SequentialBlur(config.degradation, channels)
    difference = float((closed(x0, t) - sequential(x0, t)).abs().max())
    if difference > LARGEST_DIFFERENCE:
        raise RuntimeError(f"{name}: the two differ by {difference:.1e}")
    ours, theirs = interleaved(
        lambda: closed(x0, t), lambda: sequential(x0, t), seconds=seconds, repeats=2
    )
    return Result(
        f"degradation, {name} schedule",
        theirs / ours,
        target,
        f"{1000 * ours:.2f} ms, sequential {1000 * theirs:.0f} ms; {channels}x{size}x{size}, "
        f"T = {T}, largest difference {difference:.0e}",
    )


def main(seconds: float = 10.0, batch: int = 32) -> None:
    """Print the table.

    Args:
        seconds: time spent on each schedule; two rounds of CelebA may take longer.
        batch: images a batch, with mixed levels.
    """
    print(machine(), end="\n\n")
    table(measure(seconds, batch))


if __name__ == "__main__":
    tyro.cli(main)
