"""The run id: a readable name and a hash of all that defines the result, and of nothing else."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import changed

from colddiff.config import GenerationConfig, RunConfig
from colddiff.presets import PRESETS, preset

# Another valid value of every field, and what must be set before for it to be valid.
Change = tuple[dict[str, dict[str, Any]], Any]
CHANGES: dict[str, Change] = {
    "data.name": ({}, "mnist"),
    "data.root": ({}, "elsewhere"),
    "data.folder": ({"data": {"name": "folder", "folder": "a"}}, "b"),
    "data.colour": ({}, False),
    "data.image_size": ({}, 64),
    "data.preparation": ({}, "pad"),
    "data.flip": ({}, True),
    "data.validation": ({}, 100),
    "degradation.kind": ({}, "noise"),
    "degradation.T": ({}, 21),
    "degradation.schedule": ({}, "incremental"),
    "degradation.kernel_size": ({}, 13),
    "degradation.sigma": ({}, 7.5),
    "degradation.growth": ({}, 0.01),
    "degradation.exponent": ({}, 2.0),
    "degradation.total_variance": ({}, 100.0),
    "degradation.padding": ({}, "reflect"),
    "degradation.discrete": ({}, True),
    "degradation.storage": ({}, "float16"),
    "degradation.noise_schedule": ({}, "linear"),
    "model.name": ({}, "ddpm"),
    "model.dim": ({}, 32),
    "model.dropout": ({"model": {"name": "ddpm"}}, 0.1),
    "model.mults": ({}, (1, 2)),
    "model.time_embedding": ({}, False),
    "model.residual": ({}, True),
    "model.patch": ({}, 2),
    "model.conditioning": ({}, "wiener"),
    "model.bounded": ({}, True),
    "optimiser.name": ({}, "adamw"),
    "optimiser.lr": ({}, 1e-3),
    "optimiser.weight_decay": ({}, 0.1),
    "optimiser.schedule": ({}, "cosine"),
    "optimiser.warmup_steps": ({}, 5),
    "optimiser.clip_norm": ({}, 1.0),
    "training.steps": ({}, 10),
    "training.batch_size": ({}, 16),
    "training.accumulation": ({}, 1),
    "training.seed": ({}, 1),
    "training.loss": ({}, "l2"),
    "training.ema_decay": ({}, 0.9),
    "training.ema_every": ({}, 1),
    "training.ema_start": ({}, 0),
    "training.precision": ({}, "bfloat16"),
    "training.compile": ({}, True),
    "training.own_states": ({}, 0.5),
    "training.levels": ({}, "last"),
    "training.device": ({}, "cpu"),
    "training.log_every": ({}, 1),
    "training.validate_every": ({}, 1),
    "training.checkpoint_every": ({}, 1),
    "training.keep_every": ({}, 1),
    "training.workers": ({}, 0),
    "evaluation.split": ({}, "train"),
    "evaluation.samples": ({}, 10),
    "evaluation.batch_size": ({}, 1),
    "evaluation.levels": ({}, ("20-10-0",)),
    "evaluation.images": ({}, 0),
    "evaluation.by_level": ({}, 5),
    "evaluation.inception_weights": ({}, "weights.pth"),
}
# What says where or how often something happens, but not what results.
NOT_IDENTITY = {
    "data.root",
    "training.device",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_every",
    "training.workers",
}


def test_there_is_a_change_for_every_field() -> None:
    config = RunConfig()
    others = ("preset", "generation")
    sections = [f.name for f in dataclasses.fields(config) if f.name not in others]
    expected = {
        f"{section}.{field.name}"
        for section in sections
        for field in dataclasses.fields(getattr(config, section))
    }
    assert set(CHANGES) == expected
    assert set(RunConfig().flat()) == expected | {"preset"}


def test_what_is_generated_does_not_define_a_run() -> None:
    config = RunConfig(generation=(GenerationConfig(n=5), GenerationConfig(n=6, seed=2)))
    assert config.run_id == RunConfig().run_id
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("dotted", CHANGES)
def test_run_id_changes_with_what_defines_the_result(dotted: str) -> None:
    before, value = CHANGES[dotted]
    section, name = dotted.split(".")
    old = changed(RunConfig(), before)
    assert getattr(getattr(old, section), name) != value
    new = changed(old, {section: {name: value}})
    same = dotted in NOT_IDENTITY or section == "evaluation"
    assert (new.run_id == old.run_id) is same
    assert new.flat()[dotted] != old.flat()[dotted]
    assert RunConfig.from_json(new.to_json()) == new


def test_run_ids_of_all_changes_differ() -> None:
    ids = [
        changed(changed(RunConfig(), before), {dotted.split(".")[0]: {dotted.split(".")[1]: value}})
        for dotted, (before, value) in CHANGES.items()
        if dotted not in NOT_IDENTITY and not dotted.startswith("evaluation.")
    ]
    assert len({config.run_id for config in ids}) == len(ids)


def test_run_id_does_not_contain_the_presets_name() -> None:
    config = RunConfig()
    assert dataclasses.replace(config, preset="mine").run_id == config.run_id


def test_equal_configurations_have_one_run_id() -> None:
    whole = changed(RunConfig(), {"degradation": {"sigma": 7, "growth": -0.0}})
    assert whole == RunConfig()
    assert whole.run_id == RunConfig().run_id
    assert whole.to_json() == RunConfig().to_json()
    assert type(whole.degradation.sigma) is float
    assert RunConfig.from_json('{"degradation": {"sigma": 7}}').run_id == whole.run_id


def test_run_id_is_readable_and_a_file_name() -> None:
    config = changed(
        RunConfig(),
        {
            "data": {"name": "folder", "folder": "a/b c"},
            "degradation": {"discrete": True, "T": 12},
            "model": {"dim": 32},
            "training": {"seed": 3},
        },
    )
    assert re.fullmatch(r"folder-constant-discrete-T12-dim32-seed3-[0-9a-f]{8}", config.run_id)
    hot = changed(RunConfig(), {"degradation": {"kind": "noise", "schedule": "linear"}})
    assert re.fullmatch(r"digits-noise-T20-dim64-seed0-[0-9a-f]{8}", hot.run_id)


def test_run_id_is_the_same_in_another_process_which_loads_no_torch() -> None:
    """The launcher prints run ids and answers --help at once: its imports must stay light."""
    code = (
        "import sys; from colddiff.presets import PRESETS, preset;"
        "print(*(preset(name).run_id for name in PRESETS));"
        "assert not {'torch', 'mlflow', 'numpy'} & set(sys.modules)"
    )
    path = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": path, "LC_ALL": "C"}
    # Coverage's own hooks would load more modules.
    environment.pop("COV_CORE_SOURCE", None)
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == [preset(name).run_id for name in PRESETS]


def test_flat_has_dotted_names_and_scalars() -> None:
    flat = preset("demo").flat()
    assert flat["preset"] == "demo"
    assert flat["degradation.T"] == 20
    assert flat["model.mults"] == "1 2 2"
    assert flat["evaluation.levels"] == "20-10-0 20-4-3-2-1-0"
    assert flat["data.flip"] is False
    assert all(type(value) in (str, int, float, bool) for value in flat.values())
