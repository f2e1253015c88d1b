"""What a blur schedule leaves of a data set's images: recorded with every run."""

from __future__ import annotations

import logging

import torch

from colddiff.batches import to_batch
from colddiff.config import RunConfig
from colddiff.data import Images
from colddiff.degradation import describe_schedule
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
