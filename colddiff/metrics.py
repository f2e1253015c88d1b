"""How far two sets of images are apart: RMSE, SSIM, Fréchet distances, class balance.

Image arguments are floating-point tensors b c h w in [-1, 1]. Every metric works on (x + 1) / 2
clamped to [0, 1], as the paper's Table 1 does.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

INCEPTION_VARIABLE = "COLDDIFF_INCEPTION_WEIGHTS"
# torch-fidelity's file, under its name in torch hub's cache, and the sha256 it is known by.
INCEPTION_NAME = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SSIM_WINDOW = 11


class FeatureNet(Protocol):
    """A frozen net with features, as :class:`colddiff.classifier.DigitClassifier`."""

    def features(self, x: Tensor) -> Tensor:
        """Features (b, d) of images b c h w in [-1, 1]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, which tell the device."""
        ...


@dataclass(frozen=True)
class ClassBalance:
    """How often each class was predicted, and how far that is from a reference.

    ``total_variation`` is half the sum of |share - reference share|: 0 is the same histogram, 1
    means nothing in common.
    """

    counts: tuple[int, ...]
    total_variation: float


def rmse(x: Tensor, y: Tensor) -> float:
    """Root of the mean squared error over all pixels of all images, in [0, 1].

    Raises ``ValueError`` on shapes that differ or are not b c h w.
    """
    return float(squared_errors(x, y).mean().sqrt())


def rmse_per_class(x: Tensor, y: Tensor, labels: Tensor, classes: int = 10) -> tuple[float, ...]:
    """RMSE over the images of each class, by int labels (b,); NaN for a class without images.

    Raises ``ValueError`` on wrong shapes or labels outside 0..classes-1.
    """
    return rmse_of_classes(squared_errors(x, y), labels, classes)


def rmse_of_classes(errors: Tensor, labels: Tensor, classes: int = 10) -> tuple[float, ...]:
    """:func:`rmse_per_class` from the :func:`squared_errors` of the images."""
    labels = _checked_labels(labels, classes).to(errors.device)
    if len(labels) != len(errors):
        raise ValueError(f"{len(labels)} labels for {len(errors)} images: give one label an image")
    return tuple(float(errors[labels == label].mean().sqrt()) for label in range(classes))


def ssim(x: Tensor, y: Tensor, batch: int = 512) -> float:
    """Mean structural similarity, in [-1, 1]: the mean of :func:`similarities`."""
    return float(similarities(x, y, batch).mean())


def similarities(x: Tensor, y: Tensor, batch: int = 512) -> Tensor:
    """Structural similarity of each image, by pytorch_msssim with data range 1, float64 (b,).

    An 11x11 Gaussian window of sigma 1.5 without border padding. Raises ``ValueError`` on shapes
    that differ, are not b c h w, or are smaller than the window.
    """
    from pytorch_msssim import ssim as similarity

    _check_pair(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got "
            f"{x.shape[-2]}x{x.shape[-1]}"
        )
    parts = [
        similarity(_unit(a), _unit(b), data_range=1.0, size_average=False)
        for a, b in zip(torch.split(x, batch), torch.split(y, batch), strict=True)
    ]
    return torch.cat(parts).double()


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (n, d) and (m, d), in float64.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), by torch-fidelity. It is biased upwards
    for few samples: compare only equal n and m. Raises ``ValueError`` on other shapes, fewer than
    two samples or non-finite features.
    """
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    _check_features(features_a, features_b)
    first, second = (
        fid_features_to_statistics(features.detach().double().cpu())
        for features in (features_a, features_b)
    )
    for statistics in (first, second):
        statistics["sigma"] = np.atleast_2d(statistics["sigma"])
    # Rounding can leave a tiny negative number for equal sets.
    return max(0.0, float(fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]))


def digit_features(images: Tensor, classifier: FeatureNet, batch: int = 512) -> Tensor:
    """Classifier features of b 1 h w images, float32 (b, 64) on the CPU."""
    device = next(classifier.parameters()).device

    def extract(part: Tensor) -> Tensor:
        return classifier.features(2 * _unit(part.to(device, torch.float32)) - 1)

    return _in_batches(extract, images, batch, device)


def fid_digits(x: Tensor, y: Tensor, classifier: FeatureNet, batch: int = 512) -> float:
    """Fréchet distance between classifier features of two sets of b 1 h w digits.

    The sets may differ in size. To compare many sets with one, use ``digit_features`` and
    ``frechet_distance``. Raises ``ValueError`` on images the classifier does not take.
    """
    first, second = (digit_features(images, classifier, batch) for images in (x, y))
    return frechet_distance(first, second)


