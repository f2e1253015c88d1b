"""Spaces: what trials sample, and the configurations that come of it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial
from test_terminal import plain_residual
from tiny import replaced, tiny

from colddiff.config import DegradationConfig, EvaluationConfig, RunConfig
from colddiff.levels import check_levels
from colddiff.presets import PRESETS, preset
from sweeps import space as spaces
from sweeps.space import (
    Choice,
    SpaceName,
    check_keep,
    configured,
    grid,
    parameters,
    reference,
    suggest,
)
from sweeps.terminal import linear_rmse

SPACES: tuple[SpaceName, ...] = ("schedule", "steps", "levels", "paper", "recipe")
SCHEDULES: tuple[SpaceName, ...] = ("schedule", "steps", "paper")


def anywhere(space: SpaceName, base: RunConfig, source: random.Random) -> dict[str, Any]:
    """Values anywhere in the space, its corners more often than not."""
    values: dict[str, Any] = {}
    for name, parameter in parameters(space, base).items():
        if isinstance(parameter, Choice):
            values[name] = source.choice(parameter.points)
        else:
            # Many steps take long to solve for; tests/test_terminal.py has some.
            low, high = parameter.low, min(parameter.high, 10) if name == "T" else parameter.high
            inside = low * (high / low) ** source.random()
            value: float = source.choice([low, high, inside])
            values[name] = value
            if isinstance(parameter, spaces.Whole):
                values[name] = int(value) // parameter.step * parameter.step + low % parameter.step
                values[name] = min(high, max(low, values[name]))
    return values


@pytest.mark.parametrize("space", SCHEDULES)
def test_no_schedule_blurs_less_than_the_base(space: SpaceName) -> None:
    base = tiny()
    target = plain_residual(base.degradation, base.data)
    source, seen = random.Random(space), set()
    for _ in range(30 if space == "paper" else 8):
        config = suggest(space, FixedTrial(anywhere(space, base, source)), base)
        left = plain_residual(config.degradation, base.data)
        assert left <= target * 1.001
        if config.degradation.schedule != "individual":
            assert left >= target * 0.999
        others = dataclasses.replace(config, degradation=base.degradation, preset=base.preset)
        assert others == base
        seen.add(config.run_id)
    assert len(seen) >= 3


def test_a_weaker_schedule_cannot_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the strength were solved wrongly, the configuration would be refused."""
    original = spaces.equalised

    def weaker(*arguments: Any) -> Any:
        blur, used = original(*arguments)
        return dataclasses.replace(blur, total_variance=0.9 * blur.total_variance), used

    monkeypatch.setattr(spaces, "equalised", weaker)
    trial = FixedTrial({"T": 6, "exponent": 2.0, "kernel_size": 11, "padding": "circular"})
    with pytest.raises(ValueError, match="blurring less is no way to restore better"):
        suggest("schedule", trial, tiny())


def test_what_tells_more_of_the_images_is_not_feasible() -> None:
    base = tiny()
    study = optuna.create_study()
    found = set()
    for T, exponent in ((4, 1.0), (4, 4.0), (10, 1.0), (10, 0.25), (6, 2.0)):
        values = {"T": T, "exponent": exponent, "kernel_size": 11, "padding": "circular"}
        study.enqueue_trial(values)
        trial = study.ask()
        config = suggest("schedule", trial, base)
        suggest("schedule", trial, base)  # as who goes on with it does, without a warning
        own, allowed = (linear_rmse(c.degradation, c.data) for c in (config, base))
        (excess,) = trial.constraints.values()
        assert (excess > 0) == (own < 0.995 * allowed)
        found.add(excess > 0)
    assert found == {True, False}


@pytest.mark.parametrize("preset_name", ["cifar10", "celeba"])
def test_steps_keep_the_shape_of_the_base(preset_name: str) -> None:
    base = dataclasses.replace(preset(preset_name), data=tiny().data)
    base = replaced(base, "degradation", T=12)
    config = configured("steps", {"T": 8}, base)[0]
    assert config.degradation.exponent == reference("schedule", base)["exponent"] > 1.05


# Schedules are of blur alone.
BASES = [
    (name, space)
    for name in PRESETS
    for space in SPACES
    if preset(name).degradation.kind == "blur" or space not in SCHEDULES
]


@pytest.mark.parametrize(("name", "space"), BASES)
def test_the_reference_is_the_base_itself(name: str, space: SpaceName) -> None:
    """As trial 0 of a study, without a warning that a value lies outside; no data are needed."""
    base = preset(name)
    if space == "paper":  # which must know whether the individual family is possible
        base = dataclasses.replace(base, data=tiny().data)
    study = optuna.create_study()
    study.enqueue_trial(reference(space, base))
    trial = study.ask()
    config = suggest(space, trial, base)
    assert trial.params == reference(space, base)
    assert config.run_id == base.run_id
    assert config.preset == name
    assert "adjusted" not in trial.user_attrs
    if space in SCHEDULES:
        assert config.evaluation.levels == ()  # all levels, as those with another T
    if space == "recipe":
        assert config == base


