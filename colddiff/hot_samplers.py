"""Samplers of hot diffusion, the Gaussian-noise baseline: noise estimated, and noise drawn anew.

Algorithm 2 with its noise held fixed is the paper's; here are the two that it is compared with.
x_t = sqrt(a_t) x0 + sqrt(1 - a_t) z, with a_t the signal power of :class:`.degradation.Noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colddiff.degradation import Noise
from colddiff.diffusion import Observer, Restorer, Step
from colddiff.levels import check_levels
from colddiff.randomness import generator

Draw = Callable[[int], Tensor]
"""Standard normal ``b c h w`` for the step that leaves level ``s``."""


def sample_ddim(
    restorer: Restorer,
    noise: Noise,
    xT: Tensor,
    levels: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Algorithm 2 with the noise estimated at each step, which is DDIM (arXiv:2010.02502, eq. 12).

    z_hat = (x_s - sqrt(a_s) x0_hat) / sqrt(1 - a_s), then x_s' = D(x0_hat, s') with z_hat.

    Args:
        restorer: R.
        noise: D.
        xT: start, ``b c h w``.
        levels: falling list from T to 0; all levels by default.
        observe: called with every :class:`Step`.

    Raises:
        ValueError: for levels that do not fall from T to 0.
    """
    levels = _checked(noise, levels)
    xs = xT
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = _estimate(restorer, xs, s, observe)
        power = noise.signal_power[s]
        z_hat = (xs - power.sqrt() * x0_hat) / (1 - power).sqrt()
        xs = noise(x0_hat, _at(xs, s_next), z_hat)
    return xs


def sample_ddpm(
    restorer: Restorer,
    noise: Noise,
    xT: Tensor,
    draw: Draw,
    levels: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Ancestral sampling, DDPM (arXiv:2006.11239, eq. 6 and 7): x_s' from q(x_s' | x_s, x0_hat).

    Args:
        restorer: R.
        noise: D.
        xT: start, ``b c h w``.
        draw: the fresh noise of each step.
        levels: falling list from T to 0, not only all of them; all by default.
        observe: called with every :class:`Step`.

    Raises:
        ValueError: for levels that do not fall from T to 0.
    """
    levels = _checked(noise, levels)
    xs = xT
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = _estimate(restorer, xs, s, observe)
        mean, std = posterior(noise, x0_hat, xs, s, s_next)
        xs = mean + std * draw(s) if s_next > 0 else mean
    return xs


def fresh_noise(seed: int, purpose: str, indices: Sequence[int], like: Tensor) -> Draw:
    """The noise of images ``indices`` at each level, which no batching changes."""

    def draw(s: int) -> Tensor:
        sources = (generator(seed, f"{purpose} {index}", s) for index in indices)
        z = torch.stack([torch.randn(like.shape[1:], generator=each) for each in sources])
        return z.to(like.device)

    return draw


def posterior(noise: Noise, x0: Tensor, xs: Tensor, s: int, s_next: int) -> tuple[Tensor, Tensor]:
    """Mean (``b c h w``) and deviation (scalar) of q(x_s' | x_s, x0), for any levels s' < s."""
    power, power_next = noise.signal_power[s], noise.signal_power[s_next]
    kept = power / power_next  # signal power of the part from s' to s
    mean = (power_next.sqrt() * (1 - kept) * x0 + kept.sqrt() * (1 - power_next) * xs) / (1 - power)
    return mean, ((1 - power_next) * (1 - kept) / (1 - power)).sqrt()


def _estimate(restorer: Restorer, xs: Tensor, s: int, observe: Observer | None) -> Tensor:
    x0_hat = restorer(xs, _at(xs, s)).float()
    if observe is not None:
        observe(Step(s, xs, x0_hat))
    return x0_hat


def _checked(noise: Noise, levels: Sequence[int] | None) -> Sequence[int]:
    levels = range(noise.T, -1, -1) if levels is None else levels
    check_levels(levels, noise.T)
    return levels


def _at(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)
