"""Train the digit classifier that FID(digits) and the collapse study use.

    python jobs/train_classifier.py --data-root DIR --seed 0 --out colddiff/assets

Takes a few minutes on two CPU cores. Every hyperparameter is fixed beforehand; the 10,000 test
digits are looked at once, after the last step.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from colddiff.files import write_atomic, write_json
from colddiff.machine import git_dirty, git_sha, processor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from colddiff.classifier import DigitClassifier
    from colddiff.data import Split

# torch and torchvision are imported where they are used, so that --help answers at once.

logger = logging.getLogger("train_classifier")

PEAK_RATE = 4e-3
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
REQUIRED_ACCURACY = 0.993
# Of the batches, this share is blurred, by a Gaussian of up to this std in pixels: restorations are
# a little soft, and their features should still tell the digit.
BLURRED_SHARE = 0.25
LARGEST_BLUR = 1.0
PACKAGE_ASSETS = Path(__file__).resolve().parents[1] / "colddiff" / "assets"


@dataclass(frozen=True)
class Options:
    """Train the digit classifier on the 60,000 MNIST training digits and save it."""

    data_root: Path
    """Folder that holds MNIST/raw/train-images-idx3-ubyte and so on (torchvision's layout)."""
    seed: int = 0
    """Seed of the initial weights, the order of the digits and the augmentation."""
    epochs: int = 16
    """Passes over the training digits, at least 1."""
    batch: int = 256
    """Digits in one step, 2 to 60,000."""
    out: Path = PACKAGE_ASSETS
    """Folder that receives digit_classifier.safetensors and digit_classifier.json."""
    threads: int = 2
    """CPU threads, at least 1."""
    download: bool = False
    """Fetch MNIST into data_root when it is not there."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` naming the bad value."""
        for name, low, high in (
            ("epochs", 1, 1000),
            ("batch", 2, 60_000),
            ("threads", 1, 1024),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--{name} must be from {low} to {high}, got {value}")


@dataclass(frozen=True)
class Digits:
    """One split of MNIST: uint8 images b 1 32 32 and int64 labels b."""

    images: Tensor
    labels: Tensor


def load_digits(root: Path, split: Split, *, download: bool = False) -> Digits:
    """MNIST in the project's default preparation: 28 -> 32, bilinear and antialiased.

    Raises ``ValueError`` when the files are not there.
    """
    import torch

    from colddiff.config import DataConfig
    from colddiff.data import load_images

    data = load_images(DataConfig(name="mnist", root=str(root)), split, download=download)
    assert data.labels is not None, "MNIST has labels"
    return Digits(data.take(torch.arange(len(data))), data.labels)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn, scale and sometimes blur each digit of b 1 32 32 in [-1, 1] a little.

    Shifts are up to 2 pixels, angles up to 10 degrees, scales 0.9 to 1.1, drawn per image.
    """
    import torch
    import torch.nn.functional as F
    from torchvision.transforms.v2.functional import gaussian_blur

    turn, scale, right, down = 2 * torch.rand(4, len(x), generator=generator) - 1
    angle, scale = turn * 0.1745, 1 + 0.1 * scale
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    shift = 4 / x.shape[-1]
    rows = [cosine, -sine, shift * right, sine, cosine, shift * down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    share, strength = torch.rand(2, generator=generator).tolist()
    if share < BLURRED_SHARE:
        x = gaussian_blur(x, [7, 7], [0.05 + (LARGEST_BLUR - 0.05) * strength])
    return x


def batches(
    digits: Digits, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches in random order; the incomplete last batch is left out."""
    import torch

    order = torch.randperm(len(digits.labels), generator=generator)
    for chosen in torch.split(order, size):
        if len(chosen) == size:
            x = digits.images[chosen].float().div(127.5).sub(1)
            yield augment(x, generator), digits.labels[chosen]


def train(digits: Digits, options: Options) -> DigitClassifier:
    """Train a fresh classifier: AdamW, one cycle of the learning rate, bfloat16 autocast."""
    import torch
    import torch.nn.functional as F

    from colddiff.classifier import DigitClassifier

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = DigitClassifier().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps = options.epochs * (len(digits.labels) // options.batch)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, steps, pct_start=0.2)
    for epoch in range(1, options.epochs + 1):
        began, total, count = time.perf_counter(), torch.zeros(()), 0
        for x, label in batches(digits, options.batch, generator):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss: Any = F.cross_entropy(logits.float(), label, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            cycle.step()
            total, count = total + loss.detach(), count + 1
        seconds = time.perf_counter() - began
        logger.info(
            "epoch %d/%d: loss %.4f, %.0f s", epoch, options.epochs, total.item() / count, seconds
        )
    return model


def accuracy(model: DigitClassifier, digits: Digits) -> float:
    """Share of digits classified rightly, in float32 and without augmentation."""
    import torch

    right = 0
    with torch.inference_mode():
        parts = torch.split(digits.images, 500), torch.split(digits.labels, 500)
        for images, label in zip(*parts, strict=True):
            x = images.float().div(127.5).sub(1)
            right += int((model(x).argmax(1) == label).sum())
    return right / len(digits.labels)


def save(model: DigitClassifier, out: Path) -> bytes:
    """Write the weights atomically and return the bytes written."""
    from safetensors.torch import save as to_bytes

    from colddiff.classifier import WEIGHTS_NAME

    content = to_bytes({name: value.contiguous() for name, value in model.state_dict().items()})
    write_atomic(out / WEIGHTS_NAME, content)
    return content


def provenance(options: Options, score: float, seconds: float, weights: bytes) -> dict[str, Any]:
    """What the JSON file beside the weights says."""
    import torch
    import torchvision

    raw = options.data_root / "MNIST" / "raw"
    return {
        "command": (
            f"python jobs/train_classifier.py --data-root DIR --seed {options.seed} "
            f"--epochs {options.epochs} --batch {options.batch} --threads {options.threads}"
        ),
        "seed": options.seed,
        "epochs": options.epochs,
        "batch": options.batch,
        "recipe": {
            "optimiser": "AdamW",
            "schedule": "one cycle",
            "peak_rate": PEAK_RATE,
            "weight_decay": WEIGHT_DECAY,
            "label_smoothing": LABEL_SMOOTHING,
            "blurred_share": BLURRED_SHARE,
            "largest_blur_pixels": LARGEST_BLUR,
        },
        "data": "MNIST, 28 -> 32 bilinear antialiased; 60,000 for training, 10,000 for testing",
        "data_sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(raw.glob("*-ubyte"))
        },
        "test_accuracy": score,
        "training_seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "git_sha": git_sha(),
        "git_dirty": git_dirty(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def run(options: Options) -> float:
    """Train, save weights and provenance, and return the test accuracy of the saved file."""
    import torch

    from colddiff.classifier import PROVENANCE_NAME, WEIGHTS_NAME, load_digit_classifier

    torch.set_num_threads(options.threads)
    digits = load_digits(options.data_root, "train", download=options.download)
    test = load_digits(options.data_root, "test")
    began = time.perf_counter()
    model = train(digits, options)
    seconds = time.perf_counter() - began
    weights = save(model, options.out)
    score = accuracy(load_digit_classifier(weights=options.out / WEIGHTS_NAME), test)
    write_json(options.out / PROVENANCE_NAME, provenance(options, score, seconds, weights))
    logger.info("test accuracy %.4f, %d bytes in %s", score, len(weights), options.out)
    if score < REQUIRED_ACCURACY:
        logger.warning("the test accuracy is below the %.1f %% aimed at", 100 * REQUIRED_ACCURACY)
    return score


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(tyro.cli(Options, args=arguments, description=__doc__))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
