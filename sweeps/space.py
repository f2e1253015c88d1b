"""Spaces: from a trial to the configuration of a run.

Whatever a trial samples lands in the configuration, so a trial is an ordinary run: with a run
folder, a record, and ``jobs/launch.py train --config`` to repeat it. In the spaces of schedules
every configuration blurs as much as the base (:mod:`sweeps.terminal`).

The same configuration may come up in several trials (few values, kernels that were widened alike,
a family without parameters, in ``levels`` always): they share a run folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from colddiff.config import DegradationConfig, RunConfig
from colddiff.presets import labelled
from sweeps.parameters import (
    Choice,
    Parameter,
    Real,
    SpaceName,
    Whole,
    check_base,
    check_keep,
    nearest_exponent,
    parameters,
    reference,
)
from sweeps.terminal import (
    Outline,
    equalised,
    individual_steps,
    leaves_more_by,
    require_equal_terminal,
)

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SCHEDULES: tuple[SpaceName, ...] = ("schedule", "steps", "paper")
"""The spaces whose trials blur differently."""
LEAVES_MORE = "leaves more"
__all__ = [
    "SCHEDULES",
    "Choice",
    "Parameter",
    "Real",
    "SpaceName",
    "Whole",
    "check_base",
    "check_keep",
    "configured",
    "grid",
    "parameters",
    "reference",
    "suggest",
]


def suggest(
    space: SpaceName, trial: BaseTrial, base: RunConfig, keep: Collection[str] = ()
) -> RunConfig:
    """Ask the trial for its values; the configuration of its run.

    schedule: shape exponent, kernel, padding and T. steps: T alone. paper: the authors' families.
    levels: which levels the sampler visits on the trained base (``evaluation.levels``). recipe:
    rate, width, loss and average. Parameters to ``keep`` are the base's. What had to differ from
    the values, because no schedule as strong as the base has them, is the trial's user attribute
    ``adjusted``.

    A schedule whose residual is no larger than the base's may still tell more of the images in it.
    It is tried, but not feasible: Optuna's constraint ``leaves more`` leads samplers away from it,
    and such a trial is never the best.

    Raises:
        ValueError: for a base without such a space, and where the schedules need absent data.
    """
    check_base(space, base)
    asked = parameters(space, base, keep).items()
    values = reference(space, base) | {name: each.ask(trial, name) for name, each in asked}
    config, adjusted = configured(space, values, base)
    if adjusted:
        trial.set_user_attr("adjusted", adjusted)
    if space in SCHEDULES and LEAVES_MORE not in trial.constraints:
        same = config.degradation == base.degradation  # told without the data
        trial.set_constraint(LEAVES_MORE, 0.0 if same else leaves_more_by(config, base))
    return config


def grid(space: SpaceName, base: RunConfig, keep: Collection[str] = ()) -> dict[str, list[Any]]:
    """A few values of each parameter, the base's among them, for the grid sampler."""
    check_base(space, base)
    return {name: list(each.points) for name, each in parameters(space, base, keep).items()}


def configured(
    space: SpaceName, values: Mapping[str, Any], base: RunConfig
) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration of these values, and which of them it could not keep, as they are in it.

    The reference's is the base itself. Outside of levels and recipe the sampler visits all levels,
    because the base's own lists do not fit another T.
    """
    match space:
        case "levels":
            levels = visited(base.degradation.T, **values)
            calls = len(levels) - 1  # where levels fall together, fewer than were asked for
            merged = {"calls": calls} if calls != values["calls"] else {}
            return with_levels(base, ("-".join(map(str, levels)),)), merged
        case "recipe":
            return labelled(_recipe(values, base)), {}
    base = with_levels(base, ())
    if values.get("schedule") in ("constant", "incremental"):
        values = {**values, "ratio": 1.0}  # which they do not have
    if values == reference(space, base):
        return base, {}
    blur, adjusted = _blur(space, values, base)
    config = labelled(dataclasses.replace(base, degradation=blur))
    require_equal_terminal(config, base)
    return config, adjusted


def with_levels(config: RunConfig, levels: tuple[str, ...]) -> RunConfig:
    """The configuration with other lists of levels."""
    evaluation = dataclasses.replace(config.evaluation, levels=levels)
    return dataclasses.replace(config, evaluation=evaluation)


def visited(T: int, calls: int, exponent: float) -> tuple[int, ...]:
    """The levels round(T (1 - k / calls)^exponent), k = 0..calls, each once.

    An exponent above 1 leaps over the high levels, one below 1 over the low ones.
    """
    levels = {round(T * (1 - k / calls) ** exponent) for k in range(calls + 1)}
    return tuple(sorted(levels, reverse=True))


def _blur(
    space: SpaceName, values: Mapping[str, Any], base: RunConfig
) -> tuple[DegradationConfig, dict[str, Any]]:
    own = base.degradation
    asked = Outline("shape", values["T"], own.widest_kernel, own.padding)
    match space:
        case "schedule":
            kernel, padding, slope = values["kernel_size"], values["padding"], values["exponent"]
            asked = Outline("shape", values["T"], kernel, padding, slope)
        case "paper":
            family, kernel, slope = values["schedule"], values["kernel_size"], values["ratio"]
            asked = Outline(family, values["T"], kernel, own.padding, slope)
            if family == "individual":
                return _individual(base)
        case _:
            asked = dataclasses.replace(asked, slope=nearest_exponent(own))
    blur, used = equalised(asked, base)
    slope_name = "ratio" if space == "paper" else "exponent"
    names = {"T": "T", "kernel_size": "kernel_size", "slope": slope_name}
    changed = {
        name: getattr(used, field)
        for field, name in names.items()
        if getattr(used, field) != getattr(asked, field)
    }
    return blur, changed


def _individual(base: RunConfig) -> tuple[DegradationConfig, dict[str, Any]]:
    T = individual_steps(base)
    if T is None:
        raise ValueError(
            "degradation.schedule = 'individual' is not allowed: at no T does it blur as much as "
            "the base"
        )
    return dataclasses.replace(base.degradation, schedule="individual", T=T), {"T": T}


def _recipe(values: Mapping[str, Any], base: RunConfig) -> RunConfig:
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, dim=values["dim"]),
        optimiser=dataclasses.replace(
            base.optimiser, lr=values["lr"], schedule=values["lr_schedule"]
        ),
        training=dataclasses.replace(
            base.training, loss=values["loss"], ema_decay=values["ema_decay"]
        ),
    )
