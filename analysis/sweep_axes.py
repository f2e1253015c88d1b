"""What a study's figures share: scales of parameters, limits of values, marks and colours.

Colours are Okabe and Ito's and viridis, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.pictures import BLACK, GREY, ORANGE
from analysis.studies import Study, Trial, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import PathCollection
    from matplotlib.colors import Normalize

REFERENCE: dict[str, Any] = {"marker": "s", "color": BLACK, "markersize": 7, "zorder": 5}
BEST: dict[str, Any] = {"marker": "*", "color": ORANGE, "markersize": 14, "zorder": 6}
EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
FAR = 3.0
"""Values further from the best than so many times the best three quarters' range are cut off."""
MARGIN = 0.06
JITTER = 0.3
LETTERS = 18  # that fit side by side below a small panel


class Scale:
    """One parameter's axis: numbers, logarithms of numbers, or categories at 0, 1, 2 and so on."""

    def __init__(self, study: Study, name: str) -> None:
        there = study.parameters[name]
        used = [trial.used[name] for trial in study.measured]
        self.choices: list[Any] | None = there.get("choices")
        self.log = bool(there.get("log"))
        if self.choices is None:
            self.low, self.high = min(there["low"], *used), max(there["high"], *used)
        else:
            self.low, self.high = 0, len(self.choices) - 1

    def at(self, setting: Any) -> float:
        """Where a value lies on the axis."""
        return float(setting) if self.choices is None else float(self.choices.index(setting))

    def part(self, setting: Any) -> float:
        """The same from 0 to 1."""
        low, high, x = (
            math.log(v) if self.log else v for v in (self.low, self.high, self.at(setting))
        )
        return (x - low) / (high - low) if high > low else 0.5

    def spread(self, xs: Sequence[float]) -> list[float]:
        """Of categories: pulled apart a little, always in the same way."""
        if self.choices is None:
            return list(xs)
        return [x + JITTER * ((i * 0.618) % 1 - 0.5) for i, x in enumerate(xs)]

    def ticks(self) -> list[tuple[float, str]]:
        """Places on the axis and their labels."""
        if self.choices is not None:
            return [(float(i), str(choice)) for i, choice in enumerate(self.choices)]
        if self.log:
            found = _round_numbers(self.low, self.high)
        else:
            from matplotlib.ticker import MaxNLocator

            located = MaxNLocator(4).tick_values(self.low, self.high)
            found = [float(x) for x in located if self.low <= x <= self.high]
        return [(x, f"{x:g}") for x in found]

    def parts(self) -> list[tuple[float, str]]:
        """The ticks from 0 to 1."""
        if self.choices is not None:
            return [(self.part(choice), str(choice)) for choice in self.choices]
        return [(self.part(x), text) for x, text in self.ticks()]

    def draw(self, axis: Axis) -> None:
        """Make ``axis`` this one."""
        axes = axis.axes
        assert axes is not None, "it belongs to a figure"
        name = "x" if axis is axes.xaxis else "y"
        if self.log:
            axes.set(**{f"{name}scale": "log"})
        places, texts = zip(*self.ticks(), strict=True)
        crowded = name == "x" and sum(map(len, texts)) > LETTERS
        slanted: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_ticks(places, texts, **slanted)
        axis.set_ticks([], minor=True)
        margin = MARGIN if self.choices is None else 0.4
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        pad = margin * ((high - low) if self.choices is None else 1) or 0.5
        ends = [low - pad, high + pad]
        axes.set(**{f"{name}lim": [math.exp(x) for x in ends] if self.log else ends})


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; of wide ranges the powers alone."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 200 * low else (1,)
    found = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    within = [x for x in found if low * 0.999 <= x <= high * 1.001]
    return within if len(within) > 1 else [low, high]


def varying(study: Study) -> list[str]:
    """The parameters of which complete trials have several values, the most important first."""
    shares = next(iter(study.importances.values()), {})
    names = [
        name
        for name in study.parameters
        if len({str(trial.used.get(name)) for trial in study.measured}) > 1
        and all(name in trial.used for trial in study.measured)
    ]
    return sorted(names, key=lambda name: -shares.get(name, 0.0))


def plane_axes(study: Study) -> tuple[str, str] | None:
    """What a trial costs, and what shapes its schedule or list of levels; None unless both vary."""
    names = varying(study)
    cost = [name for name in ("T", "calls") if name in names]
    shape = [name for name in ("exponent", "ratio") if name in names]
    return (cost[0], shape[0]) if cost and shape else None


def limits(study: Study, index: int = 0) -> tuple[float, float]:
    """Ends of an axis of values: a few disasters must not squeeze all others into a line."""
    sign = study.objectives[index].sign
    costs = sorted(sign * value(trial, index) for trial in study.measured)
    best, worst = costs[0], costs[-1]
    usual = costs[(3 * len(costs) - 1) // 4] - best
    if usual > 0:
        worst = min(worst, best + FAR * usual)
    if study.reference:
        worst = max(worst, sign * value(study.reference, index))
    pad = MARGIN * (worst - best) or 0.05 * abs(best) or 1.0
    low, high = sorted((sign * (best - pad), sign * (worst + pad)))
    return low, high


def scatter(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], ends: tuple[float, float], **style: Any
) -> PathCollection:
    """Dots; those beyond the ends lie on the edge, as triangles that point outwards."""
    import numpy as np

    low, high = ends
    shown = np.clip(ys, low, high)
    colors = style.pop("c", None)
    dots = axes.scatter(
        xs, shown, c=colors, s=26, edgecolors="white", linewidths=0.5, zorder=3, **style
    )
    style.pop("label", None)
    for beyond, marker in ((np.array(ys) > high, "^"), (np.array(ys) < low, "v")):
        if beyond.any():
            axes.plot(
                np.array(xs)[beyond],
                shown[beyond],
                marker,
                color=GREY,
                markersize=7,
                clip_on=False,
                zorder=4,
            )
    return dots


def pierce(axes: Axes, trials: Sequence[Trial], xs: Sequence[float], ys: Sequence[float]) -> None:
    """A hole in the dots of those trials that leave more of the images than the reference."""
    holes = [(x, y) for trial, x, y in zip(trials, xs, ys, strict=True) if trial.leaves_more]
    if holes:
        axes.plot(*zip(*holes, strict=True), ".", color="white", markersize=3, zorder=4)


def marked(study: Study) -> list[tuple[Trial, dict[str, Any], str]]:
    """The trials that every figure shows, how, and what they are called."""
    best, reference = study.best, study.reference
    if reference is None:
        return [(best, BEST | EDGE, f"best (trial {best.number})")]
    if best.number == reference.number:
        return [(best, REFERENCE | EDGE, f"reference, and best (trial {best.number})")]
    return [
        (reference, REFERENCE | EDGE, f"reference (trial {reference.number})"),
        (best, BEST | EDGE, f"best (trial {best.number})"),
    ]


def colors_of(study: Study, index: int = 0) -> tuple[Normalize, str]:
    """How values become colours: the better, the darker."""
    from matplotlib.colors import Normalize

    low, high = limits(study, index)
    name = "viridis" if study.objectives[index].sign == 1 else "viridis_r"
    return Normalize(low, high, clip=True), name
