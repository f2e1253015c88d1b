"""A training step against the plain reference's, and against what the processor could do.

The authors' network (dim 64, mults 1, 2, 4, 8) on 32 x 32 images, and the preset ``mnist``. Both
loops train the same function on batches of the same images, from the same weights; each averages
its weights at every step. ``python benchmarks/training_step.py`` takes minutes on two cores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

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
        stream = batches(trainer.images, config.data, trainer.order, 0, CPU, 0)
        with closing(stream):
            slow, fast = interleaved(lambda: plain.step(next(stream)), step, seconds=seconds)
            with counted() as counter:
                plain.step(next(stream))
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


def counted() -> FlopCounterMode:
    """Counts operations; torch's own count takes depth-wise weight gradients for full ones."""
    return FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward},
    )


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """As much as the forward pass for each gradient wanted, of the input and of the weight."""
    *_between, transposed, _padding, _groups, wanted = rest
    places = x[2:] if transposed else gradient[2:]
    forward: int = 2 * x[0] * math.prod(places) * math.prod(weight)
    return forward * (int(wanted[0]) + int(wanted[1]))


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
