"""Metrics against independent oracles: scikit-image, SciPy, plain loops and closed forms."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from colddiff import metrics
from colddiff.classifier import load_digit_classifier


def images(
    count: int, channels: int = 1, side: int = 24, seed: int = 0, spread: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * (2 * torch.rand(count, channels, side, side, generator=generator) - 1)


def gaussian(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> Tensor:
    """Samples whose *empirical* mean and covariance are exactly the given ones."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(raw, rowvar=False)))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(covariance).T + mean)


def covariance(size: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


def test_rmse_is_the_root_of_the_mean_over_all_pixels() -> None:
    x, y = images(3, 3, 5, seed=1), images(3, 3, 5, seed=2)
    total, count = 0.0, 0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        total, count = total + ((a + 1) / 2 - (b + 1) / 2) ** 2, count + 1
    assert metrics.rmse(x, y) == pytest.approx(math.sqrt(total / count), rel=1e-9)


def test_rmse_extremes_and_clamping() -> None:
    black, white = torch.full((2, 1, 4, 4), -1.0), torch.ones(2, 1, 4, 4)
    assert metrics.rmse(black, white) == 1
    assert metrics.rmse(white, white) == 0
    assert metrics.rmse(3 * white, white) == 0


def test_rmse_in_many_batches_is_rmse_in_one() -> None:
    x, y = images(1100, side=4, seed=3), images(1100, side=4, seed=4)
    whole = ((x.double() - y.double()) / 2).square().mean().sqrt()
    assert metrics.rmse(x, y) == pytest.approx(float(whole), rel=1e-12)


def test_rmse_per_class_on_constructed_errors() -> None:
    labels = torch.tensor([0, 1, 1, 3])
    y = torch.zeros(4, 1, 6, 6)
    x = y + 2 * torch.tensor([0.1, 0.3, 0.4, 0.0]).view(4, 1, 1, 1)
    result = metrics.rmse_per_class(x, y, labels, classes=4)
    assert result[0] == pytest.approx(0.1, rel=1e-6)
    assert result[1] == pytest.approx(math.sqrt((0.09 + 0.16) / 2), rel=1e-6)
    assert math.isnan(result[2])
    assert result[3] == 0
    assert len(metrics.rmse_per_class(x, y, labels)) == 10


def test_rmse_per_class_adds_up_to_rmse() -> None:
    x, y = images(40, seed=5), images(40, seed=6)
    labels = torch.arange(40) % 4
    each = np.array(metrics.rmse_per_class(x, y, labels, classes=4))
    assert metrics.rmse(x, y) == pytest.approx(math.sqrt((each**2).mean()), rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_scikit_image_inside_the_border(channels: int) -> None:
    x = images(4, channels, 28, seed=7)
    y = (x + images(4, channels, 28, seed=8, spread=0.4)).clamp(-1, 1)
    expected = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        for c in range(channels):
            _, full = structural_similarity(
                (a[c] + 1) / 2,
                (b[c] + 1) / 2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1,
                full=True,
            )
            expected.append(full[5:-5, 5:-5].mean())
    assert metrics.ssim(x, y) == pytest.approx(np.mean(expected), abs=1e-5)


def test_ssim_of_equal_images_is_one_and_batching_changes_nothing() -> None:
    x, y = images(7, seed=9), images(7, seed=10)
    assert metrics.ssim(x, x) == pytest.approx(1, abs=1e-6)
    assert metrics.ssim(x, y, batch=2) == pytest.approx(metrics.ssim(x, y), abs=1e-7)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 10x10"):
        metrics.ssim(images(2, side=10), images(2, side=10))


@pytest.mark.parametrize("function", [metrics.rmse, metrics.ssim])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 1, 16, 16), torch.zeros(3, 1, 16, 16)),
        (torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16)),
        (torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)),
        (torch.zeros(0, 1, 16, 16), torch.zeros(0, 1, 16, 16)),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16)),
    ],
)
def test_pairs_that_do_not_fit_are_refused(function, x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape|floating"):
        function(x, y)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 10]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0], [1]]),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="label"):
        metrics.rmse_per_class(images(2), images(2), labels)


def test_frechet_distance_closed_form_in_one_dimension() -> None:
    a = gaussian(50, np.array([1.0]), np.array([[4.0]]), seed=0)
    b = gaussian(80, np.array([-2.0]), np.array([[0.25]]), seed=1)
    assert metrics.frechet_distance(a, b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-9)


def test_frechet_distance_closed_form_for_commuting_covariances() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.0, 0.0])
    spread_a, spread_b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    turn = scipy.linalg.expm(np.array([[0, 0.3, -0.7], [-0.3, 0, 0.2], [0.7, -0.2, 0]]))
    a = gaussian(60, mean_a, turn @ np.diag(spread_a**2) @ turn.T, seed=2)
    b = gaussian(60, mean_b, turn @ np.diag(spread_b**2) @ turn.T, seed=3)
    expected = ((mean_a - mean_b) ** 2).sum() + ((spread_a - spread_b) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    a = gaussian(300, np.zeros(16), covariance(16, 4), seed=5)
    b = gaussian(200, np.full(16, 0.2), covariance(16, 6), seed=7)
    first, second = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    expected = 16 * 0.2**2 + np.trace(first + second - 2 * root)
    distance = metrics.frechet_distance(a, b)
    assert distance == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-8)
    assert metrics.frechet_distance(a.float(), b.float()) == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize("count", [200, 10])