@pytest.mark.parametrize("space", SPACES)
def test_grids_hold_the_reference_and_only_what_can_be_suggested(space: SpaceName) -> None:
    base = tiny()
    points = grid(space, base)
    own = reference(space, base)
    assert set(points) == set(own)
    assert all(own[name] in values for name, values in points.items())
    for name, values in points.items():
        assert len(set(values)) == len(values)
        for value in values[:: len(values) - 1]:
            suggest(space, FixedTrial(own | {name: value}), base)  # warns of a value outside


def test_what_is_kept_is_the_bases_and_no_value_of_a_trial() -> None:
    base = replaced(tiny(), "optimiser", schedule="constant")
    own = reference("recipe", base)
    for name in own:
        asked, source = parameters("recipe", base, [name]), random.Random(name)
        assert list(asked) == [other for other in own if other != name]
        assert grid("recipe", base, [name]).keys() == asked.keys()
        assert reference("recipe", base, [name]).keys() == asked.keys()
        values = anywhere("recipe", base, source)
        del values[name]
        trial = FixedTrial(values)
        config = suggest("recipe", trial, base, [name])
        assert trial.params == values  # it was not asked for
        assert reference("recipe", config) == values | {name: own[name]}


@pytest.mark.parametrize(
    ("space", "keep", "told"),
    [
        ("recipe", ["width"], "keep = 'width' is not allowed: it must be one of lr, dim"),
        ("recipe", ["lr", "dim", "loss", "lr_schedule", "ema_decay"], "nothing is left to vary"),
        ("schedule", ["T"], "keep = 'T' is not allowed: it must be empty for the space schedule"),
        ("levels", ["calls"], "empty for the space levels"),
    ],
)
def test_what_cannot_be_kept_is_refused(space: SpaceName, keep: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        check_keep(space, tiny(), keep)


def test_schedule_values_stand_in_the_configuration() -> None:
    values = {"T": 7, "exponent": 1.7, "kernel_size": 13, "padding": "reflect"}
    trial = FixedTrial(values)
    blur = suggest("schedule", trial, tiny()).degradation
    assert blur.schedule == "shape"
    assert (blur.T, blur.exponent, blur.kernel_size, blur.padding) == tuple(values.values())
    assert trial.user_attrs == {}
    narrow = FixedTrial(values | {"T": 4, "kernel_size": 5})
    widened = suggest("schedule", narrow, tiny()).degradation.kernel_size
    assert widened > 5
    assert narrow.user_attrs == {"adjusted": {"kernel_size": widened}}


def test_steps_vary_T_alone() -> None:
    base = tiny()
    for T in (4, 6, 25):
        blur = suggest("steps", FixedTrial({"T": T}), base).degradation
        assert blur.T == T
        assert blur.padding == "circular"
        assert blur.schedule == ("constant" if T == base.degradation.T else "shape")
        assert T == 4 or blur.exponent == 1.0
    bent = replaced(base, "degradation", schedule="shape", exponent=2.0, total_variance=4.0)
    assert suggest("steps", FixedTrial({"T": 9}), bent).degradation.exponent == 2.0


def test_the_authors_families() -> None:
    base = tiny()
    for family in ("constant", "linear", "exponential", "incremental", "individual"):
        values = {"schedule": family, "T": 8, "kernel_size": 9, "ratio": 3.0}
        trial = FixedTrial(values)
        blur = suggest("paper", trial, base).degradation
        assert (blur.schedule, blur.padding) == (family, "circular")
        if family == "individual":
            assert trial.user_attrs == {"adjusted": {"T": blur.T}}
        else:
            assert (blur.T, blur.kernel_size) == (8, 9)
        assert (blur.growth > 0) is (family in ("linear", "exponential"))


def test_a_family_without_a_ratio_ignores_it() -> None:
    base = tiny()
    values = {"schedule": "constant", "T": 4, "kernel_size": 5}
    one, other = (suggest("paper", FixedTrial(values | {"ratio": r}), base) for r in (1.0, 9.0))
    assert one == other
    assert one.run_id == base.run_id


def test_families_that_cannot_blur_enough_are_left_out() -> None:
    strong = replaced(tiny(), "degradation", T=60, padding="reflect")
    assert "individual" not in grid("paper", strong)["schedule"]
    assert "individual" in grid("paper", tiny())["schedule"]


def test_the_same_values_are_the_same_run() -> None:
    values = {"T": 5, "exponent": 0.7, "kernel_size": 9, "padding": "reflect"}
    first = suggest("schedule", FixedTrial(values), tiny()).run_id
    spaces.require_equal_terminal.__globals__["terminal_residual"].cache_clear()
    assert suggest("schedule", FixedTrial(values), tiny()).run_id == first


def test_levels_by_hand() -> None:
    base = preset("demo")
    for values, levels in (
        ({"calls": 1, "exponent": 1.0}, "20-0"),
        ({"calls": 2, "exponent": 1.0}, "20-10-0"),
        ({"calls": 4, "exponent": 2.0}, "20-11-5-1-0"),
        ({"calls": 5, "exponent": 0.5}, "20-18-15-13-9-0"),
        ({"calls": 20, "exponent": 1.0}, "-".join(map(str, range(20, -1, -1)))),
    ):
        config = suggest("levels", FixedTrial(values), base)
        assert config.evaluation.levels == (levels,)
        assert config.run_id == base.run_id
        assert dataclasses.replace(config, evaluation=base.evaluation) == base


@pytest.mark.parametrize("T", [1, 2, 7, 40])
def test_levels_always_fall_to_0(T: int) -> None:
    base = replaced(tiny(), "degradation", T=T)
    for calls, exponent in itertools.product(range(1, T + 1), (0.25, 0.6, 1.0, 1.9, 4.0)):
        config = suggest("levels", FixedTrial({"calls": calls, "exponent": exponent}), base)
        (levels,) = config.evaluation.level_lists
        check_levels(levels, T)
        assert len(levels) <= calls + 1


@pytest.mark.parametrize("dim", [32, 96, 128])
def test_recipes_of_the_ddpm_network_have_widths_that_it_has(dim: int) -> None:
    base = replaced(preset("cifar10"), "model", dim=dim)
    widths = set(grid("recipe", base)["dim"])
    assert dim in widths and 2 * dim in widths
    for width in widths:
        suggest("recipe", FixedTrial(reference("recipe", base) | {"dim": width}), base)


def test_recipes_leave_the_degradation_alone() -> None:
    base = replaced(tiny(), "evaluation", levels=("4-2-0",))
    values = {"lr": 3e-4, "dim": 8, "loss": "l2", "lr_schedule": "constant", "ema_decay": 0.995}
    config = suggest("recipe", FixedTrial(values), base)
    assert config.degradation == base.degradation
    assert config.evaluation == EvaluationConfig(levels=("4-2-0",))
    assert (config.optimiser.lr, config.optimiser.schedule) == (3e-4, "constant")
    assert (config.model.dim, config.training.loss) == (8, "l2")
    assert config.training.ema_decay == 0.995
    assert config.run_id != base.run_id


def test_changed_presets_say_so() -> None:
    config = suggest("recipe", FixedTrial(reference("recipe", preset("demo")) | {"dim": 64}),
                     preset("demo"))  # fmt: skip
    assert config.preset == "demo (changed)"


@pytest.mark.parametrize(
    ("blur", "exponent"),
    [
        (DegradationConfig(), 1.0),
        (DegradationConfig(T=1), 1.0),
        (DegradationConfig(schedule="shape", exponent=2.5, total_variance=9.0), 2.5),
        # Variances grow as (i + 1)²: 385 of 2,870 lie in the first ten steps.
        (DegradationConfig(schedule="incremental", sigma=0.7, kernel_size=255), 2.898),
    ],
    ids=str,
)
def test_the_nearest_shape(blur: DegradationConfig, exponent: float) -> None:
    base = RunConfig(degradation=blur)
    assert reference("schedule", base)["exponent"] == pytest.approx(exponent, abs=2e-3)


def test_the_ratio_of_the_authors_schedules() -> None:
    assert reference("paper", preset("mnist"))["ratio"] == 1
    cifar10, celeba = (reference("paper", preset(name))["ratio"] for name in ("cifar10", "celeba"))
    assert cifar10 == pytest.approx(0.84 / 0.35)
    assert celeba == pytest.approx(7.316, rel=1e-3)  # exp(1.99)


def test_bases_without_such_a_space_are_refused() -> None:
    noise = replaced(tiny(), "degradation", kind="noise")
    for space in SCHEDULES:
        expected = (
            f"degradation.kind = 'noise' is not allowed: it must be blur for the space {space}"
        )
        with pytest.raises(ValueError, match=re.escape(expected)):
            suggest(space, FixedTrial({}), noise)
    assert suggest("levels", FixedTrial({"calls": 1, "exponent": 1.0}), noise).evaluation.levels
    shape = replaced(tiny(), "degradation", schedule="shape", total_variance=7.0)
    with pytest.raises(ValueError, match=r"degradation.schedule = 'shape' .* one of constant"):
        grid("paper", shape)


def test_a_stored_trial_gives_its_configuration_again() -> None:
    base = tiny()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    trial = study.ask()
    config = suggest("schedule", trial, base)
    study.tell(trial, 1.0)
    assert suggest("schedule", study.trials[0], base) == config
    assert configured("schedule", study.trials[0].params, base)[0] == config
