"""A small digit classifier: its features carry FID(digits), its labels the collapse study.

The weights are shipped with the package and come from ``jobs/train_classifier.py``; the JSON file
beside them records how they were made and what they score.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
WEIGHTS_NAME = "digit_classifier.safetensors"
PROVENANCE_NAME = "digit_classifier.json"

IMAGE_SIZE = 32
FEATURES = 64
CLASSES = 10


class DigitClassifier(nn.Module):
    """A convolutional net of about 160,000 parameters for grey digits.

    The features are standardised by their statistics over the training set and taken before the
    last ReLU, so each has about unit variance and FID(digits) has a scale one can read.
    """

    def __init__(self) -> None:
        """Random weights; ``load_digit_classifier`` gives the trained net."""
        super().__init__()
        self.stem = nn.Sequential(
            *_block(1, 24), nn.MaxPool2d(2),
            *_block(24, 48), *_block(48, 48), nn.MaxPool2d(2),
            *_block(48, 64), *_block(64, 64), nn.MaxPool2d(2),
        )  # fmt: skip
        side = IMAGE_SIZE // 8
        self.project = nn.Linear(64 * side * side, FEATURES, bias=False)
        self.standardise = nn.BatchNorm1d(FEATURES, affine=False)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features, shape (b, 64), of images b 1 h w in [-1, 1].

        Sizes other than 32x32 are resized bilinearly with antialiasing. Raises ``ValueError`` on
        any other shape or an integer type.
        """
        if x.ndim != 4 or x.shape[1] != 1 or not x.is_floating_point():
            raise ValueError(
                f"the digit classifier takes floating-point images of shape (b, 1, h, w), got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = self.standardise(self.project(self.stem(x).flatten(1)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Class logits, shape (b, 10), of images b 1 h w in [-1, 1]."""
        logits: Tensor = self.head(F.relu(self.features(x)))
        return logits


def load_digit_classifier(
    device: torch.device | str = "cpu", weights: Path | None = None
) -> DigitClassifier:
    """Load the shipped net, or ``weights``, in eval mode and without gradients.

    Raises ``ValueError`` when the file is missing.
    """
    path = ASSETS / WEIGHTS_NAME if weights is None else weights
    if not path.is_file():
        raise ValueError(
            f"no digit classifier weights at {path}; make them with jobs/train_classifier.py"
        )
    model = DigitClassifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False).to(device)


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
