"""Batches as a function of (seed, step, rank), and tensors from bytes."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from image_files import random_pixels
from torch import Tensor

from colddiff.batches import Order, batches, to_batch
from colddiff.config import DataConfig
from colddiff.data import TensorImages
from colddiff.images import to_uint8
from colddiff.randomness import generator

CPU = torch.device("cpu")
AUGMENTED = DataConfig(image_size=32, preparation="crop", flip=True)


def sequence(order: Order, count: int, first: int = 0) -> list[int]:
    return [i for k in range(first, first + count) for i in order.indices(k).tolist()]


def first_batches(stream: Iterator[Tensor], count: int) -> list[Tensor]:
    return list(itertools.islice(stream, count))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def square_images() -> TensorImages:
    return TensorImages(torch.from_numpy(random_pixels(23, 3, 35, 35)))


@pytest.mark.parametrize(("samples", "batch"), [(23, 4), (24, 4), (7, 7), (5, 12), (1, 3)])
def test_each_epoch_visits_each_image_once(samples: int, batch: int) -> None:
    order = Order(samples, batch, seed=3)
    visited = sequence(order, count=-(-4 * samples // batch))
    epochs = [visited[i * samples : (i + 1) * samples] for i in range(4)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    if samples > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_seed_and_step() -> None:
    assert sequence(Order(50, 8, seed=1), 20) == sequence(Order(50, 8, seed=1), 20)
    assert sequence(Order(50, 8, seed=1), 5) != sequence(Order(50, 8, seed=2), 5)
    assert sequence(Order(50, 8, seed=1), 20)[13 * 8 :] == sequence(Order(50, 8, seed=1), 7, 13)
    # The same endless sequence, cut differently.
    assert sequence(Order(50, 8, seed=1), 20) == sequence(Order(50, 16, seed=1), 10)


def test_a_late_batch_is_found_at_once() -> None:
    order = Order(4000, 64, seed=0)
    start = time.perf_counter()
    assert order.indices(10**9).shape == (64,)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_batch_in_order(world: int) -> None:
    whole = Order(23, 12, seed=5)
    ranks = [Order(23, 12, seed=5, rank=rank, world_size=world) for rank in range(world)]
    drawn = torch.arange(100, 112)
    assert [rank.size for rank in ranks] == [12 // world] * world
    assert torch.equal(torch.cat([rank.share(drawn) for rank in ranks]), drawn)
    for k in range(12):
        parts = [rank.indices(k) for rank in ranks]
        assert all(len(part) == 12 // world for part in parts)
        assert torch.equal(torch.cat(parts), whole.indices(k))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training.batch_size = 8 .* world size 3.*multiple of 3"):
        Order(23, 8, seed=5, rank=2, world_size=3).indices(0)


@pytest.mark.parametrize("config", [AUGMENTED, DataConfig(image_size=35)])
def test_a_stream_resumed_at_k_repeats(config: DataConfig, square_images: TensorImages) -> None:
    order = Order(23, 4, seed=1)
    whole = first_batches(batches(square_images, config, order, 0, CPU, 0), 14)
    for k in (1, 5, 6, 11):
        resumed = first_batches(batches(square_images, config, order, k, CPU, 0), 14 - k)
        assert_same(resumed, whole[k:])


def test_seeds_give_other_batches(square_images: TensorImages) -> None:
    streams = [batches(square_images, AUGMENTED, Order(23, 4, s), 0, CPU, 0) for s in (0, 1)]
    assert not torch.equal(next(streams[0]), next(streams[1]))


def test_ranks_together_see_what_one_process_sees(square_images: TensorImages) -> None:
    """Crops and flips included."""
    whole = batches(square_images, AUGMENTED, Order(23, 8, 2), 3, CPU, 0)
    ranks = [
        batches(square_images, AUGMENTED, Order(23, 8, 2, rank=rank, world_size=2), 3, CPU, 0)
        for rank in range(2)
    ]
    for _ in range(7):
        assert torch.equal(torch.cat([next(rank) for rank in ranks]), next(whole))


def test_augmentation_is_a_random_window_and_a_random_flip() -> None:
    """Every image tells its place: the value at (0, 0) of a window of row + 35 column."""
    where = torch.arange(35)[:, None] % 6 + 6 * (torch.arange(35) % 6)  # windows start in 0..3
    images = TensorImages(where.to(torch.uint8).expand(64, 1, 35, 35).contiguous())
    stream = batches(images, AUGMENTED, Order(64, 64, 0), 0, CPU, 0)
    seen: dict[tuple[int, int, bool], int] = {}
    for x0 in first_batches(stream, 20):
        for image in torch.from_numpy(to_uint8(x0))[..., 0].int():
            flipped = (int(image[0, 1]) - int(image[0, 0])) % 36 != 6
            corner = int(image[0, -1] if flipped else image[0, 0])
            place = (corner % 6, corner // 6, flipped)
            seen[place] = seen.get(place, 0) + 1
    assert set(seen) == {(r, c, f) for r in range(4) for c in range(4) for f in (False, True)}
    assert sum(count for (_, _, f), count in seen.items() if f) == pytest.approx(640, abs=80)
    assert max(seen.values()) < 3 * min(seen.values())


def test_values_are_exactly_minus_one_to_one() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0 = to_batch(levels, DataConfig(image_size=16))
    assert x0.dtype == torch.float32
    assert (x0.min().item(), x0.max().item()) == (-1.0, 1.0)
    expected = [2 * level / 255 - 1 for level in range(256)]
    torch.testing.assert_close(
        x0.flatten().double(), torch.tensor(expected).double(), atol=1e-7, rtol=0
    )
    assert torch.equal(torch.from_numpy(to_uint8(x0)), levels.permute(0, 2, 3, 1))


def test_crop_is_central_unless_told(square_images: TensorImages) -> None:
    pixels = square_images.pixels[:6]
    config = DataConfig(image_size=32, preparation="crop")
    central = to_batch(pixels, config)
    assert torch.equal(central, pixels[:, :, 1:33, 1:33].float() / 127.5 - 1)
    corners = torch.tensor([[0, 0], [3, 3], [0, 3], [2, 1], [1, 2], [3, 0]])
    cropped = to_batch(pixels, config, crop=corners)
    for image, original, (top, left) in zip(cropped, pixels, corners.tolist(), strict=True):
        for channel in range(3):
            window = original[channel, top : top + 32, left : left + 32]
            assert torch.equal(image[channel], window.float() / 127.5 - 1)


def test_flip_mirrors_columns(square_images: TensorImages) -> None:
    pixels = square_images.pixels[:4]
    flip = torch.tensor([True, False, False, True])
    x0 = to_batch(pixels, DataConfig(image_size=35), flip=flip)
    for image, original, mirrored in zip(x0, pixels, flip.tolist(), strict=True):
        expected = torch.from_numpy(original.numpy()[:, :, ::-1].copy()) if mirrored else original
        assert torch.equal(image, expected.float() / 127.5 - 1)


def test_generators_know_nothing_but_seed_purpose_and_step() -> None:
    def expected(text: str) -> int:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") // 2

    assert generator(3, "flip", 7).initial_seed() == expected("3/flip/7")
    assert generator(3, "flip").initial_seed() == expected("3/flip/0")
    torch.manual_seed(0)
    first = torch.rand(4, generator=generator(0, "t", 1))
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(4, generator=generator(0, "t", 1)))
    seeds = {
        generator(seed, purpose, step).initial_seed()
        for seed in range(5)
        for purpose in ("order", "t", "crop")
        for step in range(20)
    }
    assert len(seeds) == 300
