"""Presets against the numbers printed in the paper, its code and the student's notebook."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from colddiff.config import RunConfig
from colddiff.degradation import taps_of_step
from colddiff.presets import PRESETS, preset
from colddiff.restorer import build_restorer


@pytest.mark.parametrize(
    ("name", "T", "taps", "sigma", "padding"),
    [
        ("mnist", 20, 11, lambda i: 7.0, "circular"),
        ("demo", 20, 11, lambda i: 7.0, "circular"),
        ("mnist-paper", 40, 11, lambda i: 7.0, "circular"),
        ("mnist-student", 20, 11, lambda i: 7.0, "circular"),
        ("cifar10", 50, 11, lambda i: 0.01 * i + 0.35, "reflect"),
        ("celeba", 200, 15, lambda i: math.exp(0.01 * i), "reflect"),
        ("celeba-generate", 300, 27, lambda i: math.exp(0.01 * i), "circular"),
        ("afhq-generate", 300, 27, lambda i: math.exp(0.01 * i), "circular"),
    ],
)
def test_blur_schedules(name: str, T: int, taps: int, sigma: object, padding: str) -> None:
    blur = preset(name).degradation
    assert (blur.kind, blur.T, blur.padding) == ("blur", T, padding)
    assert blur.discrete is (name in ("mnist-student", "celeba-generate", "afhq-generate"))
    for i in range(T):
        j = np.arange(taps) - taps // 2
        weights = np.exp(-(j**2) / (2 * sigma(i) ** 2))  # type: ignore[operator]
        np.testing.assert_allclose(taps_of_step(blur, i).numpy(), weights / weights.sum(), 1e-12)


def of_the_authors(config: RunConfig, steps: int) -> None:
    """Their U-Net (of CIFAR-10 the DDPM one, else the ConvNeXt one) and training loop."""
    model, optimiser, training = config.model, config.optimiser, config.training
    if config.data.name == "cifar10":
        assert (model.name, model.dim, model.mults) == ("ddpm", 128, (1, 2, 2, 2))
        assert model.dropout == 0.1
    else:
        assert (model.name, model.dim, model.mults) == ("convnext", 64, (1, 2, 4, 8))
    assert (model.time_embedding, model.residual, model.patch) == (True, False, 1)
    assert (model.conditioning, model.bounded) == ("raw", False)
    assert (optimiser.name, optimiser.lr, optimiser.weight_decay) == ("adam", 2e-5, 0)
    assert (optimiser.schedule, optimiser.warmup_steps, optimiser.clip_norm) == ("constant", 0, 0)
    assert (training.batch_size, training.accumulation, training.steps) == (32, 2, steps)
    assert (training.ema_decay, training.ema_every, training.ema_start) == (0.995, 10, 2000)
    assert (training.loss, training.precision) == ("l1", "float32")


@pytest.mark.parametrize(
    "name", ["mnist-paper", "cifar10", "celeba", "celeba-generate", "afhq-generate"]
)
def test_the_authors_network_and_optimiser(name: str) -> None:
    of_the_authors(preset(name), steps=700_000)


def test_the_quick_recipe_is_the_one_that_was_measured() -> None:
    page = Path(__file__).parents[1] / "results/time_to_quality/widths/time_to_quality.csv"
    with page.open(newline="") as file:
        runs = {row["recipe"]: row["run"] for row in csv.DictReader(file)}
    assert runs["mnist, dim16-2400, T = 20"] == preset("mnist-quick").run_id


def test_the_students_settings() -> None:
    config = preset("mnist-student")
    of_the_authors(config, steps=10_000)
    assert (config.data.name, config.data.preparation) == ("mnist", "crop")
    assert (config.data.flip, config.data.image_size) == (True, 32)


def test_data_sets() -> None:
    names = {name: preset(name).data.name for name in PRESETS}
    assert names == {
        "demo": "digits",
        "mnist": "mnist",
        "mnist-quick": "mnist",
        "mnist-generate": "mnist",
        "mnist-hot": "mnist",
        "mnist-paper": "mnist",
        "mnist-student": "mnist",
        "cifar10": "cifar10",
        "celeba": "folder",
        "celeba-generate": "folder",
        "afhq-generate": "folder",
    }
    folders = {name for name in PRESETS if preset(name).data.name == "folder"}
    for name in folders:
        data = preset(name).data
        assert (data.folder, data.image_size, data.channels) == (name.split("-")[0], 128, 3)
        assert (data.preparation, data.flip) == ("crop", True)
    assert all(preset(name).data.image_size == 32 for name in set(PRESETS) - folders)


def test_the_cifar10_network_is_of_the_size_of_the_authors() -> None:
    with torch.device("meta"):
        restorer = build_restorer(preset("cifar10"))
    assert sum(value.numel() for value in restorer.parameters()) == 35_746_307


def test_digits_are_not_mirrored_but_in_the_students_preset() -> None:
    flipped = {name for name in PRESETS if preset(name).data.flip and preset(name).data.has_digits}
    assert flipped == {"mnist-student"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_name_and_source(name: str) -> None:
    assert preset(name).preset == name
    document = PRESETS[name].__doc__ or ""
    assert any(source in document for source in ("arXiv", "README", "student", "docs/"))


def test_presets_have_run_ids_of_their_own_but_that_of_generation() -> None:
    ids = {name: preset(name).run_id for name in PRESETS}
    assert ids.pop("mnist-generate") == ids["mnist"]  # the same network
    assert len(set(ids.values())) == len(ids)


def test_generation_has_the_cure_and_the_papers_sampler() -> None:
    cure, paper = preset("mnist-generate").generation
    assert (cure.n, cure.start, cure.components) == (2000, "terminals", 50)
    assert (cure.symmetry_noise, cure.algorithm, cure.levels) == (0, "algorithm2", "20-10-0")
    assert (paper.n, paper.start, paper.components) == (2000, "means", 1)
    assert (paper.symmetry_noise, paper.algorithm, paper.levels) == (0.002, "algorithm2", "")


def test_demo_is_small() -> None:
    config = preset("demo")
    assert config.training.steps * config.training.batch_size <= 200_000


@pytest.mark.parametrize(("typo", "meant"), [("mnits", "mnist"), ("cifar-10", "cifar10")])
def test_unknown_names_get_a_suggestion(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no preset '{typo}'. Did you mean '{meant}'") as error:
        preset(typo)
    assert all(name in str(error.value) for name in PRESETS)


def test_names_far_from_any_get_the_list() -> None:
    with pytest.raises(ValueError, match=r"no preset 'xyzzy'\. Known: demo, "):
        preset("xyzzy")
