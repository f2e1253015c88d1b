"""The design by how a network was trained and how it sampled: means, and images of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.collapse_design import TRAINING
from analysis.collapse_page import EXPLAINED, shown
from analysis.collapse_table import MEASURES
from analysis.pictures import WIDTH, new_figure
from analysis.report import markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WAYS = (("2", "all"), ("2", "20-10-0"), ("1", "all"), ("1", "20-10-0"))
"""Algorithm and levels."""
PER_CELL = 4
Cell = tuple[str, str]
"""A training and a way to sample, as the page names them."""


def cells(designed: pd.DataFrame) -> dict[Cell, pd.DataFrame]:
    """The sets of each training and way that have any, in the design's order, first seed first."""
    found = {}
    trainings = itertools.product(*(levels for levels in TRAINING.values()))
    for levels, (algorithm, visited) in itertools.product(trainings, WAYS):
        rows = designed[(designed["algorithm"] == algorithm) & (designed["levels"] == visited)]
        for factor, level in zip(TRAINING, levels, strict=True):
            rows = rows[rows[factor] == level]
        if len(rows):
            place = (_training(levels), f"Algorithm {algorithm}, {visited}")
            found[place] = rows.sort_values(["seed", "start", "noise"])
    return found


def _training(levels: tuple[str, ...]) -> str:
    flip, discrete, loss = levels
    parts = ["flips"] * (flip == "yes") + ["rounding"] * (discrete == "yes")
    return ", ".join([loss.upper(), *parts])


def cell_table(found: Mapping[Cell, pd.DataFrame]) -> str:
    """Means over starts, noises, weights and seeds."""
    header = ["training", "sampler", "sets", *(MEASURES[name] for name in EXPLAINED), "duplicates"]
    rows = []
    for (training, way), sets in found.items():
        measures = [shown(m, float(sets[m].mean())) for m in (*EXPLAINED, "duplicate_rate")]
        rows.append([training, way, str(len(sets)), *measures])
    return markdown_table(header, rows, words=2)


def draw_cells(images: Mapping[Cell, NDArray[np.uint8]]) -> Figure:
    """A row a training, a column a way: the first image of some sets (``n h w``) of each cell."""
    trainings = list(dict.fromkeys(training for training, _ in images))
    ways = list(dict.fromkeys(way for _, way in images))
    figure = new_figure(WIDTH, 0.4 + 0.46 * len(trainings))
    grid: Any = figure.subplots(len(trainings), len(ways), squeeze=False)
    for axes, (training, way) in zip(grid.flat, itertools.product(trainings, ways), strict=True):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        if (training, way) in images:
            strip = np.concatenate(list(images[training, way]), axis=1)
            axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if training == trainings[0]:
            axes.set_title(way, fontsize=8, pad=3)
        if way == ways[0]:
            axes.set_ylabel(
                training.replace(", ", ",\n"), fontsize=7, rotation=0, ha="right", va="center"
            )
    return figure
