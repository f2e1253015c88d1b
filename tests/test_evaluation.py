"""Evaluation: a perfect restorer scores perfectly, and every number has an independent twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write_images, write_mnist
from plain_blur import convolve
from plain_metrics import originals, plain_frechet, plain_rmse, plain_ssim, unit
from tiny import changed, replaced, tiny
from torch import Tensor

from colddiff import evaluation, metrics
from colddiff.batches import to_batch
from colddiff.classifier import load_digit_classifier
from colddiff.config import EvaluationConfig, RunConfig
from colddiff.data import load_images
from colddiff.degradation import Discrete, build_degradation
from colddiff.evaluation import EvaluationResult, evaluate
from colddiff.randomness import generator
from colddiff.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_inception")
CPU = torch.device("cpu")
RESTORED = ("direct", "sampled", "sampled_algorithm1")


class Truth:
    """The restorer that knows all originals and finds each by its x_t."""

    def __init__(self, config: RunConfig, split: str = "test", count: int = 40) -> None:
        images = load_images(config.data, split)  # type: ignore[arg-type]
        count = min(count, len(images))
        self.originals = to_batch(images.take(torch.arange(count)), config.data)
        self.degradation: Any = build_degradation(config.degradation, config.data.image_size)
        if isinstance(self.degradation, Discrete):
            self.degradation = self.degradation.unrounded

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        known = self.degradation(self.originals, t[:1].expand(len(self.originals)))
        nearest = torch.cdist(xt.flatten(1).double(), known.flatten(1).double()).argmin(dim=1)
        return self.originals[nearest]


@pytest.fixture
def truly_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[RunFolder, EvaluationResult]]:
    """Evaluates a configuration with a perfect restorer (or the one given)."""

    def run(
        config: RunConfig, settings: EvaluationConfig, restorer: Any = None
    ) -> tuple[RunFolder, EvaluationResult]:
        folder = RunFolder.create(tmp_path / "runs", config)
        known = restorer or Truth(config, settings.split)
        monkeypatch.setattr(evaluation, "load_restorer", lambda folder, device: (known, config, 6))
        return folder, evaluate(folder, settings, CPU)

    return run


def assert_perfect(result: EvaluationResult, kinds: tuple[str, ...]) -> None:
    assert set(result.kinds) == {"degraded", *kinds}
    for name in kinds:
        kind = result.kinds[name]
        assert kind.rmse == pytest.approx(0, abs=1e-6)
        assert kind.ssim == pytest.approx(1, abs=1e-5)
        assert kind.fid_digits is None or kind.fid_digits == pytest.approx(0, abs=1e-3)
        assert all(math.isnan(value) or value < 1e-6 for value in kind.rmse_per_class)
    assert result.kinds["degraded"].rmse > 0.1
    assert result.kinds["degraded"].ssim < 0.9


def test_a_perfect_restorer_is_perfect(truly_restored: Any) -> None:
    settings = EvaluationConfig(samples=40, batch_size=17, levels=("4-2-0", "4-0"))
    _, result = truly_restored(tiny(), settings)
    assert_perfect(result, (*RESTORED, "sampled[4-2-0]", "sampled[4-0]"))
    assert result.kinds["degraded"].fid_digits > 1


def test_a_perfect_restorer_of_discrete_images(truly_restored: Any) -> None:
    config = replaced(tiny(), "degradation", discrete=True)
    folder, result = truly_restored(config, EvaluationConfig(samples=40))
    assert_perfect(result, RESTORED)
    degraded = np.load(folder.samples / "restorations.npz")["degraded"]
    assert all(len(np.unique(image)) == 1 for image in degraded)  # only the mean is left
    means = unit(originals(config, 40)).mean(axis=(1, 2, 3)) * 255
    assert degraded[:, 0, 0, 0] == pytest.approx(means, abs=0.51)


def test_a_perfect_restorer_of_noisy_images(truly_restored: Any) -> None:
    """Hot diffusion: the start is sqrt(a) x0 + sqrt(1 - a) z with a known z."""
    config = replaced(tiny(seed=3), "degradation", kind="noise")
    x0 = originals(config, 40)
    settings = EvaluationConfig(samples=40, images=0)  # so that it is asked for these alone
    _, result = truly_restored(config, settings, lambda xt, t: x0)
    assert_perfect(result, (*RESTORED, "sampled_ddim", "sampled_ddpm"))
    power, f = 1.0, [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]
    for t in range(1, 5):
        power *= max(f[t] / f[t - 1], 0.001)
    sources = [generator(3, "evaluation noise", index) for index in range(40)]
    z = torch.stack([torch.randn(1, 16, 16, generator=source) for source in sources])
    xT = math.sqrt(power) * x0 + math.sqrt(1 - power) * z
    assert result.kinds["degraded"].rmse == pytest.approx(plain_rmse(unit(xT), unit(x0)), rel=1e-5)


def test_degraded_numbers_are_those_of_plain_convolutions(truly_restored: Any) -> None:
    config = tiny()
    _, result = truly_restored(config, EvaluationConfig(samples=40, batch_size=9))
    x0 = originals(config, 40)
    xT = x0.double()
    for _ in range(4):
        xT = convolve(xT, 5, 2.0, "circular")
    degraded = result.kinds["degraded"]
    assert degraded.rmse == pytest.approx(plain_rmse(unit(xT), unit(x0)), rel=1e-5)
    assert degraded.ssim == pytest.approx(plain_ssim(unit(xT), unit(x0)), abs=1e-5)
    classifier = load_digit_classifier()
    features = [classifier.features(x.float()).double().numpy() for x in (xT, x0)]
    assert degraded.fid_digits == pytest.approx(plain_frechet(*features), rel=1e-3)
    labels = load_images(config.data, "test").labels[:40]  # type: ignore[index]
    for digit in range(10):
        chosen = (labels == digit).numpy()
        expected = plain_rmse(unit(xT)[chosen], unit(x0)[chosen])
        assert degraded.rmse_per_class[digit] == pytest.approx(expected, rel=1e-5)


def test_each_level_by_plain_convolutions(truly_restored: Any) -> None:
    """Of the first 25 images, over a batch's end: D(x0, t) and what is restored from it alone."""
    config = tiny()
    x0 = originals(config, 40)
    halved = lambda xt, t: xt / 2 - t[:, None, None, None] / 10  # noqa: E731
    settings = EvaluationConfig(samples=40, batch_size=9, by_level=25)
    _, result = truly_restored(config, settings, halved)
    assert [level.t for level in result.by_level] == [1, 2, 3, 4]
    xt, x0 = x0[:25].double(), x0[:25]
    for level in result.by_level:
        xt = convolve(xt, 5, 2.0, "circular")
        restored = unit((xt / 2 - level.t / 10).clamp(-1, 1))
        assert level.degraded_rmse == pytest.approx(plain_rmse(unit(xt), unit(x0)), rel=1e-5)
        assert level.rmse == pytest.approx(plain_rmse(restored, unit(x0)), rel=1e-5)
        assert level.ssim == pytest.approx(plain_ssim(restored, unit(x0)), abs=1e-5)
    _, without = truly_restored(config, EvaluationConfig(samples=10))
    assert without.by_level == ()


