"""Objectives of a trained run, against plain loops on the images that training kept back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_blur import convolve
from plain_metrics import plain_frechet, plain_rmse, plain_ssim, unit
from tiny import replaced, tiny
from torch import Tensor

from colddiff import data, evaluation, generation, quality
from colddiff.batches import to_batch
from colddiff.classifier import load_digit_classifier
from colddiff.config import GenerationConfig, RunConfig
from colddiff.data import load_images
from colddiff.interruption import Interrupted, StopRequest
from colddiff.metrics import digit_features
from colddiff.randomness import generator
from colddiff.run_folder import RunFolder
from sweeps.objective import directions, intermediate, measure, sampled_levels, value_names
from sweeps.study import StudyConfig

CPU = torch.device("cpu")


def study(folder: RunFolder, **changes: Any) -> StudyConfig:
    settings: dict[str, Any] = {"generation": GenerationConfig(n=70), "base": folder.config}
    return StudyConfig(runs=str(folder.path.parent), **(settings | changes))


def with_levels(folder: RunFolder, *levels: str) -> RunConfig:
    return replaced(folder.config, "evaluation", levels=levels)


def kept_back(config: RunConfig) -> tuple[Tensor, Tensor]:
    """x0 of the validation images, and of those that are trained on."""
    images = load_images(config.data, "train")
    chosen = torch.randperm(len(images), generator=generator(0, "validation"))
    count = config.data.validation
    back, kept = (
        images.take(part.sort().values) for part in chosen.split([count, len(images) - count])
    )
    return to_batch(back, config.data), to_batch(kept, config.data)


def blurred(x: Tensor, t: int) -> Tensor:
    """The tiny run's D(x, t)."""
    for _ in range(t):
        x = convolve(x, 5, 2.0, "circular")
    return x


