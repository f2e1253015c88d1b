"""A folder of images as a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import assert_within_one_level, pil_resized, random_pixels, write_images
from PIL import Image
from torch import Tensor

from colddiff import data
from colddiff.config import DataConfig
from colddiff.data import FolderImages, TensorImages, load_images


def pixels_of(images: object) -> Tensor:
    assert isinstance(images, TensorImages)
    return images.pixels


def faces(root: Path, **values: object) -> DataConfig:
    config = DataConfig(name="folder", folder="faces", root=str(root), image_size=16)
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]


def expected_faces(images: list[np.ndarray]) -> np.ndarray:
    """20 x 24 -> 16 x 19 -> the central 16 x 16, ``n c h w``."""
    cropped = [pil_resized(image, 16, 19)[:, 2:18] for image in images]  # round(1.5) is 2
    return np.stack(cropped).transpose(0, 3, 1, 2)


def test_folder_with_splits(tmp_path: Path) -> None:
    train = write_images(tmp_path / "faces/train", 5)
    test = write_images(tmp_path / "faces/test/deeper", 3, seed=100)
    (tmp_path / "faces/train/notes.txt").write_text("no image")
    for split, written in (("train", train), ("test", test)):
        images = load_images(faces(tmp_path), split)  # type: ignore[arg-type]
        assert images.labels is None
        assert_within_one_level(pixels_of(images), expected_faces(written))


@pytest.mark.parametrize("below", ["", "train"])
def test_folder_without_both_splits_gives_every_tenth_to_testing(
    below: str, tmp_path: Path
) -> None:
    """Also with only one of the two folders: no image may be in both splits."""
    written = write_images(tmp_path / "faces" / below, 23)
    expected = expected_faces(written)
    tested = [9, 19]
    train, test = (pixels_of(load_images(faces(tmp_path), s)) for s in ("train", "test"))  # type: ignore[arg-type]
    assert_within_one_level(test, expected[tested])
    assert_within_one_level(train, np.delete(expected, tested, axis=0))


def test_folder_as_grey(tmp_path: Path) -> None:
    written = write_images(tmp_path / "faces", 3)
    ours = pixels_of(load_images(faces(tmp_path, colour=False), "train"))
    assert ours.shape == (3, 1, 16, 16)
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL and libpng
    grey = [np.round(image @ weights).astype(np.uint8) for image in written]
    expected = np.stack([pil_resized(image, 16, 19)[:, 2:18] for image in grey])
    assert np.abs(ours[:, 0].numpy().astype(int) - expected.astype(int)).max() <= 2


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp", ".bmp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_folder_formats(suffix: str, mode: str, tmp_path: Path) -> None:
    if mode == "P" and suffix != ".PNG":
        return  # only PNG has palettes
    image = Image.fromarray(random_pixels(4, 4, 3)).resize((16, 16)).convert(mode)
    folder = tmp_path / "faces"
    folder.mkdir()
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}
    image.save(folder / f"a{suffix}", **options.get(suffix, {}))
    ours = pixels_of(load_images(faces(tmp_path), "train"))[0].permute(1, 2, 0).numpy()
    difference = ours.astype(int) - np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= (8 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_an_unreadable_image_is_named(content: bytes | None, tmp_path: Path) -> None:
    write_images(tmp_path / "faces", 3)
    bad = tmp_path / "faces" / "001.png"
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=f"cannot read the image {bad}"):
        load_images(faces(tmp_path), "train")


def test_an_image_of_16_bits_is_named(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    path = tmp_path / "faces" / "deep.png"
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256).save(path)
    with pytest.raises(ValueError, match=f"cannot read the image {path}: .* more than 8 bits"):
        load_images(faces(tmp_path), "train")


def test_missing_folders_and_empty_ones_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no folder of images at {tmp_path / 'faces'}"):
        load_images(faces(tmp_path), "train")
    (tmp_path / "faces").mkdir()
    with pytest.raises(ValueError, match=r"no images \(\.jpg, .*\) of split 'train' in"):
        load_images(faces(tmp_path), "train")
    write_images(tmp_path / "faces", 9)
    with pytest.raises(ValueError, match="of split 'test' in"):
        load_images(faces(tmp_path), "test")


def test_large_folders_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "faces", 4)
    resident = load_images(faces(tmp_path), "train")
    monkeypatch.setattr(data, "RESIDENT_BYTES", 4 * 3 * 16 * 16 - 1)
    on_disk = load_images(faces(tmp_path), "train")
    assert isinstance(on_disk, FolderImages)
    assert len(on_disk) == len(resident) == 4
    indices = torch.tensor([3, 0, 3])
    assert torch.equal(on_disk.take(indices), resident.take(indices))
    before = on_disk.checksum
    assert load_images(faces(tmp_path), "train").checksum == before
    write_images(tmp_path / "faces", 5)
    assert load_images(faces(tmp_path), "train").checksum != before
