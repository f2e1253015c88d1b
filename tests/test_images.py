"""Tensors as pictures: grey levels and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import Pixels, random_pixels
from PIL import Image

from colddiff.images import save_grid, to_uint8


def tensor_of(pixels: Pixels) -> torch.Tensor:
    """``n h w c`` grey levels -> ``n c h w`` in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def test_grey_levels_are_rounded_to_the_nearest() -> None:
    levels = np.arange(256)
    for shift in (-0.49, 0.0, 0.49):
        x = torch.from_numpy((levels + shift) / 127.5 - 1).view(1, 1, 16, 16)
        assert np.array_equal(to_uint8(x)[0, :, :, 0].ravel(), levels)
        assert np.array_equal(to_uint8(x.float())[0, :, :, 0].ravel(), levels)


def test_values_outside_are_clamped() -> None:
    x = torch.tensor([-7.0, -1.001, 1.001, 9.0, -torch.inf, torch.inf]).view(1, 1, 2, 3)
    assert to_uint8(x)[0, :, :, 0].tolist() == [[0, 0, 255], [255, 0, 255]]


def test_channels_come_last() -> None:
    pixels = random_pixels(4, 5, 6, 3)
    array = to_uint8(tensor_of(pixels))
    assert array.dtype == np.uint8
    assert np.array_equal(array, pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "gap"), [(2, 2), (1, 1), (3, 0)])
def test_grid_shows_rows_of_images(channels: int, scale: int, gap: int, tmp_path: Path) -> None:
    rows = [random_pixels(3, 8, 10, channels, seed=seed) for seed in range(2)]
    path = tmp_path / "samples" / "grid.png"
    save_grid(path, [tensor_of(row) for row in rows], scale, gap)
    expected = np.full((2 * 8 + gap, 3 * 10 + 2 * gap, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (8 + gap), j * (10 + gap)
            expected[top : top + 8, left : left + 10] = image
    expected = expected.repeat(scale, 0).repeat(scale, 1)
    with Image.open(path) as picture:
        assert picture.mode == ("L" if channels == 1 else "RGB")
        assert np.array_equal(np.asarray(picture).reshape(expected.shape), expected)


def test_a_grid_of_one_image(tmp_path: Path) -> None:
    pixels = random_pixels(1, 8, 8, 1)
    save_grid(tmp_path / "one.png", [tensor_of(pixels)], scale=1)
    with Image.open(tmp_path / "one.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels[0, :, :, 0])