def test_frechet_distance_of_a_set_to_itself_is_zero(count: int) -> None:
    """Also with fewer samples than features, where the covariance is singular."""
    a = torch.randn(count, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert 0 <= metrics.frechet_distance(a, a[order]) < 1e-5


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), "features"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "n, m >= 2"),
        (torch.zeros(5), torch.zeros(5), "features"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(a, b)


def test_fid_digits_batches_and_grows_with_the_damage() -> None:
    classifier = load_digit_classifier()
    x = images(90, side=32, seed=11)
    features = metrics.digit_features(x, classifier, batch=7)
    assert features.shape == (90, 64)
    torch.testing.assert_close(features, metrics.digit_features(x, classifier), atol=1e-4, rtol=0)
    little = (x + images(90, side=32, seed=12, spread=0.1)).clamp(-1, 1)
    assert metrics.fid_digits(x, x, classifier) < 1e-3
    near = metrics.fid_digits(x, little, classifier)
    assert near < metrics.fid_digits(x, 0.2 * x, classifier)
    assert near == pytest.approx(metrics.fid_digits(x, little, classifier, batch=31), rel=1e-3)


def test_digit_features_ignore_autocast_and_values_out_of_range() -> None:
    classifier = load_digit_classifier()
    x = images(4, side=32, seed=13)
    plain = metrics.digit_features(x.clamp(-0.5, 1) * 2, classifier)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metrics.digit_features(x.clamp(-0.5, 1) * 2, classifier), plain)
    assert torch.equal(metrics.digit_features((x * 2).clamp(-1, 1), classifier), plain)


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache and no environment variable; returns the hub's checkpoint folder."""
    monkeypatch.delenv(metrics.INCEPTION_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def test_inception_weights_option_then_environment_then_cache(
    no_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metrics.find_inception_weights(None) is None
    cached = no_weights / metrics.INCEPTION_NAME
    cached.touch()
    assert metrics.find_inception_weights(None) == cached
    named, chosen = tmp_path / "named.pth", tmp_path / "chosen.pth"
    named.touch()
    chosen.touch()
    monkeypatch.setenv(metrics.INCEPTION_VARIABLE, str(named))
    assert metrics.find_inception_weights(None) == named
    assert metrics.find_inception_weights(str(chosen)) == chosen


def test_named_inception_weights_that_are_missing_are_an_error(
    no_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_weights / metrics.INCEPTION_NAME).touch()
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        metrics.find_inception_weights(str(tmp_path / "nowhere.pth"))
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        metrics.fid_inception(images(4, 3), images(4, 3), tmp_path / "nowhere.pth")
    monkeypatch.setenv(metrics.INCEPTION_VARIABLE, str(tmp_path / "lost.pth"))
    with pytest.raises(ValueError, match=r"lost\.pth.*COLDDIFF_INCEPTION_WEIGHTS"):
        metrics.find_inception_weights(None)


@pytest.mark.parametrize("content", ["text", "other"])
def test_a_file_that_is_no_inception_network_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"weights\.pth holds no Inception weights"):
        metrics.inception_features(images(2, 3), path)


def test_inception_path_of_torch_fidelity_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Our batching gives what torch-fidelity's own calculate_metrics gives on the same weights."""
    import torch_fidelity
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    network_class = inception.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network_class, "load_state_dict", lambda *_: None)
        network = network_class("random", ["2048"])
    path = tmp_path / "random.pth"
    torch.save(network.state_dict(), path)

    x, y = images(5, side=32, seed=14), images(3, side=32, seed=15, spread=0.5)
    with caplog.at_level(logging.WARNING, logger="colddiff.metrics"):
        ours = metrics.fid_inception(x, y, path, batch=4)
    assert "do not compare this FID" in caplog.text

    class Pixels(torch.utils.data.Dataset):
        def __init__(self, values: Tensor) -> None:
            self.values = ((values + 1) / 2 * 255).round().byte().repeat(1, 3, 1, 1)

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, index: int) -> Tensor:
            return self.values[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(x),
        input2=Pixels(y),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=3,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(path),
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_inception_takes_one_or_three_channels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 or 3.*\(2, 2, 16, 16\)"):
        metrics.inception_features(images(2, 2, 16), tmp_path / "weights.pth")


def test_class_balance_counts_and_distance() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    balance = metrics.class_balance(labels, classes=4)
    assert balance.counts == (3, 1, 0, 0)
    assert balance.total_variation == pytest.approx(0.5)
    assert metrics.class_balance(torch.arange(10)).total_variation == pytest.approx(0, abs=1e-12)
    collapsed = metrics.class_balance(torch.zeros(5, dtype=torch.long))
    assert collapsed.total_variation == pytest.approx(0.9)
    assert metrics.class_balance(labels, 4, [6, 2, 0, 0]).total_variation == pytest.approx(0)
    assert metrics.class_balance(labels, 4, [0, 0, 0.5, 0.5]).total_variation == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "reference"),
    [
        (torch.tensor([], dtype=torch.long), None),
        (torch.tensor([4]), None),
        (torch.tensor([0]), [1.0, 1.0]),
        (torch.tensor([0]), [1.0, -1.0, 1.0, 1.0]),
        (torch.tensor([0]), [0.0, 0.0, 0.0, 0.0]),
        (torch.tensor([0]), [math.nan, 1.0, 1.0, 1.0]),
    ],
)
def test_class_balance_refuses_bad_input(labels: Tensor, reference: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"label|reference"):
        metrics.class_balance(labels, 4, reference)
