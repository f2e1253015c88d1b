"""The sections of a run's configuration that define what is trained, and how.

Every field is documented here, once, with its unit and range, and has its default here alone.
Fields marked :func:`~colddiff.schema.elsewhere` say where or how often something happens, not what
results, and are left out of the run id. Those marked :func:`~colddiff.schema.added` are newer than
the first runs, and part of it where they are not at their default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from colddiff.schema import Checked, added, elsewhere

Storage = Literal["float32", "bfloat16", "float16", "uint16", "uint8"]


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which images, and how they are prepared."""

    SECTION = "data"

    name: Literal["digits", "mnist", "fashion-mnist", "cifar10", "folder"] = "digits"
    """Data set: digits is embedded, mnist, fashion-mnist and cifar10 are torchvision's, folder is
    any folder of images."""
    root: str = elsewhere("data")
    """Where torchvision's data sets, or the folder of images, lie."""
    folder: str = ""
    """For name = folder: the images' folder below root. With train/ and test/ below it these are
    the splits; else every tenth image, by name, is a test image."""
    colour: bool = True
    """For name = folder: three channels, or one."""
    image_size: int = 32
    """Height and width in pixels, 11 (the window of SSIM) to 1024."""
    preparation: Literal["resize", "pad", "crop"] = "resize"
    """resize: bilinear, antialiased, shorter side to image_size and centre crop. pad: zeros around.
    crop: resize to 1.12 x image_size, then a crop, random in training and central in evaluation."""
    flip: bool = False
    """Random horizontal flips in training."""
    validation: int = 0
    """So many training images, a fixed choice, are kept back to validate on while training."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(11 <= self.image_size <= 1024, "image_size", "in 11..1024")
        self.require(self.validation >= 0, "validation", "at least 0")
        self.require(
            bool(self.folder) == (self.name == "folder"),
            "folder",
            "a folder's name for data.name = folder, and empty otherwise",
        )

    @property
    def channels(self) -> int:
        """Image channels, 1 or 3."""
        return 3 if self.name == "cifar10" or (self.name == "folder" and self.colour) else 1

    @property
    def has_digits(self) -> bool:
        """Whether the labels are handwritten digits, so that the digit classifier applies."""
        return self.name in ("digits", "mnist")


@dataclass(frozen=True)
class DegradationConfig(Checked):
    """D(x, t) for t in 0..T: a sequence of Gaussian blurs, or Gaussian noise (hot diffusion)."""

    SECTION = "degradation"

    kind: Literal["blur", "noise"] = "blur"
    """blur is the paper's; noise is the hot baseline."""
    T: int = 20
    """Number of degradation steps, 1..10000."""
    schedule: Literal["constant", "linear", "exponential", "incremental", "individual", "shape"] = (
        "constant"
    )
    """Standard deviation in pixels of the blur at the 0-based step i. constant: sigma. linear:
    sigma + growth i. exponential: sigma exp(growth i). incremental: sigma (i + 1). individual: one
    blur with 2i + 1 taps and deviation 2 (2i + 1), not composed. shape: cumulative variance
    total_variance (t / T)^exponent."""
    kernel_size: int = 11
    """Taps of each 1-D Gaussian, odd, 1..255 (individual ignores it)."""
    sigma: float = 7.0
    """Pixels, > 0."""
    growth: float = 0.0
    """Of linear (pixels a step) and exponential (1 / step)."""
    exponent: float = 1.0
    """Of shape: > 0; 1 spreads the variance evenly, more puts it at the end."""
    total_variance: float = 180.0
    """Of shape: blur variance at T in square pixels, > 0."""
    padding: Literal["circular", "reflect"] = "circular"
    """What lies beyond the border."""
    discrete: bool = False
    """The authors' "discrete": x_t rounded down to 8 bits in training, x_T the image's mean."""
    storage: Storage = added("float32")
    """The number format that x_t is rounded to, which decides what is left of it near x_T; uint16
    and uint8 divide [-1, 1] evenly."""
    noise_schedule: Literal["cosine", "linear"] = "cosine"
    """Of noise: cumulative signal power (arXiv:2102.09672, or arXiv:2006.11239 scaled to T)."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(1 <= self.T <= 10_000, "T", "in 1..10000")
        self.require(
            1 <= self.kernel_size <= 255 and self.kernel_size % 2 == 1, "kernel_size", "odd, 1..255"
        )
        self.require(self.sigma > 0, "sigma", "positive")
        self.require(self.exponent > 0, "exponent", "positive")
        self.require(self.total_variance > 0, "total_variance", "positive")
        self.require(
            not (self.discrete and self.kind == "noise"),
            "discrete",
            "false for degradation.kind = noise",
        )
        self.require(
            self.storage == "float32" or (self.kind == "blur" and not self.discrete),
            "storage",
            "float32 for degradation.kind = noise and for degradation.discrete",
        )
        if self.kind == "blur":
            self._check_schedule()

    def _check_schedule(self) -> None:
        last = max(self.sigma, self.sigma + self.growth * (self.T - 1))
        first = min(self.sigma, self.sigma + self.growth * (self.T - 1))
        if self.schedule == "linear":
            self.require(first > 0 and last < math.inf, "growth", "such that sigma + growth i > 0")
        if self.schedule == "exponential":
            self.require(
                abs(self.growth * (self.T - 1)) < 50, "growth", "such that |growth (T - 1)| < 50"
            )
        if self.schedule == "shape":
            widest = (self.kernel_size**2 - 1) / 12  # the variance of a flat kernel
            steps = [self.cumulative_variance(t) for t in range(self.T + 1)]
            largest = max(b - a for a, b in zip(steps[:-1], steps[1:], strict=True))
            self.require(
                largest < widest,
                "total_variance",
                f"such that no step exceeds the {widest:.4g} square pixels that kernel_size "
                f"{self.kernel_size} can carry (the largest is {largest:.4g}: widen the kernel or "
                "raise T)",
            )

    def cumulative_variance(self, t: int) -> float:
        """Of shape: v(t) = total_variance (t / T)^exponent, square pixels."""
        return float(self.total_variance * (t / self.T) ** self.exponent)

    @property
    def widest_kernel(self) -> int:
        """The number of taps of the widest kernel in use."""
        return 2 * self.T - 1 if self.schedule == "individual" else self.kernel_size


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The restorer R(x_t, t)."""

    SECTION = "model"

    name: Literal["convnext", "ddpm"] = added("convnext")
    """convnext: the authors' ConvNeXt U-Net of MNIST and CelebA. ddpm: the DDPM U-Net
    (arXiv:2006.11239), theirs of CIFAR-10."""
    dim: int = 64
    """Width of the first resolution; even, 4..1024, and for ddpm a multiple of 32."""
    mults: tuple[int, ...] = (1, 2, 4, 8)
    """Width multiplier of each resolution; each further one halves the image. 1..8 of them."""
    time_embedding: bool = True
    """Whether the network is told t; ddpm always is."""
    residual: bool = False
    """Whether the network predicts the difference to its first input (x_t or the estimate)."""
    patch: int = 1
    """The network works on patch x patch blocks of pixels folded into channels: 1 is the authors'
    network, 2 a quarter of the pixels and about a quarter of the time at the same widths."""
    conditioning: Literal["raw", "wiener"] = "raw"
    """What the network sees. raw: x_t, as the authors. wiener: the linear (Wiener) estimate of x0
    from x_t, and x_t, which lifts the faint residual to the images' own scale in float32."""
    bounded: bool = added(False)
    """Whether the network's estimates are clamped to [-1, 1]. In training they are not, but what
    lies beyond black or white where the image is black or white is no error."""
    dropout: float = added(0.0)
    """Of ddpm: share of each block's features that is zeroed in training, in [0, 1)."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(4 <= self.dim <= 1024 and self.dim % 2 == 0, "dim", "even, 4..1024")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        if self.name == "ddpm":
            self.require(self.dim % 32 == 0, "dim", "a multiple of 32 for model.name = ddpm")
            self.require(self.time_embedding, "time_embedding", "true for model.name = ddpm")
        else:
            self.require(
                self.dropout == 0, "dropout", "0 for model.name = convnext, which has none"
            )
        self.require(
            1 <= len(self.mults) <= 8 and all(1 <= m <= 64 for m in self.mults),
            "mults",
            "1..8 integers in 1..64",
        )
        self.require(self.patch in (1, 2, 4), "patch", "1, 2 or 4")

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        return self.patch << (len(self.mults) - 1)


@dataclass(frozen=True)
class OptimiserConfig(Checked):
    """How the weights are updated."""

    SECTION = "optimiser"

    name: Literal["adam", "adamw"] = "adam"
    """Betas are 0.9 and 0.999."""
    lr: float = 2e-5
    """Peak learning rate, > 0."""
    weight_decay: float = 0.0
    """>= 0; decoupled in adamw, an L2 penalty in adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine down to zero at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up, >= 0."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""

    def check(self) -> None:
        """Ranges; see the fields."""
        self.require(0 < self.lr < 10, "lr", "in (0, 10)")
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")
        self.require(self.warmup_steps >= 0, "warmup_steps", "at least 0")
        self.require(self.clip_norm >= 0, "clip_norm", "at least 0")


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """The training loop."""

    SECTION = "training"

    steps: int = 700_000
    """Optimiser steps, at least 1."""
    batch_size: int = 32
    """Images a micro-batch, at least 1. Several ranks share them equally: their number, which must
    divide this, changes the time a run takes and not what it computes."""
    accumulation: int = 2
    """Micro-batches an optimiser step, at least 1."""
    seed: int = 0
    """Of everything random, 0..2^31 - 1."""
    loss: Literal["l1", "l2"] = "l1"
    """Mean absolute or squared error to x0."""
    ema_decay: float = 0.995
    """Decay of the averaged weights at each update, in [0, 1)."""
    ema_every: int = 10
    """Steps between updates of the average."""
    ema_start: int = 2000
    """Before this step the average is a plain copy of the weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's inner operations; degradation, input and loss are always float32. bfloat16
    is meant where the device computes in it, and is float32 elsewhere (CUDA before 8.0, most
    CPUs)."""
    compile: bool = False
    """torch.compile the network."""
    own_states: float = added(0.0)
    """Share of each micro-batch, 0..1, that is restored not from D(x0, t) but from where a step of
    Algorithm 2 from a higher level arrives at t: sampling then meets inputs like these."""
    levels: Literal["all", "last"] = added("all")
    """t is uniform over 1..T, or always T, for a network that restores directly and no more."""
    device: Literal["auto", "cpu", "cuda"] = elsewhere("auto")
    """auto takes cuda where there is one."""
    log_every: int = elsewhere(50)
    """Steps between journal records."""
    validate_every: int = elsewhere(1000)
    """Steps between validations of the averaged weights on data.validation images; 0 for none."""
    checkpoint_every: int = elsewhere(1000)
    """Steps between checkpoints."""
    keep_every: int = elsewhere(0)
    """Steps between weights that are kept for good, averaged and raw, the last step's among them:
    to see how results change with training. 0 keeps the last step's averaged weights alone."""
    workers: int = elsewhere(2)
    """DataLoader processes, for data that is not kept in memory."""

    def check(self) -> None:
        """Ranges; see the fields."""
        for name in ("steps", "batch_size", "accumulation", "ema_every", "log_every"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("ema_start", "validate_every", "keep_every", "workers"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.checkpoint_every >= 1, "checkpoint_every", "at least 1")
        self.require(0 <= self.seed < 2**31, "seed", "in 0..2147483647")
        self.require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")
        self.require(0 <= self.own_states <= 1, "own_states", "in [0, 1]")
