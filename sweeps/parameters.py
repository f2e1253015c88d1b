"""Which parameters each space asks a trial for, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from colddiff.config import DegradationConfig, RunConfig
from colddiff.schema import require

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SpaceName = Literal["schedule", "steps", "levels", "paper", "recipe"]
LARGEST_T = 40
WIDEST_KERNEL = 31
AUTHORS_FAMILIES = ("constant", "linear", "exponential", "incremental", "individual")


@dataclass(frozen=True)
class Whole:
    """An integer in low..high; ``points`` are its values on a grid."""

    low: int
    high: int
    points: tuple[int, ...]
    step: int = 1
    log: bool = False

    def ask(self, trial: BaseTrial, name: str) -> int:
        """The trial's value."""
        return trial.suggest_int(name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Real:
    """A number in low..high, uniform in its logarithm; ``points`` are its values on a grid."""

    low: float
    high: float
    points: tuple[float, ...]

    def ask(self, trial: BaseTrial, name: str) -> float:
        """The trial's value."""
        return trial.suggest_float(name, self.low, self.high, log=True)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    points: tuple[str | int | float, ...]

    def ask(self, trial: BaseTrial, name: str) -> Any:
        """The trial's value."""
        return trial.suggest_categorical(name, self.points)


Parameter = Whole | Real | Choice


def check_base(space: SpaceName, base: RunConfig) -> None:
    """Raise ``ValueError`` for a base that has no such space around it."""
    blur = base.degradation
    if space in ("schedule", "steps", "paper"):
        require(blur.kind == "blur", "degradation.kind", blur.kind, f"blur for the space {space}")
    if space == "paper":
        allowed = f"one of {', '.join(AUTHORS_FAMILIES)} for the space paper"
        known = blur.schedule in AUTHORS_FAMILIES
        require(known, "degradation.schedule", blur.schedule, allowed)


def check_keep(space: SpaceName, base: RunConfig, keep: Collection[str]) -> None:
    """Raise ``ValueError`` for names that the recipe has not, and where nothing is left to vary.

    In the other spaces parameters make up for one another, so that none could be kept.
    """
    if keep:
        require(space == "recipe", "keep", " ".join(keep), f"empty for the space {space}")
    names = reference(space, base)
    for name in keep:
        require(name in names, "keep", name, f"one of {', '.join(names)} for the space {space}")
    left = any(name not in keep for name in names)
    require(left, "keep", " ".join(keep), "all but one at most: nothing is left to vary")


def reference(space: SpaceName, base: RunConfig, keep: Collection[str] = ()) -> dict[str, Any]:
    """The base's own values: the trial 0 of every study, whose configuration is the base itself.

    A schedule that is no shape stands under the parameters of the nearest one. Those to ``keep``
    are no values of a trial.
    """
    return {name: value for name, value in _reference(space, base).items() if name not in keep}


def _reference(space: SpaceName, base: RunConfig) -> dict[str, Any]:
    blur = base.degradation
    match space:
        case "schedule":
            return {
                "T": blur.T,
                "exponent": nearest_exponent(blur),
                "kernel_size": blur.widest_kernel,
                "padding": blur.padding,
            }
        case "steps":
            return {"T": blur.T}
        case "paper":
            return {
                "schedule": blur.schedule,
                "T": blur.T,
                "kernel_size": blur.widest_kernel,
                "ratio": last_over_first(blur),
            }
        case "levels":
            return {"calls": blur.T, "exponent": 1.0}
        case "recipe":
            return {
                "lr": base.optimiser.lr,
                "dim": base.model.dim,
                "loss": base.training.loss,
                "lr_schedule": base.optimiser.schedule,
                "ema_decay": base.training.ema_decay,
            }


def parameters(
    space: SpaceName, base: RunConfig, keep: Collection[str] = ()
) -> dict[str, Parameter]:
    """What the space asks for, but for those to ``keep``; every range holds the base's own value.

    All of a space's parameters are asked in every trial, also where the chosen family does not use
    one, because Gaussian processes, NSGA-II and grids need a space that is always the same.
    """
    return {name: value for name, value in _parameters(space, base).items() if name not in keep}


def _parameters(space: SpaceName, base: RunConfig) -> dict[str, Parameter]:
    own = _reference(space, base)
    steps = _whole(4, LARGEST_T, (5, 10, 20, 40), own.get("T"), log=True)
    widest = min(WIDEST_KERNEL, 2 * base.data.image_size - 3)
    kernel = _whole(5, widest, (11, 21, 31), own.get("kernel_size"), step=2)
    match space:
        case "schedule":
            return {
                "T": steps,
                "exponent": _real(0.25, 4.0, (0.5, 1.0, 2.0), own["exponent"]),
                "kernel_size": kernel,
                "padding": Choice(("circular", "reflect")),
            }
        case "steps":
            return {"T": _whole(4, LARGEST_T, (4, 6, 8, 10, 14, 20, 28, 40), own["T"], log=True)}
        case "paper":
            from sweeps.terminal import individual_steps

            possible = individual_steps(base) is not None or own["schedule"] == "individual"
            return {
                "schedule": Choice(AUTHORS_FAMILIES if possible else AUTHORS_FAMILIES[:-1]),
                "T": steps,
                "kernel_size": kernel,
                "ratio": _real(1.0, 16.0, (2.0, 8.0), own["ratio"]),
            }
        case "levels":
            return {
                "calls": _whole(1, own["calls"], (1, 2, 3, 4, 6, 8), own["calls"], log=True),
                "exponent": _real(0.25, 4.0, (0.5, 1.0, 2.0, 3.0), 1.0),
            }
        case "recipe":
            return _recipe(own, least=32 if base.model.name == "ddpm" else 4)


def _recipe(own: Mapping[str, Any], least: int) -> dict[str, Parameter]:
    """Widths are the base's, half and twice that, as far as the network has them."""
    dim = own["dim"]
    narrower = dim // 2 - dim // 2 % (32 if least == 32 else 2)
    return {
        "lr": _real(1e-5, 1e-2, (1e-4, 1e-3), own["lr"]),
        "dim": Choice(tuple(sorted({max(least, narrower), dim, min(1024, 2 * dim)}))),
        "loss": Choice(("l1", "l2")),
        "lr_schedule": Choice(("constant", "cosine")),
        "ema_decay": Choice(tuple(sorted({0.99, 0.995, 0.999, own["ema_decay"]}))),
    }


def _whole(
    low: int,
    high: int,
    points: tuple[int, ...],
    own: int | None,
    *,
    step: int = 1,
    log: bool = False,
) -> Whole:
    own = low if own is None else own
    low, high = min(low, own), max(high, own)
    high -= (high - low) % step
    within = {point for point in points if low <= point <= high and (point - low) % step == 0}
    return Whole(low, high, tuple(sorted(within | {own})), step, log)


def _real(low: float, high: float, points: tuple[float, ...], own: float) -> Real:
    return Real(min(low, own), max(high, own), tuple(sorted({*points, own})))


def nearest_exponent(blur: DegradationConfig) -> float:
    """The p in 0.25..4 of the shape that has half of the steps' variance where the schedule has.

    Rounded to four digits.
    """
    if blur.schedule == "shape":
        return blur.exponent
    half = blur.T // 2
    if half == 0:
        return 1.0
    share = _variance(blur, half) / _variance(blur, blur.T)
    exponent = math.log(share) / math.log(half / blur.T) if share > 0 else 4.0
    return float(f"{min(4.0, max(0.25, exponent)):.4g}")


def _variance(blur: DegradationConfig, t: int) -> float:
    """The variance of the schedule's kernels up to level t, square pixels."""
    from colddiff.degradation import taps_of_step

    total = 0.0
    for i in range(t - 1 if blur.schedule == "individual" else 0, t):
        taps = taps_of_step(blur, i).tolist()
        total += sum(tap * (j - len(taps) // 2) ** 2 for j, tap in enumerate(taps))
    return total


def last_over_first(blur: DegradationConfig) -> float:
    """Of linear and exponential the last step's deviation over the first's, of others 1."""
    match blur.schedule:
        case "linear":
            return 1 + blur.growth * (blur.T - 1) / blur.sigma
        case "exponential":
            return math.exp(blur.growth * (blur.T - 1))
        case _:
            return 1.0
