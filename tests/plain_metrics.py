"""Metrics the plain way: loops, scikit-image, eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from colddiff.batches import to_batch
from colddiff.config import RunConfig
from colddiff.data import load_images


def originals(config: RunConfig, count: int) -> Tensor:
    """The first test images."""
    return to_batch(load_images(config.data, "test").take(torch.arange(count)), config.data)


def unit(x: Tensor) -> np.ndarray:
    """[-1, 1] -> [0, 1], clamped."""
    return ((x.double().clamp(-1, 1) + 1) / 2).numpy()


def plain_rmse(x: np.ndarray, y: np.ndarray) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [
        structural_similarity(a[0], b[0], data_range=1.0, **options)  # type: ignore[no-untyped-call]
        for a, b in zip(x, y, strict=True)
    ]
    return float(np.mean(values))


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = root(root(first) @ second @ root(first))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(first + second - 2 * cross))
