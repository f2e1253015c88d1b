"""How good generated digits are, as a set: their features and classes against training images."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from colddiff import metrics
from colddiff.batches import to_batch
from colddiff.classifier import load_digit_classifier
from colddiff.config import DataConfig, RunConfig
from colddiff.data import load_images, split_validation

TRAINING_IMAGES = 10_000
"""The first so many training images are what generated ones are compared with."""


@dataclass(frozen=True)
class Quality:
    """Of n generated images; see :mod:`colddiff.metrics` for the measures."""

    fid_digits: float
    """Compare only for equal n: few images bias it upwards."""
    counts: tuple[int, ...]
    """Images by predicted class."""
    total_variation: float
    """Of the predicted classes' shares from those of the training images, 0..1."""
    training_images: int


def generation_quality(images: Tensor, config: RunConfig, device: torch.device) -> Quality:
    """Of images ``n 1 h w`` in [-1, 1] from a run on digits; deterministic."""
    classifier = load_digit_classifier(device)
    features = metrics.digit_features(images, classifier)
    known, shares = training_reference(config.data, config.training.batch_size, str(device))
    with torch.no_grad():
        labels = torch.cat(
            [classifier(part.to(device)).argmax(1).cpu() for part in images.split(512)]
        )
    balance = metrics.class_balance(labels, reference=shares)
    return Quality(
        fid_digits=metrics.frechet_distance(features, known),
        counts=balance.counts,
        total_variation=balance.total_variation,
        training_images=len(known),
    )


@functools.lru_cache(maxsize=2)
def training_reference(
    data: DataConfig, batch_size: int, device: str
) -> tuple[Tensor, tuple[int, ...]]:
    """The digit classifier's features of images that are trained on, and how many of each class."""
    images, _ = split_validation(load_images(data, "train"), data.validation, batch_size)
    chosen = torch.arange(min(TRAINING_IMAGES, len(images)))
    x0, labels = to_batch(images.take(chosen), data), images.labels
    assert labels is not None, "digits have labels"
    features = metrics.digit_features(x0, load_digit_classifier(torch.device(device)))
    return features, tuple(torch.bincount(labels[chosen], minlength=10).tolist())