def test_samples_limits_and_0_is_all(truly_restored: Any, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    config = replaced(tiny(), "data", name="mnist", root=str(tmp_path), validation=0)
    for samples, split, expected in ((0, "test", 20), (500, "test", 20), (7, "train", 7)):
        settings = EvaluationConfig(samples=samples, split=split)
        _, result = truly_restored(config, settings)
        assert (result.samples, result.split) == (expected, split)
        assert_perfect(result, RESTORED)
        missing = [math.isnan(value) for value in result.kinds["direct"].rmse_per_class]
        assert missing == [digit >= expected for digit in range(10)]


def test_labels_that_are_no_digits(truly_restored: Any, tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    config = replaced(tiny(), "data", name="fashion-mnist", root=str(tmp_path), validation=0)
    _, result = truly_restored(config, EvaluationConfig())
    assert_perfect(result, RESTORED)
    assert all(kind.fid_digits is None for kind in result.kinds.values())
    assert all(len(kind.rmse_per_class) == 10 for kind in result.kinds.values())


def test_images_without_labels(truly_restored: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "faces" / "train", 2)
    write_images(tmp_path / "faces" / "test", 12)
    data = {"name": "folder", "folder": "faces", "root": str(tmp_path), "validation": 0}
    config = changed(tiny(), {"data": data})
    folder, result = truly_restored(config, EvaluationConfig(samples=11))
    assert_perfect(result, RESTORED)
    assert all(kind.rmse_per_class == () for kind in result.kinds.values())
    assert all(kind.fid_digits is None for kind in result.kinds.values())
    with np.load(folder.samples / "restorations.npz") as stored:
        assert "label" not in stored
        assert stored["original"].shape == (11, 16, 16, 3)


def test_features_of_the_originals_are_computed_once(
    truly_restored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"")
    seen: list[Tensor] = []

    def pooled(
        images: Tensor, weights: Path, batch: int = 64, device: torch.device | str = "cuda"
    ) -> Tensor:
        assert weights == tmp_path / "inception.pth"
        assert device == CPU
        seen.append(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    monkeypatch.setattr(metrics, "inception_features", pooled)
    settings = EvaluationConfig(samples=40, inception_weights=str(weights))
    _, result = truly_restored(tiny(), settings)
    x0 = originals(tiny(), 40)
    assert sum(torch.equal(images, x0) for images in seen) >= 1
    assert len(seen) == 1 + len(result.kinds)
    expected = plain_frechet(*(pooled(x, weights, 64, CPU).double().numpy() for x in seen[:2]))
    assert result.kinds["degraded"].fid_inception == pytest.approx(expected, rel=1e-5)
    assert result.kinds["direct"].fid_inception == pytest.approx(0, abs=1e-6)
