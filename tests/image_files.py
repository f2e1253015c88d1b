"""Small data sets in the real ones' file formats."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, array: Pixels) -> None:
    """MNIST's format: magic 0, 0, 8 (unsigned bytes), dimensions; sizes, big-endian; values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, tuple[Pixels, Pixels]]:
    """30 training and 20 test images below ``root/name/raw``; returns pixels and labels."""
    written = {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 20)):
        pixels = random_pixels(count, 28, 28, seed=count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        written[split] = (pixels, labels)
    return written


def write_cifar10(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[Pixels, list[int]]]:
    """Two training batches and a test batch of 6 images; torchvision's checksums become theirs."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name: str, value: Any) -> str:
        data = pickle.dumps(value, protocol=2)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    parts: list[tuple[str, Pixels, list[int]]] = []
    sums = {}
    for seed, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        # Rows of 3072: all reds, then all greens, then all blues.
        rows = random_pixels(6, 3 * 32 * 32, seed=seed)
        labels = [(seed + i) % 10 for i in range(6)]
        sums[name] = dump(name, {"data": rows, "labels": labels})
        parts.append((name, rows.reshape(6, 3, 32, 32), labels))
    names = dump("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [list(item) for item in list(sums.items())[:2]])
    monkeypatch.setattr(CIFAR10, "test_list", [list(item) for item in list(sums.items())[2:]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "md5": names} | {"key": "label_names"}
    )
    first, second, test = (part[1:] for part in parts)
    return {"train": (np.concatenate((first[0], second[0])), first[1] + second[1]), "test": test}


def write_images(
    folder: Path, count: int, height: int = 20, width: int = 24, seed: int = 0
) -> list[Pixels]:
    """``count`` colour PNGs, 000.png and on; returns their pixels ``h w 3``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [random_pixels(height, width, 3, seed=seed + i) for i in range(count)]
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return images


def pil_resized(image: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def assert_within_one_level(ours: Tensor, theirs: Pixels) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.numpy().astype(int) - theirs.astype(int)).max() <= 1
