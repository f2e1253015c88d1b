"""How good generated digits are, as a set, against the images that were trained on."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from colddiff import metrics
from colddiff.batches import to_batch
from colddiff.classifier import load_digit_classifier
from colddiff.collapse import REFERENCE_IMAGES, Collapse, Reference, measure, reference_of
from colddiff.config import DataConfig, RunConfig
from colddiff.data import load_images, split_validation

INTENSITY_BINS = 10


@dataclass(frozen=True)
class Quality(Collapse):
    """Of n generated images; see :mod:`colddiff.collapse` for the measures."""

    by_intensity: tuple[tuple[int, ...], ...]
    """Images by the mean intensity that they started from, in ten bins of as many training images
    each, and by predicted class; empty where the start's mean says nothing."""
    training_images: int
    """That they are compared with."""


@dataclass(frozen=True)
class Known:
    """What generated images are compared with, of one data set."""

    reference: Reference
    edges: Tensor
    """Inner edges of the intensity bins, in [-1, 1]."""


def generation_quality(
    images: Tensor, config: RunConfig, device: torch.device, intensities: Tensor | None = None
) -> Quality:
    """Of images ``n 1 h w`` in [-1, 1] from a run on digits; deterministic.

    Args:
        images: the generated ones.
        config: of the run; its training images are the reference.
        device: where the classifier computes.
        intensities: ``n`` means of the states that the images started from.
    """
    classifier = load_digit_classifier(device)
    known = known_digits(config.data, config.training.batch_size, str(device))
    measured = measure(images, known.reference, classifier)
    table: tuple[tuple[int, ...], ...] = ()
    if intensities is not None:
        with torch.no_grad():
            labels = torch.cat(
                [classifier(x.to(device)).argmax(1).cpu() for x in images.split(500)]
            )
        place = torch.bucketize(intensities.double(), known.edges, right=True) * 10 + labels
        counts = torch.bincount(place, minlength=INTENSITY_BINS * 10).view(INTENSITY_BINS, 10)
        table = tuple(map(tuple, counts.tolist()))
    return Quality(
        **dataclasses.asdict(measured),
        by_intensity=table,
        training_images=len(known.reference.features),
    )


def distance_to_training(images: Tensor, config: RunConfig, device: torch.device) -> float:
    """FID(digits) of ``images`` from training images alone, for choosing by; see Quality."""
    features = metrics.digit_features(images, load_digit_classifier(device))
    known = training_features(config.data, config.training.batch_size, str(device))
    return metrics.frechet_distance(features, known)


@functools.lru_cache(maxsize=2)
def training_digits(data: DataConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """The first images that are trained on, as generated ones are, and their labels."""
    training, _ = split_validation(load_images(data, "train"), data.validation, batch_size)
    chosen = torch.arange(min(REFERENCE_IMAGES, len(training)))
    labels = training.labels
    assert labels is not None, "digits have labels"
    return to_batch(training.take(chosen), data), labels[chosen]


@functools.lru_cache(maxsize=2)
def training_features(data: DataConfig, batch_size: int, device: str) -> Tensor:
    """Of :func:`training_digits`, once a process: all trials of a study are compared with them."""
    x0, _ = training_digits(data, batch_size)
    return metrics.digit_features(x0, load_digit_classifier(torch.device(device)))


@functools.lru_cache(maxsize=2)
def known_digits(data: DataConfig, batch_size: int, device: str) -> Known:
    """Images that are trained on, and test images to draw lines by (not to choose by)."""
    x0, labels = training_digits(data, batch_size)
    test = load_images(data, "test")
    real = to_batch(test.take(torch.arange(min(REFERENCE_IMAGES, len(test)))), data)
    classifier = load_digit_classifier(torch.device(device))
    quantiles = torch.linspace(0, 1, INTENSITY_BINS + 1).double()[1:-1]
    return Known(
        reference=reference_of(x0, labels, real, classifier),
        edges=x0.double().mean(dim=(1, 2, 3)).quantile(quantiles),
    )
