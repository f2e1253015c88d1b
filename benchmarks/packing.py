"""Several seeds of a small network at once: processes side by side, or one stack of networks.

Against the same runs one after another, each with all cores. On a GPU the numbers are others, the
command is the same. ``python benchmarks/packing.py`` takes minutes on two cores.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier

import torch
import torch.nn.functional as F
import tyro
from processes import seconds_together
from reference_unet import ReferenceUNet
from timing import Result, interleaved, machine, table
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from trainers import a_trainer, on_digits, with_seed

from colddiff.config import RunConfig

WARM_UP = 2


def steps(config: RunConfig, count: int, barrier: Barrier | None = None) -> float:
    """Seconds of ``count`` steps of one run, after the warm-up and a meeting of all processes."""
    with a_trainer(config) as (_, step):
        for _ in range(WARM_UP):
            step()
        if barrier is not None:
            barrier.wait(300)
        start = time.perf_counter()
        for _ in range(count):
            step()
        seconds = time.perf_counter() - start
        if barrier is not None:
            barrier.wait(600)
    return seconds


def side_by_side(config: RunConfig, K: int, count: int) -> float:
    """Seconds until all of K processes have done their steps, with the threads ``--pack`` gives."""
    threads = max(1, len(os.sched_getaffinity(0)) // K)
    return seconds_together(_child, [(with_seed(config, k), count, threads) for k in range(K)])


def _child(config: RunConfig, count: int, threads: int, barrier: Barrier) -> None:
    torch.set_num_threads(threads)
    steps(config, count, barrier)


class Stack:
    """K plain networks without time embedding as one (torch.func), or one after another.

    vmap refuses our own network, whose tensors are channels_last, and one that looks values up.
    """

    def __init__(self, config: RunConfig, K: int) -> None:
        model, folded = config.model, config.data.channels * config.model.patch**2
        self.networks = [
            ReferenceUNet(model.dim, model.mults, folded, with_time=False) for _ in range(K)
        ]
        self.parameters, self.buffers = stack_module_state(self.networks)
        size = config.data.image_size // model.patch
        self.x0 = torch.rand(K, config.training.batch_size, folded, size, size)
        self.together = torch.optim.AdamW(self.parameters.values(), lr=1e-3, fused=True)
        self.alone = [
            torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True) for net in self.networks
        ]
        self.gradients = vmap(grad(self._loss))

    def _loss(self, values: dict[str, Tensor], fixed: dict[str, Tensor], x0: Tensor) -> Tensor:
        out = functional_call(self.networks[0], (values, fixed), (x0, None))
        return F.l1_loss(out, x0)

    def stacked(self) -> None:
        """A step of all at once."""
        found = self.gradients(self.parameters, self.buffers, self.x0)
        for name, gradient in found.items():
            self.parameters[name].grad = gradient
        self.together.step()

    def one_by_one(self) -> None:
        """A step of each."""
        for net, optimiser, x0 in zip(self.networks, self.alone, self.x0, strict=True):
            F.l1_loss(net(x0, None), x0).backward()
            optimiser.step()
            optimiser.zero_grad()


def measure(K: int = 4, count: int = 20, dim: int = 16, repeats: int = 3) -> Iterator[Result]:
    """Medians of ``repeats`` rounds."""
    config, images = on_digits("mnist", dim, 64), K * count * 64
    alone, packed = [], []
    for _ in range(repeats):
        alone.append(sum(steps(with_seed(config, k), count) for k in range(K)))
        packed.append(side_by_side(config, K, count))
    slow, fast = statistics.median(alone), statistics.median(packed)
    yield Result(
        f"{K} runs packed as processes, mnist at dim {dim}",
        slow / fast,
        0,
        f"{images / fast:.0f} images/s, one by one {images / slow:.0f}",
    )
    stack = Stack(config, K)
    slow, fast = interleaved(stack.one_by_one, stack.stacked, repeats=repeats)
    yield Result(
        f"{K} plain networks stacked by torch.func, dim {dim}",
        slow / fast,
        0,
        f"{64 * K / fast:.0f} images/s, one by one {64 * K / slow:.0f}",
    )


def main(K: int = 4, count: int = 20, dim: int = 16, repeats: int = 3) -> None:
    """Print the table.

    Args:
        K: runs.
        count: steps of each.
        dim: width of the network.
        repeats: rounds; medians are shown.
    """
    print(machine(), end="\n\n")
    table(measure(K, count, dim, repeats))


if __name__ == "__main__":
    tyro.cli(main)
