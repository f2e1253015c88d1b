"""Has a generator of digits collapsed? Classes, unreadable and mirrored digits, diversity.

Image arguments are floating-point tensors n 1 h w in [-1, 1]. Everything but blank images and
duplicates is judged by the shipped digit classifier's features. What counts as unreadable or
mirrored is calibrated on real test digits, so a rate is to be read against the 1 % of those.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from colddiff import metrics
from colddiff.classifier import CLASSES, DigitClassifier

REFERENCE_IMAGES = 10_000
FALSE_ALARMS = 0.01
"""Share of real test digits that count as unreadable, and at most as mirrored."""
NEIGHBOURS = 5
STROKE_CONTRAST = 0.5
DUPLICATE_QUANTILE = 0.001
ASYMMETRIC = (2, 3, 4, 5, 6, 7, 9)
"""Classes that look another way mirrored; a mirrored 0, 1 or 8 is just another 0, 1 or 8."""
MIRROR_C = 100.0
"""scikit-learn's C times the training images. More takes more blurred digits for mirrored."""
BLOCK = 1000


@dataclass(frozen=True)
class Reference:
    """Real digits, and where the lines are drawn that they calibrate."""

    features: Tensor
    """float32 (m, 64) of the first m <= 10,000 training images."""
    shares: tuple[float, ...]
    """Of the ten classes among these."""
    size: tuple[int, int]
    """Height and width of the images."""
    confidence: float
    """Below this probability of its likeliest class an image is unreadable."""
    distance: float
    """Farther than this from its fifth nearest training feature, too."""
    duplicate_distance: float
    """RMS over pixels in [0, 1]; 0.1 % of these training images have another one nearer."""
    mirror: tuple[Tensor, Tensor]
    """Logistic regression on the features of an image and of its flip: float64 weights (17, 128)
    and biases (17,) of 0..9 upright, then ``ASYMMETRIC`` mirrored."""
    mirror_log_odds: float
    """Above these an image is mirrored. At least 0, as a symmetric image is not."""
    mirror_sensitivity: float
    """Share of flipped test digits, of classes (as predicted) ``ASYMMETRIC``, found mirrored."""


@dataclass(frozen=True)
class Overlap:
    """Two sets of features, by balls around each that reach to its k-th nearest.

    Shares of generated features in a real one's ball (precision) and of real ones in a generated
    one's (recall; Kynkäänniemi et al. 2019). In how many real balls a generated one is, over k
    (density, can exceed 1), and the share of real balls with one (coverage; Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Collapse(Overlap):
    """Of n generated images; rates and shares are 0..1. Compare only for equal n.

    The overlap is that with the first min(n, 10,000) training images. Of fewer than 100 it says
    nothing: their balls reach across classes, and noise has a precision of 1.
    """

    n: int
    counts: tuple[int, ...]
    """By predicted class; blank and unreadable images are in some class, too."""
    intervals: tuple[tuple[float, float], ...]
    """95 % Wilson intervals of the classes' shares."""
    total_variation: float
    """Between the classes' shares and those of the training images."""
    kl: float
    """KL(generated || training) of the classes' shares, in nats."""
    entropy: float
    """Of the classes' shares; 1 where all are equal, 0 for a single class."""
    ratios: tuple[float, ...]
    """Share over that in the training images; index 0 is the over-generation of zeros."""
    blank_rate: float
    """Of images without a stroke, see :func:`blank`."""
    unreadable_rate: float
    """Of images that are blank, of uncertain class, or far from the training features."""
    mirrored_rate: float
    """Of images, not blank, that look mirrored; of real 2s 4 % do, of 5s 2 %, hardly any others."""
    duplicate_rate: float
    """Of images with another one nearer than almost any two real digits are."""
    fid_digits: float
    """From all training features of the reference; few images bias it upwards."""


@dataclass(frozen=True)
class _Seen:
    """What all measures look at, computed once."""

    pixels: Tensor  # n h*w in [0, 1]
    features: Tensor  # n 64
    flipped: Tensor  # n 64, of the flipped images
    probabilities: Tensor  # n 10, float64


