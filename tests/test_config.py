"""The configuration tree: what is refused, and what survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from typing import Any, Literal

import pytest
from tiny import changed

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrainingConfig,
)
from colddiff.presets import PRESETS, preset

SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "degradation": DegradationConfig,
    "model": ModelConfig,
    "optimiser": OptimiserConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "generation": GenerationConfig,
}
FIELDS = [
    (section, field.name, typing.get_type_hints(cls)[field.name])
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
]

# What is out of range, a list for every field that has a range.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "data.image_size": [7, 1025, -1],
    "data.validation": [-1],
    "data.folder": ["faces"],  # data.name is not folder
    "degradation.T": [0, 10_001, -5],
    "degradation.kernel_size": [0, 10, 257, -1],
    "degradation.sigma": [0.0, -1.0],
    "degradation.exponent": [0.0, -2.0],
    "degradation.total_variance": [0.0, -1.0],
    "model.dim": [2, 33, 1026, 0],
    "model.mults": [(), (1,) * 9],
    "model.patch": [0, 3, 8],
    "model.dropout": [-0.1, 1.0, 0.1],  # model.name is not ddpm
    "optimiser.lr": [0.0, 10.0, -1e-3],
    "optimiser.weight_decay": [-0.1],
    "optimiser.warmup_steps": [-1],
    "optimiser.clip_norm": [-1.0],
    "training.steps": [0, -1],
    "training.batch_size": [0],
    "training.accumulation": [0],
    "training.seed": [-1, 2**31],
    "training.ema_decay": [1.0, -0.1],
    "training.own_states": [-0.1, 1.1],
    "training.ema_every": [0],
    "training.ema_start": [-1],
    "training.log_every": [0],
    "training.validate_every": [-1],
    "training.checkpoint_every": [0],
    "training.keep_every": [-1],
    "training.workers": [-1],
    "evaluation.samples": [1, -1],
    "evaluation.batch_size": [0],
    "evaluation.by_level": [-1],
    "evaluation.images": [-1],
    "generation.n": [0, 1_000_001],
    "generation.components": [0, 1001],
    "generation.symmetry_noise": [-0.001],
    "generation.seed": [-1, 2**31],
    "generation.batch_size": [0],
    "generation.step": [-1],
}


def message(name: str, value: Any) -> str:
    return "^" + re.escape(f"{name} = {value!r} is not allowed: it must be ")


def wrong_types(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return ["nonsense", None, 3]
    if typing.get_origin(hint) is tuple:
        return ["12", 1, None]
    numbers = [math.nan, math.inf, -math.inf, 10**400, True, "1", None]
    return {
        int: [True, 1.0, "1", None],
        float: numbers,
        bool: [0, 1, "true", None],
        str: [1, None, b"x"],
    }[hint]


@pytest.mark.parametrize(("section", "name", "hint"), FIELDS)
def test_values_of_a_wrong_type_are_refused(section: str, name: str, hint: Any) -> None:
    for value in wrong_types(hint):
        with pytest.raises(ValueError, match=message(f"{section}.{name}", value)):
            SECTIONS[section](**{name: value})


@pytest.mark.parametrize("dotted", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(dotted: str) -> None:
    section, name = dotted.split(".")
    for value in OUT_OF_RANGE[dotted]:
        with pytest.raises(ValueError, match=message(dotted, value)):
            SECTIONS[section](**{name: value})


def test_every_number_has_a_range_or_needs_none() -> None:
    kinds = (int, float, tuple[int, ...])
    numbers = {f"{section}.{name}" for section, name, hint in FIELDS if hint in kinds}
    assert numbers - set(OUT_OF_RANGE) == {"degradation.growth"}  # any finite number


def test_entries_of_lists_are_checked() -> None:
    with pytest.raises(ValueError, match=message("model.mults", 1.5)):
        ModelConfig(mults=(1, 1.5))  # type: ignore[arg-type]
    for bad in (0, 65):
        with pytest.raises(ValueError, match=message("model.mults", (1, bad))):
            ModelConfig(mults=(1, bad))
    with pytest.raises(ValueError, match=message("evaluation.levels", 20)):
        EvaluationConfig(levels=(20,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message("levels", "20,10,0")):
        EvaluationConfig(levels=("20-10-0", "20,10,0"))
    with pytest.raises(ValueError, match=message("levels", "20-")):
        GenerationConfig(levels="20-")


def test_extreme_valid_values_are_accepted() -> None:
    DataConfig(image_size=11)
    DataConfig(image_size=1024)
    DegradationConfig(T=1, kernel_size=1)
    DegradationConfig(T=10_000, kernel_size=255)
    ModelConfig(dim=4, mults=(64,))
    TrainingConfig(seed=2**31 - 1, ema_decay=0.0, steps=1)
    EvaluationConfig(samples=2)
    GenerationConfig(symmetry_noise=0.0, n=1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("growth", {"schedule": "linear", "sigma": 0.5, "growth": -0.1, "T": 6}),  # ends at 0
        ("growth", {"schedule": "linear", "sigma": 1e308, "growth": 1e308}),
        ("growth", {"schedule": "exponential", "growth": 5.0, "T": 11}),
        ("growth", {"schedule": "exponential", "growth": -5.0, "T": 11}),
        ("total_variance", {"schedule": "shape", "total_variance": 201.0, "T": 20}),
        ("total_variance", {"schedule": "shape", "total_variance": 180.0, "exponent": 3.0}),
        ("discrete", {"kind": "noise", "discrete": True}),
    ],
)
def test_fields_of_a_degradation_that_do_not_fit_together(
    name: str, values: dict[str, Any]
) -> None:
    field = {"growth": 0.0, "total_variance": 180.0, "discrete": True} | values
    with pytest.raises(ValueError, match=message(f"degradation.{name}", field[name])):
        DegradationConfig(**values)


def test_schedules_just_inside_their_limits_are_accepted() -> None:
    DegradationConfig(schedule="linear", sigma=0.5, growth=-0.1, T=5)
    DegradationConfig(schedule="exponential", growth=4.9, T=11)
    # A flat kernel of 11 taps has variance (11² - 1) / 12 = 10 square pixels, 20 of them 200.
    DegradationConfig(schedule="shape", total_variance=199.0, T=20)
    # Hot diffusion has no blur whose schedule could be wrong.
    DegradationConfig(kind="noise", schedule="shape", total_variance=1e6)


@pytest.mark.parametrize(
    ("name", "value", "sections"),
    [
        ("data.folder", "", {"data": {"name": "folder"}}),
        ("data.image_size", 36, {"data": {"image_size": 36}}),  # four resolutions: 8
        ("data.image_size", 32, {"model": {"mults": (1,) * 5, "patch": 4}}),
        ("degradation.kernel_size", 65, {"degradation": {"kernel_size": 65, "padding": "reflect"}}),
        (
            "degradation.kernel_size",
            79,
            {"degradation": {"schedule": "individual", "T": 40, "padding": "reflect"}},
        ),
        (
            "model.conditioning",
            "wiener",
            {"model": {"conditioning": "wiener"}, "degradation": {"kind": "noise"}},
        ),
        (
            "optimiser.warmup_steps",
            11,
            {"optimiser": {"warmup_steps": 11}, "training": {"steps": 10}},
        ),
        ("levels", "10-0", {"evaluation": {"levels": ("10-0",)}}),
        ("levels", "20-10", {"evaluation": {"levels": ("20-0", "20-10")}}),
        ("levels", "20-10-10-0", {"evaluation": {"levels": ("20-10-10-0",)}}),
    ],
)
def test_sections_that_do_not_fit_together(
    name: str, value: Any, sections: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=message(name, value)):
        changed(RunConfig(), sections)


def test_the_widest_kernels_that_fit_are_accepted() -> None:
    changed(RunConfig(), {"degradation": {"kernel_size": 63, "padding": "reflect"}})
    changed(RunConfig(), {"degradation": {"kernel_size": 255, "padding": "circular"}})
    changed(
        RunConfig(),
        {"degradation": {"schedule": "individual", "T": 32, "padding": "reflect"}},
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", 16),
        ("dim", 48),
        ("dim", 1000),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("time_embedding", False),
    ],
)
def test_what_the_ddpm_network_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=message(f"model.{name}", value)):
        ModelConfig(name="ddpm", **{name: value})


def test_what_the_ddpm_network_can_be() -> None:
    ModelConfig(name="ddpm", dim=32, dropout=0.0)
    ModelConfig(name="ddpm", dim=1024, dropout=0.99)
    ModelConfig(name="ddpm", dim=96, mults=(1, 3, 5), patch=2, residual=True, bounded=True)


def test_sections_must_be_sections() -> None:
    with pytest.raises(ValueError, match="^data = 5 is not allowed: it must be of type DataConfig"):
        RunConfig(data=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message("preset", 5)):
        RunConfig(preset=5)  # type: ignore[arg-type]


def test_the_tree_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.steps = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.preset = "x"  # type: ignore[misc]
    assert hash(config) == hash(RunConfig())


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = preset(name)
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.run_id == config.run_id
    assert again.to_json() == config.to_json()
    assert json.loads(config.to_json())["model"]["mults"] == list(config.model.mults)


def test_json_may_leave_fields_out() -> None:
    assert RunConfig.from_json("{}") == RunConfig()
    config = RunConfig.from_json('{"model": {"mults": [1, 2]}, "training": {"steps": 3}}')
    assert config == changed(RunConfig(), {"model": {"mults": (1, 2)}, "training": {"steps": 3}})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "^not a configuration: "),
        ("[]", r"^configuration = \[\] must be an object"),
        ('{"data": 3}', "^data = 3 must be an object"),
        ('{"training": null}', "^training = None must be an object"),
        ('{"trainig": {}}', r"^unknown field 'trainig'\. Did you mean 'training'\?"),
        ('{"training": {"step": 3}}', r"^unknown field 'training.step'\. Did you mean 'steps'\?"),
        ('{"data": {"xyzzy": 3}}', r"^unknown field 'data.xyzzy'\.$"),
        ('{"degradation": {"sigma": NaN}}', message("degradation.sigma", math.nan)),
        ('{"optimiser": {"lr": "fast"}}', message("optimiser.lr", "fast")),
        ('{"model": {"mults": [1, "2"]}}', message("model.mults", "2")),
        ('{"training": {"steps": 1e3}}', message("training.steps", 1000.0)),
    ],
)
def test_json_that_is_no_configuration(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RunConfig.from_json(text)


def test_channels_and_digits_of_data_sets() -> None:
    known = {"digits": (1, True), "mnist": (1, True), "fashion-mnist": (1, False)}
    known |= {"cifar10": (3, False)}
    for name, (channels, digits) in known.items():
        config = DataConfig(name=name)  # type: ignore[arg-type]
        assert (config.channels, config.has_digits) == (channels, digits)
    for colour, channels in ((True, 3), (False, 1)):
        config = DataConfig(name="folder", folder="x", colour=colour)
        assert (config.channels, config.has_digits) == (channels, False)


def test_shape_schedule_spreads_its_variance() -> None:
    config = DegradationConfig(schedule="shape", total_variance=100.0, exponent=2.0, T=20)
    assert config.cumulative_variance(0) == 0
    assert config.cumulative_variance(10) == pytest.approx(25)
    assert config.cumulative_variance(20) == pytest.approx(100)


def test_fields_that_came_later_leave_the_names_of_older_runs_alone() -> None:
    """The id of a run of before model.bounded, training.own_states and degradation.storage."""
    old = RunConfig(degradation=DegradationConfig(T=7), training=TrainingConfig(steps=11))
    assert old.run_id == "digits-constant-T7-dim64-seed0-9a612eb9"
    newer = [
        dataclasses.replace(old, model=ModelConfig(bounded=True)),
        dataclasses.replace(old, model=ModelConfig(name="ddpm")),
        dataclasses.replace(old, model=ModelConfig(name="ddpm", dropout=0.1)),
        dataclasses.replace(old, training=TrainingConfig(steps=11, own_states=0.5)),
        dataclasses.replace(old, training=TrainingConfig(steps=11, levels="last")),
        dataclasses.replace(old, degradation=DegradationConfig(T=7, storage="float16")),
    ]
    assert len({config.run_id for config in [old, *newer]}) == 7


def test_own_states_need_a_level_above() -> None:
    TrainingConfig(own_states=1.0)
    for degradation, training in (
        (DegradationConfig(T=1), TrainingConfig(own_states=0.5)),
        (DegradationConfig(discrete=True), TrainingConfig(own_states=0.5)),
        (DegradationConfig(storage="uint8"), TrainingConfig(own_states=0.5)),
        (DegradationConfig(), TrainingConfig(own_states=0.5, levels="last")),
    ):
        with pytest.raises(ValueError, match=message("training.own_states", 0.5)):
            RunConfig(degradation=degradation, training=training)


def test_only_exact_blurs_are_stored_in_another_format() -> None:
    for bad in ({"kind": "noise"}, {"discrete": True}):
        with pytest.raises(ValueError, match=message("degradation.storage", "uint8")):
            DegradationConfig(storage="uint8", **bad)  # type: ignore[arg-type]