def find_inception_weights(explicit: str | None) -> Path | None:
    """The Inception weights: the option, else the environment variable, else torch hub's cache.

    Nothing is downloaded; None when none of them is there. Raises ``ValueError`` when the option
    or ``COLDDIFF_INCEPTION_WEIGHTS`` names a file that does not exist.
    """
    for source, name in (
        ("option", explicit),
        (INCEPTION_VARIABLE, os.environ.get(INCEPTION_VARIABLE)),
    ):
        if name:
            return _existing(Path(name).expanduser(), source)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_NAME
    return cached if cached.is_file() else None


def inception_features(
    images: Tensor, weights: Path, batch: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """Inception-v3 pool features of torch-fidelity's FID, float32 (b, 2048) on the CPU.

    Images of 1 or 3 channels are rounded to 8 bits, as that network takes them. Raises
    ``ValueError`` when ``weights`` is missing or is no such network.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be of shape (b, 1 or 3, h, w), got {tuple(images.shape)}")
    network = _inception(Path(weights), torch.device(device))

    def extract(part: Tensor) -> Tensor:
        pixels = _unit(part.to(device, torch.float32)).mul(255).round().to(torch.uint8)
        features: Tensor = network(pixels.expand(-1, 3, -1, -1))[0]
        return features

    return _in_batches(extract, images, batch, torch.device(device))


def fid_inception(
    x: Tensor, y: Tensor, weights: Path, batch: int = 64, device: torch.device | str = "cpu"
) -> float:
    """FID between two sets of images, on torch-fidelity's Inception-v3 read from ``weights``.

    The sets may differ in size. To compare many sets with one, use ``inception_features`` and
    ``frechet_distance``. Raises ``ValueError`` when ``weights`` is missing or is no such network.
    """
    first, second = (inception_features(images, weights, batch, device) for images in (x, y))
    return frechet_distance(first, second)


def class_balance(
    labels: Tensor, classes: int = 10, reference: Sequence[float] | None = None
) -> ClassBalance:
    """Histogram of predicted int labels (n,) and its distance from ``reference`` counts or shares.

    Without a reference the distance is to the uniform histogram. Raises ``ValueError`` on labels
    outside 0..classes-1, no labels, or a reference that is no histogram of that many classes.
    """
    labels = _checked_labels(labels, classes)
    if len(labels) == 0:
        raise ValueError("class balance needs at least one label, got none")
    counts = torch.bincount(labels, minlength=classes)
    target = torch.tensor([1.0] * classes if reference is None else list(reference)).double()
    if len(target) != classes or not bool((target >= 0).all()) or not 0 < target.sum() < np.inf:
        raise ValueError(f"the reference must be {classes} non-negative numbers, got {reference}")
    difference = counts / counts.sum().double() - target / target.sum()
    return ClassBalance(tuple(counts.tolist()), float(difference.abs().sum() / 2))


def _unit(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1)


def squared_errors(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image in [0, 1], float64 (b,).

    Raises ``ValueError`` on shapes that differ or are not b c h w.
    """
    _check_pair(x, y)
    pairs = zip(torch.split(x, 512), torch.split(y, 512), strict=True)
    parts = [(_unit(a.double()) - _unit(b.double())).square().flatten(1).mean(1) for a, b in pairs]
    return torch.cat(parts)


def _in_batches(
    extract: Callable[[Tensor], Tensor], images: Tensor, batch: int, device: torch.device
) -> Tensor:
    # bfloat16 features would move the Fréchet distance, so autocast is off whatever the caller set.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return torch.cat([extract(part).float().cpu() for part in torch.split(images, batch)])


@functools.lru_cache(maxsize=1)
def _inception(weights: Path, device: torch.device) -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _existing(weights, "weights")
    if hashlib.sha256(path.read_bytes()).hexdigest() != INCEPTION_SHA256:
        logger.warning(
            "%s is not torch-fidelity's %s: do not compare this FID with others",
            path,
            INCEPTION_NAME,
        )
    try:
        # torch-fidelity unpickles without restriction; what passes here first runs no code there.
        torch.load(path, map_location="cpu", weights_only=True)
        network: torch.nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"{path} holds no Inception weights of torch-fidelity: {error}") from error
    return network.to(device)


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        raise ValueError(f"no Inception weights at {path} (from {source}); nothing is downloaded")
    return path


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"need two non-empty image tensors of one shape (b, c, h, w), got {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"images must be floating point in [-1, 1], got {x.dtype} and {y.dtype}")


def _check_features(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"need features (n, d) and (m, d) with n, m >= 2, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        raise ValueError("features must be finite, got NaN or infinity")


def _checked_labels(labels: Tensor, classes: int) -> Tensor:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be integers of shape (n,), got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels.long()
