"""Batches: which images, where cropped and whether flipped, as a function of (seed, step, rank).

Images in memory are indexed where they lie. A folder of images that does not fit is decoded by
DataLoader workers, in the same order.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from colddiff.config import DataConfig
from colddiff.data import FolderImages, Images
from colddiff.machine import upload
from colddiff.randomness import generator


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


def shared_size(batch_size: int, world_size: int) -> int:
    """How many images of a micro-batch each rank takes.

    Raises:
        ValueError: where the ranks cannot have equally many.
    """
    if batch_size % world_size:
        raise ValueError(
            f"training.batch_size = {batch_size} is not allowed with world size {world_size}: the "
            f"ranks share each batch equally, so it must be a multiple of {world_size}"
        )
    return batch_size // world_size


@dataclass(frozen=True)
class Order:
    """Which images make up each micro-batch: epoch permutations, laid end to end.

    Micro-batch ``k`` of ``B = batch_size`` images, all ranks together, is the slice
    ``kB..(k+1)B`` of that endless sequence, and rank r takes its r-th part.
    """

    samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Images of a micro-batch on this rank."""
        return shared_size(self.batch_size, self.world_size)

    def indices(self, k: int) -> Tensor:
        """int64 :attr:`size` indices of micro-batch ``k`` on this rank."""
        position, missing = k * self.batch_size + self.rank * self.size, self.size
        parts: list[Tensor] = []
        while missing:
            epoch, offset = divmod(position, self.samples)
            part = _permutation(self.samples, self.seed, epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)

    def share(self, values: Tensor) -> Tensor:
        """This rank's part of numbers drawn for the whole micro-batch."""
        return values[self.rank * self.size :][: self.size]


@functools.lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def batches(
    images: Images, config: DataConfig, order: Order, first: int, device: torch.device, workers: int
) -> Generator[Tensor, None, None]:
    """x0 of micro-batches ``first``, ``first + 1``, …, without end, on ``device``."""
    for k, pixels in enumerate(_pixels(images, order, first, device, workers), start=first):
        crop = flip = None
        if config.preparation == "crop":
            slack = pixels.shape[-1] - config.image_size + 1
            draws = torch.randint(
                slack, (order.batch_size, 2), generator=generator(order.seed, "crop", k)
            )
            crop = upload(order.share(draws), device)
        if config.flip:
            draws = torch.rand(order.batch_size, generator=generator(order.seed, "flip", k)) < 0.5
            flip = upload(order.share(draws), device)
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
            worker_init_fn=functools.partial(_ignore_signals, _exiting()),
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


def _ignore_signals(exiting: Event, _worker: int) -> None:
    """Slurm signals every process of a step; only the trainer itself must act on them."""
    import signal

    for name in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)


@functools.cache
def _exiting() -> Event:
    """Set when this process exits, just before multiprocessing ends the workers that are left.

    It sends SIGTERM and waits without a limit: workers that ignored that too would hang the exit.
    """
    event = torch.multiprocessing.Event()
    atexit.register(event.set)
    return event