def reference_of(
    train: Tensor, train_labels: Tensor, test: Tensor, classifier: DigitClassifier
) -> Reference:
    """Features, shares and thresholds of real digits; deterministic.

    Uses the first 10,000 images each of ``train`` and ``test``, b 1 h w in [-1, 1]. Raises
    ``ValueError`` on other shapes, fewer than 100 images of either (1 % of them would be none),
    or labels that are not one an image or miss a class.
    """
    if len(train_labels) != len(train):
        raise ValueError(f"{len(train_labels)} labels for {len(train)} training images")
    least = round(1 / FALSE_ALARMS)
    labels = train_labels[:REFERENCE_IMAGES].cpu()
    known = _look(train[:REFERENCE_IMAGES], classifier, "training images", least)
    real = _look(test[:REFERENCE_IMAGES], classifier, "test images", least)
    counts = metrics.class_balance(labels, CLASSES).counts
    if 0 in counts:
        raise ValueError(f"no training image of class {counts.index(0)}: every class needs one")
    distances = _nearest(real.features, known.features, NEIGHBOURS)
    confidence, distance = _unreadable_lines(real.probabilities.amax(1), distances)
    mirror = _fit_mirror(known, labels)
    odds = _log_odds(mirror, real.features, real.flipped).sort(descending=True).values
    line = max(0.0, float(odds[int(FALSE_ALARMS * len(odds))]))
    asymmetric = torch.isin(real.probabilities.argmax(1), torch.tensor(ASYMMETRIC))
    return Reference(
        features=known.features,
        shares=tuple(count / len(labels) for count in counts),
        size=(train.shape[-2], train.shape[-1]),
        confidence=confidence,
        distance=distance,
        duplicate_distance=float(_nearest_other(known.pixels).quantile(DUPLICATE_QUANTILE)),
        mirror=mirror,
        mirror_log_odds=line,
        mirror_sensitivity=_rate(_log_odds(mirror, real.flipped, real.features)[asymmetric] > line),
    )


def measure(images: Tensor, reference: Reference, classifier: DigitClassifier) -> Collapse:
    """All measures of generated ``images`` n 1 h w in [-1, 1]; values outside are clamped.

    Raises ``ValueError`` on fewer than 2 images, another shape or size, or values not finite.
    """
    from scipy.stats import binomtest

    seen = _look(images, classifier, "images", 2)
    if tuple(images.shape[-2:]) != reference.size:
        raise ValueError(f"images must be {reference.size} pixels, got {tuple(images.shape[-2:])}")
    n = len(images)
    balance = metrics.class_balance(seen.probabilities.argmax(1), CLASSES, reference.shares)
    wilson = [binomtest(count, n).proportion_ci(method="wilson") for count in balance.counts]
    shares = torch.tensor(balance.counts).double() / n
    ratios = shares / torch.tensor(reference.shares).double()
    empty = blank(images.cpu())
    unsure = seen.probabilities.amax(1) < reference.confidence
    far = _nearest(seen.features, reference.features, NEIGHBOURS) > reference.distance
    odds = _log_odds(reference.mirror, seen.features, seen.flipped)
    return Collapse(
        n=n,
        counts=balance.counts,
        intervals=tuple((float(each.low), float(each.high)) for each in wilson),
        total_variation=balance.total_variation,
        kl=max(0.0, float(torch.xlogy(shares, ratios).sum())),  # rounding, where all are equal
        entropy=float(torch.special.entr(shares).sum()) / math.log(CLASSES),
        ratios=tuple(ratios.tolist()),
        blank_rate=_rate(empty),
        unreadable_rate=_rate(empty | unsure | far),
        mirrored_rate=_rate((odds > reference.mirror_log_odds) & ~empty),
        duplicate_rate=_rate(_nearest_other(seen.pixels) < reference.duplicate_distance),
        fid_digits=metrics.frechet_distance(seen.features, reference.features),
        **asdict(overlap(reference.features[:n], seen.features)),
    )


def blank(images: Tensor) -> Tensor:
    """Whether images n 1 h w in [-1, 1] show no stroke, bool (n,).

    A stroke is brighter than its ground, so contrast decides: a grey or white image is blank, too.
    The line is at half the possible contrast, MNIST's 70,000 digits at 32x32 have 0.80 and more.
    """
    pixels = images.clamp(-1, 1).flatten(1) / 2
    return pixels.amax(1) - pixels.amin(1) < STROKE_CONTRAST


