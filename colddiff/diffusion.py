"""Loss, direct restoration and the paper's two samplers, as pure functions.

A restorer R maps (x_t, t) to an estimate x0_hat. Levels are visited from high to low; the paper's
list is T, T-1, …, 1, 0, and any falling list works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from colddiff.degradation import Degradation, Discrete
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
    degradation: Degradation,
    x0: Tensor,
    t: Tensor,
    kind: Literal["l1", "l2"] = "l1",
) -> Tensor:
    """Mean of |R(D(x0, t), t) - x0| (paper, equation 1) or of its square; float32 scalar."""
    x0_hat = restorer(degradation(x0, t), t).float()
    return F.l1_loss(x0_hat, x0) if kind == "l1" else F.mse_loss(x0_hat, x0)


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
        x0_hat = restorer(xs, _at(xs, s)).float()
        if observe is not None:
            observe(Step(s, xs, x0_hat))
        xs = degradation(x0_hat, _at(xs, s_next))
    return xs


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
    xs = xT
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = restorer(xs, _at(xs, s)).float()
        if observe is not None:
            observe(Step(s, xs, x0_hat))
        xs = xs - degradation(x0_hat, _at(xs, s)) + degradation(x0_hat, _at(xs, s_next))
    return xs


SAMPLERS = {"algorithm1": sample_algorithm1, "algorithm2": sample_algorithm2}


def _prepare(
    degradation: Degradation, levels: Sequence[int] | None
) -> tuple[Degradation, Sequence[int]]:
    levels = range(degradation.T, -1, -1) if levels is None else levels
    check_levels(levels, degradation.T)
    # The authors' samplers do not round, even where their training does.
    return (_Unrounded(degradation) if isinstance(degradation, Discrete) else degradation), levels


class _Unrounded:
    """A discrete degradation as the authors' samplers evaluate it."""

    def __init__(self, discrete: Discrete) -> None:
        self.discrete, self.T = discrete, discrete.T
        self.terminal = discrete.terminal

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.discrete.unrounded(x0, t)


def _at(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)