def restored_by_hand(folder: RunFolder, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Algorithm 2 on the validation images, by convolutions, and these."""
    restorer, config, _ = evaluation.load_restorer(folder, CPU)
    x0, _ = kept_back(config)
    x = blurred(x0, 4)
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        with torch.no_grad():
            x0_hat = restorer(x, torch.full((len(x),), s))
        x = x - blurred(x0_hat, s) + blurred(x0_hat, s_next)
    return x, x0


@pytest.mark.parametrize("text", ["", "4-1-0"])
def test_restoration_of_the_validation_images(text: str, copied_run: RunFolder) -> None:
    """By Algorithm 2 over the configuration's levels."""
    levels = (4, 1, 0) if text else (4, 3, 2, 1, 0)
    copied_run.update(with_levels(copied_run, *filter(None, [text])))
    restored, x0 = restored_by_hand(copied_run, levels)
    (rmse,) = measure(copied_run, study(copied_run))
    assert rmse == pytest.approx(plain_rmse(unit(restored), unit(x0)), rel=1e-4)
    (ssim,) = measure(copied_run, study(copied_run, metric="ssim"))
    assert ssim == pytest.approx(plain_ssim(unit(restored), unit(x0)), abs=1e-3)


@pytest.mark.parametrize("metric", ["rmse", "ssim"])
def test_direct_restoration_of_the_validation_images(metric: Any, copied_run: RunFolder) -> None:
    """One call from x_T; the sampler's levels do not matter, nor what else was measured."""
    measure(copied_run, study(copied_run))
    restorer, config, _ = evaluation.load_restorer(copied_run, CPU)
    x0, _ = kept_back(config)
    with torch.no_grad():
        x0_hat = unit(restorer(blurred(x0, 4), torch.full((len(x0),), 4)).clamp(-1, 1))
    (value,) = measure(copied_run, study(copied_run, objective="direct", metric=metric))
    plain = plain_rmse if metric == "rmse" else plain_ssim
    assert value == pytest.approx(plain(x0_hat, unit(x0)), abs=1e-3 if metric == "ssim" else 1e-5)
    copied_run.update(with_levels(copied_run, "4-2-0"))
    assert measure(copied_run, study(copied_run, objective="direct", metric=metric)) == (value,)


def test_the_trials_levels_hold_where_runs_are_shared(copied_run: RunFolder) -> None:
    before = copied_run.config_file.read_bytes()
    config = with_levels(copied_run, "4-2-0", "4-0")
    restored, x0 = restored_by_hand(copied_run, (4, 2, 0))
    (rmse,) = measure(copied_run, study(copied_run), config=config)
    assert rmse == pytest.approx(plain_rmse(unit(restored), unit(x0)), rel=1e-4)
    assert measure(copied_run, study(copied_run)) != (rmse,)
    assert copied_run.config_file.read_bytes() == before
    with pytest.raises(ValueError, match="strictly falling from T = 5 to 0"):
        sampled_levels(with_levels(copied_run, "4-2-0"), 5)


def test_the_test_split_is_never_read(
    copied_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def recording(config: Any, split: Any, **options: Any) -> Any:
        asked.append(split)
        return load_images(config, split, **options)

    for module in (data, generation, quality):
        monkeypatch.setattr(module, "load_images", recording)
    for objective in ("restoration", "direct", "generation"):
        measure(copied_run, study(copied_run, objective=objective))
    assert set(asked) == {"train"}


def test_generation_is_measured_against_the_images_trained_on(copied_run: RunFolder) -> None:
    settings = study(copied_run, objective="generation")
    (fid,) = measure(copied_run, settings)
    path = generation.generate(copied_run, settings.generation, CPU, measured=False)  # is there
    with np.load(path) as arrays:
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    assert len(pixels) == 70
    _, trained_on = kept_back(copied_run.config)
    classifier = load_digit_classifier()
    features = [
        digit_features(x, classifier).double().numpy()
        for x in (pixels.float() / 127.5 - 1, trained_on)
    ]
    assert fid == pytest.approx(plain_frechet(*features), rel=1e-4)


def test_pareto_counts_network_calls(copied_run: RunFolder) -> None:
    pareto, fid = (study(copied_run, objective=o) for o in ("pareto", "generation"))
    assert measure(copied_run, pareto) == (*measure(copied_run, fid), 4.0)
    few = with_levels(copied_run, "4-1-0")
    values = measure(copied_run, pareto, config=few)
    assert values == (*measure(copied_run, fid, config=few), 2.0)
    assert values[0] != measure(copied_run, fid)[0]


def test_generation_follows_the_studys_settings(copied_run: RunFolder) -> None:
    one = measure(copied_run, study(copied_run, objective="generation"))
    changed = (GenerationConfig(n=71), GenerationConfig(n=70, seed=1))
    others = [
        measure(copied_run, study(copied_run, objective="generation", generation=settings))
        for settings in changed
    ]
    assert len({one, *others}) == 3


@pytest.mark.parametrize("objective", ["restoration", "direct", "generation", "pareto"])
def test_what_was_measured_is_kept(
    objective: Any, copied_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker does not compute it again; a fresh computation gives the same."""
    settings = study(copied_run, objective=objective)
    first = measure(copied_run, settings)
    (path,) = copied_run.path.glob("objective-*.json")
    kept = path.read_text()
    assert json.loads(kept)["settings"]["run"] == copied_run.config.run_id
    path.unlink()
    assert measure(copied_run, settings) == first
    assert path.read_text() == kept

    def refuse(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluation, "load_restorer", refuse)
    monkeypatch.setattr(generation, "load_restorer", refuse)
    assert measure(copied_run, settings) == first


def test_a_signal_ends_it_with_nothing_half_done(copied_run: RunFolder) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            measure(copied_run, study(copied_run), stop)
    assert not list(copied_run.path.glob("objective-*"))
    with StopRequest() as stop:
        assert measure(copied_run, study(copied_run), stop)


def test_a_run_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    for objective in ("restoration", "direct", "generation"):
        with pytest.raises(ValueError, match="is not trained yet"):
            measure(folder, study(folder, objective=objective))


def test_restoration_needs_validation_images(copied_run: RunFolder) -> None:
    settings = study(copied_run)
    copied_run.update(replaced(copied_run.config, "data", validation=0))
    with pytest.raises(ValueError, match="the test split is not for optimising"):
        measure(copied_run, settings)


def test_directions_and_names() -> None:
    assert directions("restoration", "rmse") == ["minimize"]
    assert directions("restoration", "ssim") == directions("direct", "ssim") == ["maximize"]
    assert directions("generation", "ssim") == ["minimize"]
    assert directions("pareto") == ["minimize", "minimize"]
    assert value_names("restoration", "ssim") == ["sampled SSIM (validation)"]
    assert value_names("direct") == ["direct RMSE (validation)"]
    for objective in ("restoration", "direct", "generation", "pareto"):
        assert len(value_names(objective)) == len(directions(objective))  # type: ignore[arg-type]


def test_what_is_reported_while_training_has_the_studys_direction() -> None:
    record = {"validation/rmse": 0.2, "validation/ssim": 0.6, "train/loss": 0.1}
    assert intermediate("restoration", record, "rmse") == 0.2
    assert intermediate("restoration", record, "ssim") == 0.6
    assert intermediate("direct", record, "ssim") == 0.6
    assert intermediate("generation", record, "ssim") == 0.2
    assert intermediate("pareto", record) is None
    assert intermediate("restoration", {"train/loss": 0.1}) is None


def test_hot_diffusion_is_measured_too(copied_run: RunFolder) -> None:
    """Its noise is one draw an image: the value is a number, and the same again."""
    hot = replaced(copied_run.config, "degradation", kind="noise")
    copied_run.update(hot)
    settings = study(copied_run, space="recipe")
    (first,) = measure(copied_run, settings)
    (path,) = copied_run.path.glob("objective-*.json")
    path.unlink()
    assert measure(copied_run, settings) == (first,)
    assert 0 < first < 1
