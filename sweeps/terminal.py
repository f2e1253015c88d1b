"""Schedules of equal strength: what a blur leaves of the images at T, and solving for it.

Whatever blurs less is restored better, so schedules are compared at an equal *terminal residual*:
the RMS around each image's mean that is left at T. It is measured on the data set's own training
images. A formula without data (a stationary 1/f² prior) was tried: it agrees with digits to 0.3 %
between circular schedules, but is wrong by a factor of 7 between circular and reflecting borders,
because digits are centred and the slowest reflecting mode is half a wave across the image.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from colddiff.config import DataConfig, DegradationConfig, RunConfig

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 0.01
"""A schedule may leave so much more of the images than the base's, relatively, and no more."""
SAME_INFORMATION = 0.005
"""Linear estimates whose RMSE differ by no more than this, relatively, know the same."""
IMAGES = 256
"""The first so many training images are measured."""
DIGITS = 6
"""Solved strengths are rounded to so many digits: the same run id on every machine."""

Family = Literal["constant", "linear", "exponential", "incremental", "individual", "shape"]
Padding = Literal["circular", "reflect"]


@dataclass(frozen=True)
class Outline:
    """A blur schedule but for its strength."""

    schedule: Family
    T: int
    kernel_size: int
    padding: Padding
    slope: float = 1.0
    """Of shape its exponent; of linear and exponential the last deviation over the first."""

    def at(self, strength: float, base: DegradationConfig) -> DegradationConfig:
        """The schedule with that total variance (shape) or deviation of the first step."""
        strength, last = rounded(strength), max(1, self.T - 1)
        new: dict[str, Any] = {"schedule": self.schedule, "T": self.T, "padding": self.padding}
        if self.schedule != "individual":  # which has no parameter but T
            new["kernel_size"] = self.kernel_size
        match self.schedule:
            case "shape":
                new |= {"exponent": self.slope, "total_variance": strength}
            case "linear":
                growth = rounded(strength * (self.slope - 1) / last)
                new |= {"sigma": strength, "growth": growth}
            case "exponential":
                new |= {"sigma": strength, "growth": rounded(math.log(self.slope) / last)}
            case "constant" | "incremental":
                new["sigma"] = strength
        return dataclasses.replace(base, **new)

    @property
    def strengths(self) -> Callable[[float], float]:
        """From [0, 1] to strengths: from almost no blur to flat kernels."""
        if self.schedule != "shape":
            widest = self.T if self.schedule == "incremental" else max(1.0, self.slope)
            least = 0.1 / widest  # no step blurs then
            return lambda x: float(least * (1000 / least) ** x)
        levels = [(t / self.T) ** self.slope for t in range(self.T + 1)]
        share = max(b - a for a, b in itertools.pairwise(levels))
        most = (self.kernel_size**2 - 1) / 12 / share * (1 - 1e-4)
        return lambda x: float(most * max(x, 1e-6))


