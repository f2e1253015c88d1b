"""A training step against the plain reference's, and against what the processor could do.

The authors' network (dim 64, mults 1, 2, 4, 8) on 32 x 32 images, and the preset ``mnist``. Both
loops train the same function on the same batches, from the same weights; each averages its weights
at every step. ``python benchmarks/training_step.py`` takes minutes on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import tyro
from plain import PlainTraining
from timing import Result, interleaved, machine, table
from torch.utils.flop_counter import FlopCounterMode
from trainers import CPU, a_trainer, on_digits

from colddiff.batches import batches
from colddiff.config import RunConfig
from colddiff.machine import computes_bfloat16


def measure_step(name: str, config: RunConfig, seconds: float, target: float) -> Iterator[Result]:
    """Plain over ours, and how much of the processor's peak ours uses."""
    with a_trainer(config) as (trainer, step):
        plain = PlainTraining(config, trainer.restorer, trainer.order)
        fixed = next(batches(trainer.images, config.data, trainer.order, 0, CPU, 0))
        slow, fast = interleaved(lambda: plain.step(fixed), step, seconds=seconds)
        with FlopCounterMode(display=False) as counter:
            plain.step(fixed)
        operations = counter.get_total_flops()
    yield Result(f"training step, {name}", slow / fast, target, f"{fast:.3f} s, plain {slow:.3f} s")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and not computes_bfloat16("cpu"):
            continue
        peak = peak_flops(dtype)
        achieved = operations / fast
        yield Result(
            f"share of the {str(dtype).removeprefix('torch.')} peak, {name}",
            achieved / peak,
            0,
            f"{achieved / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s ({operations / 1e9:.0f} GFLOP)",
        )


def peak_flops(dtype: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """Operations a second of the best of many square matrix products."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    out, best, start = torch.empty_like(a), float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def measure(seconds: float = 20.0) -> Iterator[Result]:
    """All of them."""
    yield from measure_step(
        "authors' network, batch 32", on_digits("mnist-paper", 64, 32), seconds, 2.0
    )
    for dim in (16, 32):
        yield from measure_step(
            f"mnist at dim {dim}, batch 64", on_digits("mnist", dim, 64), seconds, 0
        )


def main(seconds: float = 20.0) -> None:
    """Print the table.

    Args:
        seconds: spent on each network; three rounds of the authors' may take longer.
    """
    print(machine(), end="\n\n")
    table(measure(seconds))


if __name__ == "__main__":
    tyro.cli(main)
