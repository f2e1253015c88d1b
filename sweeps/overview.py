"""A picture of a study for its page in MLflow: the values so far, and over each parameter.

``analysis/sweep_report.py`` makes the figures to publish, from what MLflow has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by the colour-blind
FAR = 3.0
"""Values further from the best than so many times the best three quarters' range are cut off."""


def draw(record: Mapping[str, Any]) -> Figure:
    """Each value of the objective against the trials' numbers and against each parameter."""
    from matplotlib.figure import Figure

    against = ["trial", *record["parameters"]]
    panels = [(index, name) for index in range(len(record["values"])) for name in against]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 0.4 + 3.0 * rows), dpi=100, layout="constrained")
    figure.suptitle(
        f"{record['study']}: orange the best, square the reference; triangles lie further out; "
        "hollow: given more of the images"
    )
    for place, (index, name) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        axes.set(xlabel=name, ylabel=record["values"][index]["label"])
        _plot(axes, record, index, name)
        if record["parameters"].get(name, {}).get("log"):
            _logarithmic(axes)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    return figure


def _plot(axes: Axes, record: Mapping[str, Any], index: int, name: str) -> None:
    found = [
        (trial, trial["number"] if name == "trial" else _used(trial).get(name))
        for trial in record["trials"]
        if trial["state"] == "complete" and math.isfinite(trial["values"][index])
    ]
    sign = 1 if record["values"][index]["direction"] == "minimize" else -1
    worst = _worst([sign * trial["values"][index] for trial, _ in found])
    for trial, x in found:
        if x is None:
            continue
        cost = sign * trial["values"][index]
        best, reference = (
            trial["number"] in record["front"],
            trial["number"] == record["reference"],
        )
        outer = "^" if sign == 1 else "v"
        axes.plot(
            str(x) if isinstance(x, str | bool) else x,
            sign * min(cost, worst),
            marker=outer if cost > worst else "s" if reference else "o",
            color=ORANGE if best else BLUE,
            # Of schedules that leave more of the images than the reference's, the rim alone.
            fillstyle="none" if trial["leaves_more"] else "full",
            markersize=8 if best or reference else 6,
            markeredgecolor=BLUE if trial["leaves_more"] else "black" if reference else "white",
            zorder=3 if best or reference else 2,
        )


def _used(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as its run has them."""
    return {**trial["params"], **trial["user_attrs"].get("adjusted", {})}


def _worst(costs: Sequence[float]) -> float:
    """The highest cost to show in its place."""
    if not costs:
        return 0.0
    ordered = sorted(costs)
    usual = ordered[(3 * len(ordered) - 1) // 4] - ordered[0]
    return ordered[0] + FAR * usual if usual > 0 else ordered[-1]


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
