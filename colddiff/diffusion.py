"""Loss, direct restoration and the paper's two samplers, as pure functions.

A restorer R maps (x_t, t) to an estimate x0_hat. Levels are visited from high to low; the paper's
list is T, T-1, …, 1, 0, and any falling list works.

Samplers keep x_s in float64, because each step adds and subtracts images that are equal but for a
faint residual. Some restorers do better so, others differ by 0.003 (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from colddiff.degradation import Degradation, Discrete, Stored
from colddiff.levels import check_levels

Restorer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One step of a sampler: the level, its x_t and the estimate made from it (``b c h w``)."""

    t: int
    xt: Tensor
    x0_hat: Tensor


Observer = Callable[[Step], None]
"""Called after each estimate: for progress, or ``steps.append`` for the trajectory."""


def restoration_loss(
    restorer: Restorer,
    xt: Tensor,
    t: Tensor,
    x0: Tensor,
    kind: Literal["l1", "l2"] = "l1",
    *,
    bounded: bool = False,
) -> Tensor:
    """Mean of |R(x_t, t) - x0| (paper, equation 1: x_t = D(x0, t)), or of its square; a scalar.

    ``bounded`` is for a restorer whose estimates will be clamped to [-1, 1]: where x0 is black
    (-1) or white (1), what lies beyond is as good as exact.
    """
    x0_hat = restorer(xt, t).float()
    if bounded:
        beyond = ((x0 <= -1) & (x0_hat < -1)) | ((x0 >= 1) & (x0_hat > 1))
        x0_hat = torch.where(beyond, x0, x0_hat)
    return F.l1_loss(x0_hat, x0) if kind == "l1" else F.mse_loss(x0_hat, x0)


@torch.no_grad()
def own_states(
    restorer: Restorer,
    degradation: Degradation,
    x0: Tensor,
    levels: tuple[Tensor, Tensor],
    *,
    bounded: bool = False,
) -> Tensor:
    """x_t as Algorithm 2 arrives there: x_u - D(x0_hat, u) + D(x0_hat, t), with x_u = D(x0, u).

    Sampling asks the restorer for estimates from such states, which hold its own earlier guesses,
    and not from D(x0, t).

    Args:
        restorer: R.
        degradation: D.
        x0: images, ``b c h w``.
        levels: u and t of each, int64 ``b``, u > t.
        bounded: clamp the estimate to [-1, 1].
    """
    u, t = levels
    xu = degradation(x0.double(), u)
    x0_hat = restorer(xu.float(), u).double()
    x0_hat = x0_hat.clamp(-1, 1) if bounded else x0_hat
    return (xu - degradation(x0_hat, u) + degradation(x0_hat, t)).float()


def restore_directly(restorer: Restorer, xT: Tensor, T: int) -> Tensor:
    """R(x_T, T): one call of the network (the paper's "direct" reconstruction)."""
    return restorer(xT, _at(xT, T))


def sample_algorithm1(
    restorer: Restorer,
    degradation: Degradation,
    xT: Tensor,
    levels: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Naive sampling (paper, Algorithm 1): x_s' = D(R(x_s, s), s').

    Args:
        restorer: R.
        degradation: D.
        xT: start, ``b c h w``.
        levels: falling list from T to 0; all levels by default.
        observe: called with every :class:`Step`.

    Raises:
        ValueError: for levels that do not fall from T to 0.
    """
    degradation, levels = _prepare(degradation, levels)
    xs = xT
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = _estimate(restorer, xs, s, observe)
        xs = degradation(x0_hat, _at(xs, s_next))
    return xs.float()


def sample_algorithm2(
    restorer: Restorer,
    degradation: Degradation,
    xT: Tensor,
    levels: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Transformation-agnostic cold sampling (paper, Algorithm 2, TACoS).

    x_s' = x_s - D(x0_hat, s) + D(x0_hat, s') with x0_hat = R(x_s, s): exact for any R when D is
    linear in s, and to first order otherwise. Arguments and errors as :func:`sample_algorithm1`.
    """
    degradation, levels = _prepare(degradation, levels)
    xs = xT.double()
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = _estimate(restorer, xs, s, observe)
        xs = xs - degradation(x0_hat, _at(xs, s)) + degradation(x0_hat, _at(xs, s_next))
    return xs.float()


SAMPLERS = {"algorithm1": sample_algorithm1, "algorithm2": sample_algorithm2}


def _estimate(restorer: Restorer, xs: Tensor, s: int, observe: Observer | None) -> Tensor:
    """R(x_s, s), which sees float32, in float64."""
    xs_float32 = xs.float()
    x0_hat = restorer(xs_float32, _at(xs, s))
    if observe is not None:
        observe(Step(s, xs_float32, x0_hat.float()))
    return x0_hat.double()


def _prepare(
    degradation: Degradation, levels: Sequence[int] | None
) -> tuple[Degradation, Sequence[int]]:
    levels = range(degradation.T, -1, -1) if levels is None else levels
    check_levels(levels, degradation.T)
    # The authors' samplers do not round, even where their training does.
    if isinstance(degradation, Discrete | Stored):
        degradation = _Unrounded(degradation)
    return degradation, levels


class _Unrounded:
    """A degradation that rounds, as the authors' samplers evaluate it."""

    def __init__(self, rounding: Discrete | Stored) -> None:
        self.rounding, self.T = rounding, rounding.T
        self.terminal = rounding.terminal

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.rounding.unrounded(x0, t)


def _at(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)