def rounded(value: float) -> float:
    """To :data:`DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def widest_kernel(padding: Padding, size: int) -> int:
    """The widest odd kernel, up to 255 taps, under which wider still means more blur.

    A flat kernel as wide as the longest wave that the border allows removes that wave; a wider one
    turns it round and lets part of it through.
    """
    wave = size if padding == "circular" else 2 * (size - 1)
    return min(255, wave - 1 - wave % 2)


@functools.lru_cache(maxsize=4096)
def terminal_residual(blur: DegradationConfig, data: DataConfig) -> float:
    """RMS around each image's mean that the blur leaves at T, in units of the [0, 1] range.

    Raises:
        ValueError: for a noise degradation, and where the data are absent.
    """
    import torch

    from colddiff.degradation import blur_matrix, taps_of_step

    if blur.kind != "blur":
        raise ValueError(f"degradation.kind = {blur.kind!r} leaves no residual: it must be 'blur'")
    size = data.image_size
    first = blur.T - 1 if blur.schedule == "individual" else 0
    matrix = torch.eye(size, dtype=torch.float64)
    for i in range(first, blur.T):
        matrix = blur_matrix(size, taps_of_step(blur, i), blur.padding) @ matrix
    xT = matrix @ _images(data) @ matrix.mT
    return float((xT - xT.mean(dim=(-2, -1), keepdim=True)).square().mean().sqrt())


@functools.lru_cache(maxsize=4096)
def linear_rmse(blur: DegradationConfig, data: DataConfig) -> float:
    """RMSE in the [0, 1] range of the linear (Wiener) estimate of x0 from x_T in float32.

    Equal residuals need not tell equally much: kernels that are nearly flat leave traces of fine
    detail, far below the residual's RMS and still above float32's rounding, that more steps would
    have removed. The lower this is, the more of the images is left.

    Raises:
        ValueError: as :func:`terminal_residual`.
    """
    import torch

    from colddiff.degradation import build_degradation, cumulative_matrices
    from colddiff.metrics import rmse
    from colddiff.restorer import WienerEstimate, rounding_floor

    if blur.kind != "blur":
        raise ValueError(f"degradation.kind = {blur.kind!r} has no linear estimate")
    x0 = (2 * _images(data) - 1).float()
    degradation = build_degradation(blur, data.image_size)
    xT = degradation(x0, torch.full((len(x0),), blur.T))
    last = cumulative_matrices(blur, data.image_size)[-1:]
    estimate = WienerEstimate(last, rounding_floor(blur))
    return rmse(estimate(xT, torch.zeros(len(x0), dtype=torch.int64)), x0)


def leaves_more_by(config: RunConfig, base: RunConfig) -> float:
    """How much better a linear estimate from x_T is than from the base's: above 0 it is better.

    In RMSE, beyond :data:`SAME_INFORMATION`.
    """
    own, allowed = (linear_rmse(c.degradation, base.data) for c in (config, base))
    return allowed * (1 - SAME_INFORMATION) - own


def require_equal_terminal(config: RunConfig, base: RunConfig) -> None:
    """Refuse a schedule that blurs less than the base's, however well it restores.

    Raises:
        ValueError: where it leaves more than (1 + :data:`TOLERANCE`) times as much at T.
    """
    left, allowed = (terminal_residual(c.degradation, base.data) for c in (config, base))
    if not left <= allowed * (1 + TOLERANCE):
        raise ValueError(
            f"the schedule leaves an RMS of {left:.4g} of the images at T, the base's {allowed:.4g}"
            ": blurring less is no way to restore better, so it is not allowed here"
        )


def equalised(asked: Outline, base: RunConfig) -> tuple[DegradationConfig, Outline]:
    """The schedule as strong as the base's, and its outline.

    What was asked for may be unable to blur that much. Then the kernel is widened to the narrowest
    that can; if none can, the steps are made more even; if that does not do, T is raised.

    Raises:
        ValueError: where the base itself leaves nothing to compare.
    """
    target = terminal_residual(base.degradation, base.data)
    if target < 1e-12:
        raise ValueError(
            f"the base's schedule leaves an RMS of {target:.2g} of the images at T, which is "
            "nothing in double precision: there is no schedule of equal strength to look for"
        )
    outline = _able(asked, base, target)
    strength = outline.strengths(_root(_excess(outline, base, target)))
    return outline.at(strength, base.degradation), outline


def individual_steps(base: RunConfig) -> int | None:
    """The T from which the individual family blurs as much as the base, None where none does.

    It has no parameter but T, so it cannot be made equal: it is the first that is not weaker.
    """
    target = terminal_residual(base.degradation, base.data)
    padding = base.degradation.padding
    for T in range(1, 129 if padding == "circular" else base.data.image_size + 1):
        blur = Outline("individual", T, 1, padding).at(1.0, base.degradation)
        if terminal_residual(blur, base.data) <= target:
            return T
    return None


@functools.lru_cache(maxsize=4)
def _images(data: DataConfig) -> Tensor:
    """Float64 ``b c h w`` in [0, 1]."""
    import torch

    from colddiff.batches import to_batch
    from colddiff.data import load_images

    images = load_images(data, "train")
    pixels = images.take(torch.arange(min(IMAGES, len(images))))
    return (to_batch(pixels, data).double() + 1) / 2


def _excess(outline: Outline, base: RunConfig, target: float) -> Callable[[float], float]:
    """How much more than the target is left, log, by the position among the strengths."""

    def excess(x: float) -> float:
        blur = outline.at(outline.strengths(x), base.degradation)
        return math.log(max(terminal_residual(blur, base.data), 1e-300) / target)

    return excess


def _able(asked: Outline, base: RunConfig, target: float) -> Outline:
    """The nearest outline that can blur down to the target."""

    def able(outline: Outline) -> bool:
        return _excess(outline, base, target)(1.0) <= 0

    widest = widest_kernel(asked.padding, base.data.image_size)
    kernels = range(min(asked.kernel_size, widest), widest + 1, 2)
    wider = [dataclasses.replace(asked, kernel_size=kernel) for kernel in kernels]
    place = bisect.bisect_left(wider, True, key=able)
    if place < len(wider):
        return wider[place]
    slopes = (asked.slope**0.5, asked.slope**0.25, 1.0)
    more_even = (dataclasses.replace(wider[-1], slope=slope) for slope in slopes)
    more_steps = (
        dataclasses.replace(wider[-1], slope=1.0, T=T) for T in itertools.count(asked.T + 1)
    )
    return next(outline for outline in itertools.chain(more_even, more_steps) if able(outline))


def _root(excess: Callable[[float], float]) -> float:
    """Where a falling function crosses zero within [0, 1], by false position (Illinois)."""
    low, high = 0.0, 1.0
    above, below = excess(low), excess(high)
    if above <= 0:  # the base does not blur at all
        return low
    middle = high
    for _ in range(100):
        middle = (low * below - high * above) / (below - above)
        value = excess(middle)
        if abs(value) < 1e-5:
            break
        if value > 0:
            low, above, below = middle, value, below / 2
        else:
            high, below, above = middle, value, above / 2
    return middle
