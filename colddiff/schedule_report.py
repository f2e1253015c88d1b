"""What a blur schedule leaves of a data set's images: recorded with every run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from colddiff.batches import to_batch
from colddiff.config import DegradationConfig, RunConfig
from colddiff.data import Images
from colddiff.degradation import cumulative_matrices
from colddiff.files import write_json
from colddiff.run_folder import RunFolder

log = logging.getLogger(__name__)
IMAGES = 64


def record_schedule(folder: RunFolder, config: RunConfig, images: Images) -> None:
    """Write ``schedule.json``, and warn where float32 cannot hold what is left at T."""
    if config.degradation.kind == "noise":
        return
    pixels = images.take(torch.arange(min(IMAGES, len(images)))).cpu()
    rows = describe_schedule(config.degradation, to_batch(pixels, config.data))
    write_json(folder.schedule, rows)
    if not rows[-1]["above_float32"]:
        log.warning(
            "at T = %d the blur leaves an RMS of %.1e of the range, below float32's rounding: "
            "x_T is the image's mean and no more",
            config.degradation.T,
            rows[-1]["residual_rms"],
        )


def describe_schedule(config: DegradationConfig, x0: Tensor) -> list[dict[str, Any]]:
    """What is left of images ``x0`` (``b c h w`` in [-1, 1]) at each level of a blur schedule.

    For t = 0..T: ``residual_rms``, the RMS around each image's own mean in units of the [0, 1]
    range, computed in float64; and for float32, bfloat16 and 8-bit storage whether that residual
    stands above the format's rounding step at mid-range (the information floor, docs/decisions.md).

    Raises:
        ValueError: for a noise degradation, which has no residual.
    """
    if config.kind != "blur":
        raise ValueError(f"degradation.kind = {config.kind!r} has no blur schedule to describe")
    left, right = (cumulative_matrices(config, size) for size in x0.shape[-2:])
    x = (x0.double() + 1) / 2
    steps = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "8 bits": 1 / 255}
    rows = []
    for t in range(config.T + 1):
        xt = left[t] @ x @ right[t].mT
        rms = (xt - xt.mean(dim=(-2, -1), keepdim=True)).square().mean().sqrt().item()
        rows.append(
            {"t": t, "residual_rms": rms}
            | {f"above_{name}": rms > step for name, step in steps.items()}
        )
    return rows
