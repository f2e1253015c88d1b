"""The figures of a study; in all of them a square is the reference and a star the best trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from analysis.pictures import BLACK, BLUE, GREY, ORANGE, WIDTH, new_figure
from analysis.studies import Study, Trial, value
from analysis.sweep_axes import (
    Scale,
    colors_of,
    limits,
    marked,
    pierce,
    plane_axes,
    scatter,
    varying,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(study: Study) -> dict[str, Callable[[Study], Figure]]:
    """The figures that there is something to show in, by file name."""
    names = varying(study)
    possible = {
        history: True,
        pareto: len(study.objectives) > 1,
        importances: bool(study.importances),
        slices: bool(names),
        plane: plane_axes(study) is not None,
        parallel: len(names) > 1,
    }
    return {draw.__name__: draw for draw, sensible in possible.items() if sensible}


def history(study: Study) -> Figure:
    """Values against the trials' numbers, with the best so far."""
    rows = len(study.objectives)
    figure = new_figure(WIDTH, 0.4 + 2.6 * rows)
    for row in range(rows):
        _history(figure.add_subplot(rows, 1, row + 1), study, row)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5)
    return figure


def _history(axes: Axes, study: Study, row: int) -> None:
    from matplotlib.ticker import MaxNLocator

    objective, ends = study.objectives[row], limits(study, row)
    trials = sorted(study.measured, key=lambda trial: trial.number)
    numbers = [trial.number for trial in trials]
    values = [value(trial, row) for trial in trials]
    scatter(axes, numbers, values, ends, color=BLUE, label="trial")
    pierce(axes, trials, numbers, values)
    fair = [trial for trial in trials if not trial.leaves_more]
    best = [
        objective.sign * min(objective.sign * value(each, row) for each in fair[: i + 1])
        for i in range(len(fair))
    ]
    axes.step(
        [trial.number for trial in fair], best, where="post", color=ORANGE, label="best so far"
    )
    if study.reference:
        axes.axhline(value(study.reference, row), color=BLACK, linestyle=":", linewidth=1)
    _mark(axes, study, lambda trial: (trial.number, value(trial, row)))
    pruned = [trial.number for trial in study.trials if trial.state == "pruned"]
    if pruned:
        edge = axes.get_xaxis_transform()
        axes.plot(pruned, [0.02] * len(pruned), "|", color=GREY, label="pruned", transform=edge)
    axes.set(xlabel="trial", ylabel=objective.axis, ylim=ends)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def importances(study: Study) -> Figure:
    """Each parameter's share of the variance."""
    shares = study.importances
    names = varying(study)[::-1]
    height = 0.8 / len(shares)
    figure = new_figure(WIDTH, 0.8 + 0.35 * len(names) * len(shares))
    axes = figure.add_subplot()
    labels = {objective.key: objective.label for objective in study.objectives}
    for place, (key, color) in enumerate(zip(shares, (BLUE, ORANGE), strict=False)):
        offset = height * ((len(shares) - 1) / 2 - place)
        bars = axes.barh(
            [i + offset for i in range(len(names))],
            [shares[key].get(name, 0.0) for name in names],
            height=0.9 * height,
            color=color,
            label=labels[key],
        )
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="share of the variance among the trials (fANOVA)", xlim=(0, 1.08))
    axes.grid(visible=False, axis="y")
    if len(shares) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def slices(study: Study) -> Figure:
    """Values against each parameter, coloured by when they were tried."""
    from matplotlib.ticker import MaxNLocator

    names, objectives = varying(study), study.objectives
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(max(4.2, 1.2 + 1.8 * columns), 0.5 + 2.3 * rows * len(objectives))
    cells = figure.subplots(rows * len(objectives), columns, squeeze=False, sharey="row")
    for index, objective in enumerate(objectives):
        for place in range(rows * columns):
            axes = cells[index * rows + place // columns][place % columns]
            if place >= len(names):
                axes.set_axis_off()
                continue
            _slice(axes, study, index, names[place])
            if place % columns == 0:
                axes.set_ylabel(objective.axis)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    dots = figure.axes[0].collections[0]
    figure.colorbar(
        dots, ax=cells, label="trial", aspect=40, pad=0.02, ticks=MaxNLocator(integer=True)
    )
    return figure


def _slice(axes: Axes, study: Study, index: int, name: str) -> None:
    scale, ends = Scale(study, name), limits(study, index)
    xs = [scale.at(trial.used[name]) for trial in study.measured]
    ys = [value(trial, index) for trial in study.measured]
    numbers = [trial.number for trial in study.measured]
    scatter(axes, scale.spread(xs), ys, ends, c=numbers, cmap="cividis")
    pierce(axes, study.measured, scale.spread(xs), ys)
    _mark(axes, study, lambda trial: (scale.at(trial.used[name]), value(trial, index)))
    scale.draw(axes.xaxis)
    axes.set(xlabel=name, ylim=ends)


def plane(study: Study) -> Figure:
    """The first value over the number of steps and the shape."""
    names = plane_axes(study)
    assert names is not None, "figures() asks first"
    figure = new_figure(5.2, 3.9)
    axes = figure.add_subplot()
    x_scale, y_scale = (Scale(study, name) for name in names)
    x, y = names
    trials = study.ranked[::-1]  # the best on top
    colors, palette = colors_of(study)
    xs, ys = (
        [scale.at(trial.used[name]) for trial in trials]
        for name, scale in ((x, x_scale), (y, y_scale))
    )
    dots = axes.scatter(
        xs,
        ys,
        c=[value(trial) for trial in trials],
        cmap=palette,
        norm=colors,
        s=45,
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )
    pierce(axes, trials, xs, ys)
    for trial, style, label in marked(study):
        place = x_scale.at(trial.used[x]), y_scale.at(trial.used[y])
        ring = {"marker": style["marker"], "markersize": style["markersize"] + 4, "mew": 1.5}
        axes.plot(
            *place, **ring, color=style["color"], fillstyle="none", linestyle="none", label=label,
            zorder=style["zorder"],
        )  # fmt: skip
    x_scale.draw(axes.xaxis)
    y_scale.draw(axes.yaxis)
    axes.set(xlabel=x, ylabel=y)
    figure.colorbar(dots, label=study.objectives[0].axis)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def parallel(study: Study) -> Figure:
    """A line a trial through all its parameters to its first value; the better, the darker."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    names = varying(study)
    scales = [Scale(study, name) for name in names]
    width = 2.7 + 1.2 * len(names)
    figure = new_figure(width, 3.4, layout=None)  # which would fight with the texts' places
    axes = figure.add_axes((0.8 / width, 0.15, 1.2 * len(names) / width, 0.7))
    axes.set_axis_off()
    colors, palette = colors_of(study)
    xs = range(len(names) + 1)
    heights = {
        trial.number: [
            *(scale.part(trial.used[name]) for scale, name in zip(scales, names, strict=True)),
            float(colors(value(trial))),
        ]
        for trial in study.measured
    }
    for trial in study.ranked[::-1]:
        color = colormaps[palette](colors(value(trial)))
        axes.plot(xs, heights[trial.number], color=color, linewidth=1, alpha=0.8)
    for trial, style, label in marked(study):
        axes.plot(xs, heights[trial.number], **style, linewidth=1.8, label=label)
    for x, (name, scale) in enumerate(zip(names, scales, strict=True)):
        _upright(axes, x, name, scale.parts())
    low, high = limits(study)
    _upright(axes, len(names), "value", [(0, f"{low:.3g}"), (1, f"{high:.3g}")])
    axes.set(xlim=(-0.02, len(names) + 0.02), ylim=(-0.02, 1.02))
    bar = figure.add_axes((1 - 1.4 / width, 0.15, 0.12 / width, 0.7))
    figure.colorbar(ScalarMappable(colors, palette), cax=bar, label=study.objectives[0].axis)
    figure.legend(loc="upper center", ncols=2)
    return figure


def _upright(axes: Axes, x: float, name: str, ticks: list[tuple[float, str]]) -> None:
    axes.plot([x, x], [0, 1], color=BLACK, linewidth=0.8, zorder=4)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for y, text in ticks:
        axes.plot([x - 0.02, x + 0.02], [y, y], color=BLACK, linewidth=0.8, zorder=4)
        axes.text(x - 0.04, y, text, ha="right", va="center", fontsize=7.5, bbox=box, zorder=7)
    axes.text(x, -0.07, name, ha="center", va="top")


def pareto(study: Study) -> Figure:
    """The first value against the second, and the trials that none beats in both."""
    figure = new_figure(WIDTH, 4.0)
    axes = figure.add_subplot()
    ends = limits(study)
    dominated = [trial for trial in study.measured if trial.number not in study.front]
    xs, ys = [value(trial, 1) for trial in dominated], [value(trial) for trial in dominated]
    scatter(axes, xs, ys, ends, color=BLUE, label="trial")
    front = [trial for trial in study.measured if trial.number in study.front]
    front.sort(key=lambda trial: value(trial, 1))
    places = [(value(trial, 1), value(trial)) for trial in front]
    axes.step(
        *zip(*places, strict=True),
        where="post",
        color=ORANGE,
        marker="o",
        label="Pareto front",
        zorder=4,
    )
    for trial, place in zip(front, places, strict=True):
        axes.annotate(str(trial.number), place, (5, 6), textcoords="offset points", fontsize=8)
    _mark(axes, study, lambda trial: (value(trial, 1), value(trial)))
    first, second = study.objectives[:2]
    axes.set(xlabel=second.axis, ylabel=first.axis, ylim=ends)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _mark(axes: Axes, study: Study, place: Callable[[Trial], tuple[float, float]]) -> None:
    for trial, style, label in marked(study):
        x, y = place(trial)
        axes.plot([x], [y], **style, linestyle="none", label=label)
