"""The way of Algorithm 2 from x_T to x_0 for a few test images: x_t and x0_hat at each level."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colddiff.degradation import Degradation
from colddiff.diffusion import Restorer, Step, sample_algorithm2
from colddiff.files import write_atomic
from colddiff.images import to_uint8
from colddiff.run_folder import RunFolder

TRAJECTORY = "trajectory.npz"
IMAGES = 10
ROUNDING = 1e-6
LARGEST = 60
"""So many levels are kept at most, spread evenly, the first and the last among them."""


def chosen_images(labels: Tensor | None, count: int) -> Tensor:
    """Indices of the first image of each class, or of the first ten images; among ``count``."""
    if labels is None:
        return torch.arange(min(IMAGES, count))
    first = [int((labels[:count] == label).nonzero()[0]) for label in labels[:count].unique()]
    return torch.tensor(sorted(first[:IMAGES], key=lambda i: int(labels[i])))


def record_trajectory(
    folder: RunFolder,
    restorer: Restorer,
    degradation: Degradation,
    x0: Tensor,
    index: Tensor,
    labels: Tensor | None = None,
) -> None:
    """Sample images ``x0`` (``n c h w``) over all levels; write ``samples/trajectory.npz``.

    It has uint8 ``xt``, ``stretched`` (x_t with the residual around each image's mean spread over
    the whole range) and ``x0_hat``, each ``levels n h w c``, ``original`` and ``restored``
    ``n h w c``, ``level``, ``index`` and, where the split has ``labels``, ``label``.
    """
    T = degradation.T
    kept = np.unique(np.linspace(1, T, min(T, LARGEST)).round().astype(int))[::-1]
    shown: dict[str, list[NDArray[np.uint8]]] = {"xt": [], "stretched": [], "x0_hat": []}

    def observe(step: Step) -> None:  # at once: 300 steps of large images are gigabytes
        if step.t in kept:
            shown["xt"].append(to_uint8(step.xt))
            shown["stretched"].append(to_uint8(stretched(step.xt)))
            shown["x0_hat"].append(to_uint8(step.x0_hat))

    restored = sample_algorithm2(restorer, degradation, degradation.terminal(x0), observe=observe)
    arrays: dict[str, NDArray[np.uint8] | NDArray[np.int64]] = {
        **{name: np.stack(images) for name, images in shown.items()},
        "original": to_uint8(x0),
        "restored": to_uint8(restored),
        "level": kept,
        "index": index.numpy(),
    }
    if labels is not None:
        arrays["label"] = labels[index].numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(folder.samples / TRAJECTORY, buffer.getvalue())


def stretched(xt: Tensor) -> Tensor:
    """Each image's residual around its mean, in [-1, 1] with the largest at an end.

    What is no more than float32's rounding stays faint.
    """
    residual = xt.double() - xt.double().mean(dim=(-2, -1), keepdim=True)
    largest = residual.abs().amax(dim=(-3, -2, -1), keepdim=True)
    return (residual / largest.clamp(min=ROUNDING)).float()