def overlap(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> Overlap:
    """Precision, recall, density and coverage of features (m, d) and (n, d), in blocks.

    A ball reaches to the k-th nearest other feature of its own set (the last, of fewer than k) and
    includes its surface. Raises ``ValueError`` on fewer than two features or k below 1.
    """
    k = min(k, len(real) - 1, len(generated) - 1)
    if k < 1:
        raise ValueError(f"need k >= 1 of {len(real)} and {len(generated)} >= 2 features, got {k}")
    real_radii, generated_radii = (_nearest(each, each, k + 1) for each in (real, generated))
    balls, covered, recalled = [], torch.zeros(len(real)).bool(), torch.zeros(len(real)).bool()
    for part, radii in zip(generated.split(BLOCK), generated_radii.split(BLOCK), strict=True):
        distances = torch.cdist(part.double(), real.double())
        inside = distances <= real_radii
        balls.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (distances <= radii[:, None]).any(0)
    numbers = torch.cat(balls)
    return Overlap(
        precision=_rate(numbers > 0),
        recall=_rate(recalled),
        density=float(numbers.double().mean()) / k,
        coverage=_rate(covered),
    )


def _look(images: Tensor, classifier: DigitClassifier, what: str, least: int) -> _Seen:
    if images.ndim != 4 or images.shape[1] != 1 or len(images) < least:
        raise ValueError(f"{what} must be (n >= {least}, 1, h, w), got {tuple(images.shape)}")
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(f"{what} must be finite floating point in [-1, 1], got {images.dtype}")
    features = metrics.digit_features(images, classifier)
    flipped = metrics.digit_features(images.flip(-1), classifier)
    head = classifier.head.state_dict()
    logits = features.relu().double() @ head["weight"].cpu().double().T + head["bias"].cpu()
    pixels = (images.cpu().float().clamp(-1, 1).flatten(1) + 1) / 2
    return _Seen(pixels, features, flipped, logits.softmax(1))


def _unreadable_lines(confidences: Tensor, distances: Tensor) -> tuple[float, float]:
    """The same quantile of both, such that ``FALSE_ALARMS`` of the images are beyond either."""
    ranks = [values.argsort().argsort() for values in (confidences, -distances)]
    # An image is beyond the quantile of rank k where its lower rank is below k.
    k = int(torch.minimum(*ranks).sort().values[int(FALSE_ALARMS * len(distances))])
    return float(confidences.sort().values[k]), float(distances.sort(descending=True).values[k])


def _fit_mirror(known: _Seen, labels: Tensor) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression

    turned = torch.isin(labels, torch.tensor(ASYMMETRIC))
    upright = torch.cat([known.features, known.flipped], 1)
    mirrored = torch.cat([known.flipped, known.features], 1)[turned]
    targets = torch.cat([labels, labels[turned] + CLASSES])
    model = LogisticRegression(C=MIRROR_C / len(labels), max_iter=1000)
    model.fit(torch.cat([upright, mirrored]).double().numpy(), targets.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


def _log_odds(mirror: tuple[Tensor, Tensor], features: Tensor, flipped: Tensor) -> Tensor:
    """Of mirrored against upright, float64 (n,)."""
    logits = torch.cat([features, flipped], 1).double() @ mirror[0].T + mirror[1]
    return logits[:, CLASSES:].logsumexp(1) - logits[:, :CLASSES].logsumexp(1)


def _nearest(points: Tensor, others: Tensor, k: int) -> Tensor:
    """Distances (n,) of (n, d) to their k-th nearest of (m, d); float64, as float32 cancels."""
    blocks, others = points.double().split(BLOCK), others.double()
    return torch.cat([torch.cdist(block, others).kthvalue(k, 1).values for block in blocks])


def _nearest_other(pixels: Tensor) -> Tensor:
    """RMS distance (n,) of each image (n, pixels) to its nearest other."""
    parts = []
    for start in range(0, len(pixels), BLOCK):
        distances = torch.cdist(pixels[start : start + BLOCK], pixels)
        distances.diagonal(start).fill_(torch.inf)
        parts.append(distances.amin(1))
    return torch.cat(parts) / math.sqrt(pixels.shape[1])


def _rate(hits: Tensor) -> float:
    return float(hits.double().mean())
