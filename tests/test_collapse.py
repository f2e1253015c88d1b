"""Collapses constructed from real digits, where the right answer is known; plain oracles."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from colddiff import collapse, metrics
from colddiff.classifier import DigitClassifier, load_digit_classifier
from colddiff.collapse import Collapse, Reference
from colddiff.config import DataConfig
from colddiff.data import Split, load_images

TRAIN, CALIBRATION = 1200, 500
Measure = Callable[[Tensor], Collapse]


def digits(split: Split) -> tuple[Tensor, Tensor]:
    images = load_images(DataConfig(name="digits"), split)
    assert images.labels is not None
    return images.take(torch.arange(len(images))).float() / 127.5 - 1, images.labels


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_digit_classifier()


@pytest.fixture(scope="module")
def train() -> tuple[Tensor, Tensor]:
    """With half as many zeros as other digits, to tell these shares from equal ones."""
    x0, labels = digits("train")
    chosen = ((labels != 0) | (torch.arange(len(labels)) % 20 == 0)).nonzero()[:TRAIN, 0]
    return x0[chosen], labels[chosen]


@pytest.fixture(scope="module")
def test() -> tuple[Tensor, Tensor]:
    return digits("test")


@pytest.fixture(scope="module")
def reference(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classifier: DigitClassifier
) -> Reference:
    return collapse.reference_of(*train, test[0][:CALIBRATION], classifier)


@pytest.fixture(scope="module")
def measure(reference: Reference, classifier: DigitClassifier) -> Measure:
    return lambda images: collapse.measure(images, reference, classifier)


@pytest.fixture(scope="module")
def unseen(test: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Test digits that calibrated nothing."""
    return test[0][CALIBRATION:], test[1][CALIBRATION:]


@pytest.fixture(scope="module")
def control(unseen: tuple[Tensor, Tensor], measure: Measure) -> Collapse:
    return measure(unseen[0])


def test_unseen_real_digits_have_not_collapsed(
    control: Collapse, unseen: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]
) -> None:
    assert control.n == sum(control.counts) == len(unseen[0])
    true = torch.bincount(unseen[1], minlength=10)
    assert torch.tensor(control.counts).sub(true).abs().max() <= 3
    assert 0.02 < control.total_variation < 0.06  # zeros are rarer in the reference
    assert control.blank_rate == control.duplicate_rate == 0
    assert control.unreadable_rate <= 0.03
    assert control.mirrored_rate <= 0.03
    assert min(control.precision, control.recall, control.coverage) > 0.8
    assert control.density == pytest.approx(1, abs=0.15)
    assert control.entropy > 0.995
    rare = float((train[1] == 0).double().mean())
    assert control.ratios[0] == pytest.approx(control.counts[0] / control.n / rare)


def test_the_lines_are_where_one_in_a_hundred_calibrating_digits_is_beyond(
    measure: Measure, test: tuple[Tensor, Tensor], reference: Reference
) -> None:
    real = measure(test[0][:CALIBRATION])
    # Two images can have the same rank, one by confidence and one by distance.
    assert real.unreadable_rate in (0.008, 0.01)
    assert real.mirrored_rate <= 0.01
    assert 0.1 < reference.confidence < 1
    assert reference.mirror_log_odds >= 0


def test_zeros_alone(
    measure: Measure, unseen: tuple[Tensor, Tensor], reference: Reference, control: Collapse
) -> None:
    zeros = measure(unseen[0][unseen[1] == 0])
    assert zeros.counts == (zeros.n, *[0] * 9)
    share = reference.shares[0]
    assert zeros.total_variation == pytest.approx(1 - share)
    assert zeros.ratios == (pytest.approx(1 / share), *[0] * 9)
    assert zeros.entropy == 0
    assert zeros.kl == pytest.approx(-math.log(share))
    assert zeros.precision > 0.8
    assert max(zeros.recall, zeros.coverage) < 0.25
    assert zeros.fid_digits > 10 * control.fid_digits


def test_half_blank(
    unseen: tuple[Tensor, Tensor], reference: Reference, classifier: DigitClassifier
) -> None:
    images = unseen[0][:100].clone()
    images[::2] = torch.linspace(-1, 1, 50)[:, None, None, None]
    half = collapse.measure(images, reference, classifier)
    assert half.blank_rate == 0.5
    assert 0.5 <= half.unreadable_rate < 0.56
    # With lines that no image, or every image, is beyond, blankness alone decides.
    lines = {"confidence": 0.0, "distance": math.inf, "mirror_log_odds": -math.inf}
    extreme = dataclasses.replace(reference, **lines)
    half = collapse.measure(images, extreme, classifier)
    assert half.unreadable_rate == half.mirrored_rate == 0.5


