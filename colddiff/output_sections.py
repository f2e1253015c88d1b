"""The sections of the configuration that say what is made of a trained run.

Fields are documented as in :mod:`colddiff.sections`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from colddiff.levels import check_levels, parse_levels
from colddiff.schema import Checked, elsewhere
from colddiff.sections import DegradationConfig, TrainingConfig


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What is measured on a trained run. No field is part of the run id."""

    SECTION = "evaluation"

    split: Literal["test", "train"] = elsewhere("test")
    """The images to restore."""
    samples: int = elsewhere(0)
    """The first so many of them; 0 for all."""
    batch_size: int = elsewhere(250)
    """Images restored at once."""
    levels: tuple[str, ...] = elsewhere(())
    """Further lists of levels for Algorithm 2, each like 20-10-0, beside T-...-1-0."""
    by_level: int = elsewhere(0)
    """So many images are also restored directly from D(x0, t) for every t."""
    images: int = elsewhere(100)
    """The first so many restorations are kept as images."""
    inception_weights: str = elsewhere("")
    """File of the Inception weights for FID; empty looks in COLDDIFF_INCEPTION_WEIGHTS and torch's
    hub cache, and leaves the column empty where there is none."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(self.samples == 0 or self.samples >= 2, "samples", "0 (all) or at least 2")
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(self.images >= 0, "images", "at least 0")
        self.require(self.by_level >= 0, "by_level", "at least 0")
        for text in self.levels:
            parse_levels(text)

    @property
    def level_lists(self) -> tuple[tuple[int, ...], ...]:
        """The parsed :attr:`levels`."""
        return tuple(parse_levels(text) for text in self.levels)


@dataclass(frozen=True)
class GenerationConfig(Checked):
    """How images are generated from a trained run."""

    SECTION = "generation"

    n: int = 100
    """Images, 1..1000000."""
    start: Literal["means", "terminals", "real"] = "means"
    """means: constant images, their channel means drawn from a Gaussian mixture fitted to the
    training images. terminals: x_T drawn from a mixture fitted to all that is left of the training
    images in theirs. real: x_T of training images. (Noise degradations start from noise.)"""
    components: int = 1
    """Of the mixture, 1..1000."""
    symmetry_noise: float = 0.002
    """Deviation of the Gaussian noise added to the start, in units of the [-1, 1] range."""
    algorithm: Literal["algorithm1", "algorithm2", "ddim", "ddpm"] = "algorithm2"
    """The sampler: the paper's two; for noise degradations also with estimated noise (ddim) and
    with fresh noise at each step (ddpm)."""
    levels: str = ""
    """Levels to visit, like 20-10-0; empty for all."""
    seed: int = 0
    """Of start and noise."""
    batch_size: int = 250
    """Images generated at once."""
    weights: Literal["average", "raw"] = "average"
    """The averaged weights, or those of the last step, which training.keep_every keeps."""
    step: int = 0
    """Of training, a multiple of training.keep_every; 0 for the end."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(1 <= self.n <= 1_000_000, "n", "in 1..1000000")
        self.require(1 <= self.components <= 1000, "components", "in 1..1000")
        self.require(self.symmetry_noise >= 0, "symmetry_noise", "at least 0")
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(0 <= self.seed < 2**31, "seed", "in 0..2147483647")
        self.require(self.step >= 0, "step", "at least 0")
        if self.levels:
            parse_levels(self.levels)

    def check_for(self, degradation: DegradationConfig, training: TrainingConfig) -> None:
        """Raise ``ValueError`` for a sampler, levels or weights that such a run does not have."""
        self.require(
            degradation.kind == "noise" or self.algorithm not in ("ddim", "ddpm"),
            "algorithm",
            f"algorithm1 or algorithm2 for degradation.kind = {degradation.kind}",
        )
        if self.levels:
            check_levels(parse_levels(self.levels), degradation.T)
        every = training.keep_every
        self.require(
            self.weights == "average" or every > 0, "weights", "average for training.keep_every = 0"
        )
        kept = every > 0 and self.step % every == 0 and self.step < training.steps
        among = f"or a multiple of training.keep_every below {training.steps}" if every else ""
        self.require(self.step == 0 or kept, "step", f"0 {among}".strip())

    @property
    def slug(self) -> str:
        """A file name that tells these settings apart."""
        start = "real" if self.start == "real" else f"{self.start}{self.components}"
        levels = f"-{self.levels.replace('-', '_')}" if self.levels else ""
        if len(levels) > 80:  # file names end at 255 bytes
            levels = f"-levels{hashlib.sha256(levels.encode()).hexdigest()[:8]}"
        weights = "-raw" if self.weights == "raw" else ""
        step = f"-step{self.step}" if self.step else ""
        return (
            f"generated-{start}-noise{self.symmetry_noise}-{self.algorithm}{levels}{weights}{step}"
            f"-seed{self.seed}-n{self.n}"
        )
