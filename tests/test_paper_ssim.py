"""The numbers behind Table 1's footnote on MNIST's degraded SSIM; they need full MNIST."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_msssim import ssim
from skimage.metrics import structural_similarity
from torch import Tensor

from analysis.table1 import SUSPECT_NOTE
from colddiff.batches import to_batch
from colddiff.config import DataConfig, DegradationConfig
from colddiff.data import load_images
from colddiff.degradation import Blur


def windowed(low: float, data_range: float, size: int = 11) -> Callable[[Tensor, Tensor], float]:
    def measure(x: Tensor, y: Tensor) -> float:
        scale = (1 - low) / 2  # [-1, 1] -> [low, 1]
        pair = ((x + 1) * scale + low, (y + 1) * scale + low)
        return float(ssim(*pair, data_range=data_range, win_size=size))

    return measure


def uniform(low: float) -> Callable[[Tensor, Tensor], float]:
    def measure(x: Tensor, y: Tensor) -> float:
        scale = (1 - low) / 2
        pairs = zip(x[:2000, 0].numpy(), y[:2000, 0].numpy(), strict=True)
        values = [
            structural_similarity((a + 1) * scale + low, (b + 1) * scale + low, data_range=1 - low)
            for a, b in pairs
        ]
        return float(np.mean(values))

    return measure


MEASURED = {
    "0.014": windowed(0, 1),
    "0.173": windowed(-1, 2),
    "0.131": windowed(-1, 1),
    "0.341": windowed(-1, 2, size=7),
    "0.319": uniform(-1),
    "0.017": uniform(0),
}


@pytest.fixture(scope="module")
def digits() -> Tensor:
    root = os.environ.get("COLDDIFF_TEST_DATA_ROOT")
    if not root or not (Path(root) / "MNIST").is_dir():
        pytest.skip("full MNIST is absent: set COLDDIFF_TEST_DATA_ROOT to the folder with MNIST/")
    config = DataConfig(name="mnist", root=root)
    return to_batch(load_images(config, "test").take(torch.arange(10_000)), config)


@pytest.mark.parametrize("printed", MEASURED)
def test_the_footnotes_numbers(printed: str, digits: Tensor) -> None:
    assert printed in SUSPECT_NOTE
    values = [
        MEASURED[printed](Blur(DegradationConfig(T=T), 32).terminal(digits), digits)
        for T in (20, 40)
    ]
    assert f"{values[0]:.3f}" == printed
    assert abs(values[1] - values[0]) < 0.0035
