"""Algorithm 2 against the network calls it cannot do without, and against the plain loop.

``python benchmarks/sampling.py`` takes minutes on two cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import tyro
from plain import SequentialBlur, plain_restorer, plain_sample
from timing import Result, interleaved, machine, table

from colddiff.config import RunConfig
from colddiff.degradation import Blur
from colddiff.diffusion import sample_algorithm2
from colddiff.optimisation import resolve_device
from colddiff.presets import preset
from colddiff.restorer import Restorer, build_restorer


def sampled(T: int) -> RunConfig:
    """The preset ``mnist`` with T levels, in float32: the reference has nothing else."""
    config = preset("mnist")
    return dataclasses.replace(
        config,
        degradation=dataclasses.replace(config.degradation, T=T),
        evaluation=dataclasses.replace(config.evaluation, levels=()),
        training=dataclasses.replace(config.training, precision="float32"),
    )


def calls(restorer: Restorer, xT: torch.Tensor, T: int) -> None:
    """T calls of the network and nothing else."""
    for s in range(T, 0, -1):
        restorer(xT, torch.full((len(xT),), s))


@torch.inference_mode()
def measure(seconds: float = 60.0, batch: int = 32) -> Iterator[Result]:
    """T = 20 and 200."""
    resolve_device("cpu")  # sets the process up, as a job does
    source = torch.Generator().manual_seed(0)
    xT = torch.rand(batch, 1, 32, 32, generator=source) - 1
    for T in (20, 200):
        yield from measure_one(T, xT, seconds)


def measure_one(T: int, xT: torch.Tensor, seconds: float) -> Iterator[Result]:
    """Network calls over sampling, and the plain loop over sampling."""
    config = sampled(T)
    restorer, blur = build_restorer(config).eval(), Blur(config.degradation, 32)
    plain = plain_restorer(config, restorer).eval()
    sequential = SequentialBlur(config.degradation, 1)

    def sample() -> None:
        sample_algorithm2(restorer, blur, xT)

    # Apart, because a round of the plain loop takes minutes and that one is about a few percent.
    bare, ours = interleaved(lambda: calls(restorer, xT, T), sample, seconds=2 * seconds)
    text = f"{bare:.2f} of {ours:.2f} s for {len(xT)} images"
    yield Result(f"network calls alone, T = {T}", bare / ours, 0.95, text)
    theirs, ours = interleaved(
        lambda: plain_sample(plain, sequential, xT), sample, seconds=seconds, repeats=2
    )
    text = f"{ours:.2f} s for {len(xT)} images, plain {theirs:.2f} s"
    yield Result(f"sampling against plain, T = {T}", theirs / ours, 2.0, text)


def main(seconds: float = 60.0, batch: int = 32) -> None:
    """Print the table.

    Args:
        seconds: spent on each T against the plain loop, twice that against the calls.
        batch: images sampled together.
    """
    print(machine(), end="\n\n")
    table(measure(seconds, batch))


if __name__ == "__main__":
    tyro.cli(main)
