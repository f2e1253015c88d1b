"""The figures of the mode-collapse study."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.collapse_table import MEASURES
from analysis.pictures import BLACK, COLORS, GREY, WIDTH, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from analysis.effects import Effect

CLASSES = 10
SHOWN = 12
"""Images of a set in the figure, the first of them."""


def draw_before_and_after(
    sets: Mapping[str, tuple[pd.DataFrame, NDArray[np.uint8] | None]], shares: Sequence[float]
) -> Figure:
    """Top: images of each set; bottom: the share of each class, with 95 % intervals.

    Args:
        sets: by name: the rows (one a seed) and images ``n h w`` of a set, None where they are no
            longer to be had.
        shares: of the classes in the data.
    """
    shown = {name: images for name, (_, images) in sets.items() if images is not None}
    lines = max(len(shown), 1)
    figure = new_figure(WIDTH, 1.0 + 0.45 * lines + 2.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.5 + 0.45 * lines, 2.2))
    grid = parts[0].subplots(lines, 1, squeeze=False)[: len(shown), 0]
    for axes, (name, images) in zip(grid, shown.items(), strict=True):
        axes.imshow(
            np.concatenate(list(images[:SHOWN]), axis=1), cmap="gray", vmin=0, vmax=255,
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(name, fontsize=8, loc="left", pad=2)
        axes.set_axis_off()
    axes, width = parts[1].add_subplot(), 0.8 / len(sets)
    axes.plot([], [], color=BLACK, label="MNIST")
    for digit, share in enumerate(shares):
        axes.hlines(share, digit - 0.45, digit + 0.45, color=BLACK, linewidth=1.2, zorder=3)
    for i, (name, (rows, _)) in enumerate(sets.items()):
        place = np.arange(CLASSES) + (i - (len(sets) - 1) / 2) * width
        counts = np.sum([quality["counts"] for quality in rows["quality"]], axis=0)
        share = counts / counts.sum()
        low, high = wilson(counts)
        errors = np.stack([share - low, high - share]).clip(min=0)
        axes.bar(
            place, share, width, yerr=errors, color=COLORS[i], label=name, error_kw={"lw": 0.8}
        )
    axes.set(xlabel="class, as classified", ylabel="share of images", xticks=range(CLASSES))
    parts[1].legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def wilson(counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """95 % Wilson intervals of shares, from counts."""
    from scipy.stats import binomtest

    n = int(counts.sum())
    found = [binomtest(int(k), n).proportion_ci(method="wilson") for k in counts]
    return np.array([each.low for each in found]), np.array([each.high for each in found])


def draw_effects(effects: Mapping[str, Sequence[Effect]]) -> Figure:
    """Main effects with their intervals; a panel a measure, the same order of rows in all."""
    first = next(iter(effects.values()))
    names = [label(effect) for effect in first]
    figure = new_figure(WIDTH, 0.8 + 0.24 * len(names))
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for axes, (measure, found) in zip(panels, effects.items(), strict=True):
        axes.axvline(0, color=GREY, linewidth=0.8)
        for place, effect in enumerate(found):
            color = COLORS[1] if effect.is_clear else GREY
            axes.plot([effect.low, effect.high], [place, place], color=color, linewidth=1.5)
            axes.plot(effect.size, place, "o", color=color, markersize=4)
        axes.set_title(MEASURES[measure].replace(" (data: 1)", ""), fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_yticks(range(len(names)), names)
    figure.supxlabel("difference from the reference level", fontsize=9)
    return figure


def label(effect: Effect) -> str:
    """``start: real``; of an interaction ``flip: yes x start: real``."""
    pairs = zip(effect.factors, effect.levels, strict=True)
    return " x ".join(f"{factor}: {level}" for factor, level in pairs)


def draw_curves(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """How measures change in training; a panel a measure, a line a condition, a dot a network."""
    measures = ("zero_ratio", "unreadable_rate", "tv_distance", "fid_digits")
    figure = new_figure(WIDTH, 2.6)
    panels = figure.subplots(1, len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        for color, (name, rows) in zip(COLORS, curves.items(), strict=False):
            means = rows.groupby("at")[measure].mean()
            axes.plot(means.index, means.to_numpy(), color=color, label=name)
            axes.plot(rows["at"], rows[measure], "o", color=color, markersize=2.5)
        axes.set_title(MEASURES[measure].replace(" (data: 1)", ""), fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("steps")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8
    )
    return figure


def draw_intensity(
    data: NDArray[Any], tables: Mapping[str, NDArray[Any]], edges: Sequence[float]
) -> Figure:
    """The share of zeros and of other digits against the intensity of the start.

    Args:
        data: shares of classes in the training images, bins x classes.
        tables: the same of generated sets, by name.
        edges: of the bins, mean intensity in [0, 1].
    """
    figure = new_figure(WIDTH, 2.4)
    every = {"MNIST": data, **tables}
    panels = figure.subplots(1, len(every), sharey=True)
    for axes, (name, shares) in zip(panels, every.items(), strict=True):
        picture = axes.imshow(
            np.asarray(shares).T, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower"
        )
        axes.set_title(textwrap.fill(name, 72 // len(every)), fontsize=7)
        axes.set_xticks([-0.5, len(edges) - 1.5], [f"{edges[0]:.2f}", f"{edges[-1]:.2f}"])
        for text, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            text.set(ha=side, fontsize=7)
        axes.set_yticks(range(CLASSES))
        axes.grid(visible=False)
    panels[0].set_ylabel("class")
    figure.supxlabel("mean intensity of the start, in bins of a tenth of MNIST each", fontsize=9)
    figure.colorbar(picture, ax=list(panels), label="share", shrink=0.9)
    return figure