@pytest.mark.parametrize("lines", [{"confidence": 0.0}, {"distance": math.inf}])
def test_noise_is_unreadable_by_confidence_and_by_distance(
    lines: dict[str, float], reference: Reference, classifier: DigitClassifier
) -> None:
    noise = 2 * torch.rand(50, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    measured = collapse.measure(noise, dataclasses.replace(reference, **lines), classifier)
    assert measured.unreadable_rate > 0.9
    assert measured.blank_rate == 0


def test_confidence_is_the_classifiers_own(
    unseen: tuple[Tensor, Tensor], reference: Reference, classifier: DigitClassifier
) -> None:
    images = unseen[0][:80] + torch.randn(80, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    confidences = classifier(images.clamp(-1, 1)).softmax(1).amax(1)
    line = float(confidences.sort().values[40:42].mean())
    lines = dataclasses.replace(reference, confidence=line, distance=math.inf)
    assert collapse.measure(images, lines, classifier).unreadable_rate == 41 / 80


def test_mirrored_digits(
    measure: Measure, unseen: tuple[Tensor, Tensor], reference: Reference
) -> None:
    x0, labels = unseen[0][:250], unseen[1][:250]
    turned = torch.isin(labels, torch.tensor(collapse.ASYMMETRIC))
    assert reference.mirror_sensitivity > 0.9
    assert measure(x0[turned].flip(-1)).mirrored_rate > 0.9
    assert measure(x0[turned]).mirrored_rate < 0.03
    assert measure(x0[~turned].flip(-1)).mirrored_rate < 0.03
    # Neither way round: what is symmetric is not mirrored.
    assert measure((x0[turned] + x0[turned].flip(-1)) / 2).mirrored_rate < 0.2


def test_duplicates(measure: Measure, unseen: tuple[Tensor, Tensor]) -> None:
    x0 = unseen[0][:200]
    copies = x0[:20].repeat_interleave(10, dim=0)
    distinct, repeated = measure(x0), measure(copies)
    assert distinct.duplicate_rate == 0
    assert repeated.duplicate_rate == 1
    assert repeated.recall < 0.1 < 0.7 < distinct.recall
    assert repeated.coverage < distinct.coverage / 2
    noise = 0.02 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(0))
    assert measure(copies + noise).duplicate_rate == 1
    assert measure(torch.cat([x0[:30], x0[:10]])).duplicate_rate == 0.5


def test_duplicate_distance_by_scipy(train: tuple[Tensor, Tensor], reference: Reference) -> None:
    pixels = (train[0].flatten(1).double().numpy() + 1) / 2
    distances = cdist(pixels, pixels) / 32
    np.fill_diagonal(distances, np.inf)
    expected = np.quantile(distances.min(1), 0.001)
    assert reference.duplicate_distance == pytest.approx(expected, rel=1e-3)


def test_shares_by_closed_forms_and_scipy(
    measure: Measure,
    unseen: tuple[Tensor, Tensor],
    reference: Reference,
    classifier: DigitClassifier,
) -> None:
    x0, labels = unseen
    parts = [x0[labels == label][:number] for label, number in ((0, 30), (1, 20), (7, 10))]
    measured = measure(torch.cat(parts))
    predicted = classifier(torch.cat(parts)).argmax(1)
    assert measured.counts == tuple(torch.bincount(predicted, minlength=10).tolist())
    assert measured.counts[0] == 30
    shares = np.array(measured.counts) / 60
    assert measured.kl == pytest.approx(scipy.stats.entropy(shares, reference.shares))
    assert measured.entropy == pytest.approx(scipy.stats.entropy(shares, base=10))
    half = np.abs(shares - np.array(reference.shares)).sum() / 2
    assert measured.total_variation == pytest.approx(half)
    np.testing.assert_allclose(measured.ratios, shares / np.array(reference.shares))
    z, n = scipy.stats.norm.ppf(0.975), 60
    middle = (shares + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * np.sqrt(shares * (1 - shares) / n + z**2 / (4 * n**2))
    expected = np.stack([middle - margin, middle + margin], 1)
    np.testing.assert_allclose(measured.intervals, expected, atol=1e-12)


def plain_overlap(real: np.ndarray, generated: np.ndarray, k: int) -> collapse.Overlap:
    def inside(point: np.ndarray, points: np.ndarray, index: int) -> bool:
        """Whether the point is in the ball around one of the points."""
        others = np.delete(points, index, axis=0) - points[index]
        radius = sorted(np.linalg.norm(others, axis=1))[k - 1]
        return bool(np.linalg.norm(point - points[index]) <= radius)

    hits = np.array([[inside(g, real, i) for i in range(len(real))] for g in generated])
    back = np.array([[inside(r, generated, j) for j in range(len(generated))] for r in real])
    return collapse.Overlap(
        precision=hits.any(1).mean(),
        recall=back.any(1).mean(),
        density=hits.sum() / (k * len(generated)),
        coverage=hits.any(0).mean(),
    )


@pytest.mark.parametrize(("shift", "k"), [(0.0, 5), (1.0, 3), (0.5, 1)])
def test_overlap_against_plain_loops(shift: float, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    real = random.standard_normal((50, 4)).astype(np.float32)
    generated = (0.7 * random.standard_normal((40, 4)) + shift).astype(np.float32)
    expected = plain_overlap(real, generated, k)
    assert 0 < expected.recall < 1
    for block in (7, 1000):
        monkeypatch.setattr(collapse, "BLOCK", block)
        ours = collapse.overlap(torch.from_numpy(real), torch.from_numpy(generated), k)
        assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(expected))


def test_overlap_of_a_set_with_itself_and_with_one_far_away() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    same, far = collapse.overlap(features, features), collapse.overlap(features, features + 100)
    assert same.precision == same.recall == same.coverage == 1
    assert dataclasses.astuple(far) == (0, 0, 0, 0)


def test_blocks_change_nothing(
    measure: Measure, unseen: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.cat([unseen[0][:40], unseen[0][:7]])
    whole = measure(images)
    monkeypatch.setattr(collapse, "BLOCK", 9)
    assert measure(images) == whole


def test_blank() -> None:
    grey, white = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    faint, stroke = torch.full((2, 1, 1, 8, 8), -1.0)
    faint[..., 2:5, 3], stroke[..., 2:5, 3] = -0.1, 0.1  # contrasts 0.45 and 0.55
    beyond = white.clone()
    beyond[..., 2:5, 3] = 3  # no brighter than white
    images = torch.cat([grey, white, -white, beyond, faint, stroke, -stroke])
    assert collapse.blank(images).tolist() == [True] * 5 + [False] * 2


def test_no_embedded_digit_is_blank(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> None:
    assert not collapse.blank(torch.cat([train[0], test[0]])).any()


def test_a_grey_set_is_blank_and_of_one_kind(measure: Measure) -> None:
    grey = measure(torch.zeros(12, 1, 32, 32))
    assert grey.blank_rate == grey.unreadable_rate == grey.duplicate_rate == 1
    assert grey.mirrored_rate == grey.recall == 0


def test_two_images_are_enough_and_the_result_is_json(
    measure: Measure, unseen: tuple[Tensor, Tensor]
) -> None:
    fields = dataclasses.asdict(measure(unseen[0][:2]))
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }
    fields["intervals"] = [list(pair) for pair in fields["intervals"]]
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields


def test_features_are_computed_once_each_way(
    measure: Measure, unseen: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [], metrics.digit_features
    monkeypatch.setattr(
        metrics, "digit_features", lambda x, *rest: seen.append(len(x)) or plain(x, *rest)
    )
    measure(unseen[0][:12])
    assert seen == [12, 12]


def test_a_reference_is_deterministic_and_symmetry_is_never_mirrored(
    train: tuple[Tensor, Tensor], classifier: DigitClassifier
) -> None:
    x0, labels = train[0][-150:], train[1][-150:]
    # The digits it was fitted to are all far from mirrored: by them alone symmetric ones would be.
    first, second = (collapse.reference_of(x0, labels, x0[:100], classifier) for _ in range(2))
    assert first.mirror_log_odds == 0
    for field in dataclasses.fields(Reference):
        a, b = getattr(first, field.name), getattr(second, field.name)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 32, 32), r"n >= 2.*\(1, 1, 32, 32\)"),
        (torch.zeros(4, 3, 32, 32), r"\(4, 3, 32, 32\)"),
        (torch.zeros(4, 32, 32), r"\(4, 32, 32\)"),
        (torch.zeros(4, 1, 28, 28), r"\(32, 32\) pixels.*\(28, 28\)"),
        (torch.zeros(4, 1, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.full((4, 1, 32, 32), torch.nan), "finite"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor, message: str, measure: Measure) -> None:
    with pytest.raises(ValueError, match=message):
        measure(images)


def test_references_that_do_not_fit_are_refused(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classifier: DigitClassifier
) -> None:
    (x0, labels), real = (train[0][:120], train[1][:120]), test[0][:100]
    with pytest.raises(ValueError, match="119 labels for 120"):
        collapse.reference_of(x0, labels[1:], real, classifier)
    with pytest.raises(ValueError, match="training images must be.*n >= 100"):
        collapse.reference_of(x0[:99], labels[:99], real, classifier)
    with pytest.raises(ValueError, match="test images must be.*n >= 100"):
        collapse.reference_of(x0, labels, real[:99], classifier)
    with pytest.raises(ValueError, match="no training image of class 3"):
        collapse.reference_of(x0, labels.where(labels != 3, 8), real, classifier)


def test_overlap_needs_neighbours() -> None:
    features = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="1 and 5"):
        collapse.overlap(features[:1], features)
    with pytest.raises(ValueError, match="got 0"):
        collapse.overlap(features, features, k=0)
