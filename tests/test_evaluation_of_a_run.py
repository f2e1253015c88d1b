"""Evaluation of a run that was really trained, and its record in the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_blur import convolve
from plain_metrics import originals, plain_rmse, unit
from tiny import tiny

from colddiff.checkpoint import load_weights
from colddiff.config import EvaluationConfig
from colddiff.data import load_images
from colddiff.evaluation import evaluate, is_evaluated, load_restorer
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_inception")
CPU = torch.device("cpu")
RESTORED = ("direct", "sampled", "sampled_algorithm1")


def test_a_trained_run(copied_run: RunFolder) -> None:
    """The averaged weights, on the first images, into evaluation.json."""
    settings = EvaluationConfig(samples=30, batch_size=16, levels=("4-2-0",), images=12)
    result = evaluate(copied_run, settings, CPU, progress=True)
    tensors, config, step = load_weights(copied_run.weights)
    restorer = build_restorer(config)
    restorer.load_state_dict(tensors)
    x0 = originals(config, 30)
    xT = x0
    for _ in range(4):
        xT = convolve(xT, 5, 2.0, "circular")
    with torch.no_grad():
        direct = restorer.eval()(xT, torch.full((30,), 4))
    assert result.kinds["direct"].rmse == pytest.approx(
        plain_rmse(unit(direct), unit(x0)), rel=1e-4
    )
    assert list(result.kinds) == ["degraded", *RESTORED, "sampled[4-2-0]"]
    assert len({kind.rmse for kind in result.kinds.values()}) == 5
    assert (result.split, result.samples, result.step, step) == ("test", 30, 6, 6)
    assert result.levels == (4, 3, 2, 1, 0)
    assert result.device == "cpu"
    assert result.seconds > 0
    written = json.loads(copied_run.evaluation.read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["settings"]["levels"] == ["4-2-0"]
    assert set(written["settings"]) == {f.name for f in dataclasses.fields(EvaluationConfig)}
    assert set(written["kinds"]["direct"]) == {
        "rmse",
        "ssim",
        "fid_digits",
        "fid_inception",
        "rmse_per_class",
    }


def test_arrays_are_the_first_images(copied_run: RunFolder) -> None:
    evaluate(copied_run, EvaluationConfig(samples=30, batch_size=16, images=25), CPU)
    images = load_images(copied_run.config.data, "test")
    with np.load(copied_run.samples / "restorations.npz") as stored:
        assert set(stored) == {"degraded", "direct", "sampled", "original", "index", "label"}
        assert stored["index"].tolist() == list(range(25))
        assert stored["label"].tolist() == images.labels[:25].tolist()  # type: ignore[index]
        # Crop is central in evaluation, of 17 pixels.
        expected = images.take(torch.arange(25))[:, :, :16, :16].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(stored["original"], expected)
        assert all(stored[name].dtype == np.uint8 for name in ("degraded", "direct", "sampled"))
        blurred = originals(copied_run.config, 25)
        for _ in range(4):
            blurred = convolve(blurred, 5, 2.0, "circular")
        levels = unit(blurred).transpose(0, 2, 3, 1) * 255
        assert np.abs(stored["degraded"] - levels).max() < 0.51
    assert (copied_run.samples / "restorations.png").exists()


def test_images_can_be_few_or_none(copied_run: RunFolder) -> None:
    evaluate(copied_run, EvaluationConfig(samples=4, images=0), CPU)
    assert not copied_run.samples.exists()
    evaluate(copied_run, EvaluationConfig(samples=4, images=100), CPU)
    with np.load(copied_run.samples / "restorations.npz") as stored:
        assert len(stored["original"]) == 4


def test_batch_size_does_not_matter(copied_run: RunFolder) -> None:
    kinds = [
        evaluate(copied_run, EvaluationConfig(samples=20, batch_size=size), CPU).kinds
        for size in (20, 3)
    ]
    for name in kinds[0]:
        assert kinds[0][name].rmse == pytest.approx(kinds[1][name].rmse, rel=1e-5)
        assert kinds[0][name].fid_digits == pytest.approx(kinds[1][name].fid_digits, rel=1e-3)


def test_missing_inception_weights_are_named(copied_run: RunFolder) -> None:
    settings = EvaluationConfig(samples=4, inception_weights="/nowhere/inception.pth")
    with pytest.raises(ValueError, match="/nowhere/inception.pth"):
        evaluate(copied_run, settings, CPU)
    without = evaluate(copied_run, EvaluationConfig(samples=4), CPU)
    assert all(kind.fid_inception is None for kind in without.kinds.values())


def test_levels_must_fit_the_run(copied_run: RunFolder) -> None:
    with pytest.raises(ValueError, match="levels = '20-10-0' .* falling from T = 4 to 0"):
        evaluate(copied_run, EvaluationConfig(samples=4, levels=("20-10-0",)), CPU)
    assert not copied_run.evaluation.exists()


def test_an_untrained_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    for use in (
        lambda: load_restorer(folder, CPU),
        lambda: evaluate(folder, tiny().evaluation, CPU),
    ):
        with pytest.raises(ValueError, match=f"{folder.path.name} is not trained yet"):
            use()


def test_restorers_are_loaded_for_use(trained_run: RunFolder) -> None:
    restorer, config, step = load_restorer(trained_run, CPU)
    assert (config, step) == (trained_run.config, 6)
    assert not restorer.training
    assert not any(parameter.requires_grad for parameter in restorer.parameters())


def test_evaluated_means_with_the_same_settings_and_step(copied_run: RunFolder) -> None:
    settings = EvaluationConfig(samples=4, levels=("4-2-0",))
    assert not is_evaluated(copied_run, settings)
    evaluate(copied_run, settings, CPU)
    assert is_evaluated(copied_run, settings)
    others: dict[str, Any] = {
        "split": "train",
        "samples": 5,
        "batch_size": 9,
        "levels": (),
        "by_level": 2,
        "images": 3,
        "inception_weights": "x",
    }
    assert set(others) == {field.name for field in dataclasses.fields(settings)}
    for name, value in others.items():
        assert not is_evaluated(copied_run, dataclasses.replace(settings, **{name: value}))
    result = json.loads(copied_run.evaluation.read_text())
    del result["settings"]["by_level"]  # as an evaluation of before there was such a setting
    copied_run.evaluation.write_text(json.dumps(result))
    assert is_evaluated(copied_run, settings)
    assert not is_evaluated(copied_run, dataclasses.replace(settings, by_level=2))
    (copied_run.samples / "trajectory.npz").rename(copied_run.samples / "moved")
    assert not is_evaluated(copied_run, settings)  # as one of before trajectories were kept
    (copied_run.samples / "moved").rename(copied_run.samples / "trajectory.npz")
    copied_run.evaluation.write_text(json.dumps(result | {"step": 5}))
    assert not is_evaluated(copied_run, settings)
