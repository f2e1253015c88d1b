"""The information floor: direct restoration against the number format that x_T is kept in.

Takes the networks that were trained to restore directly from x_T and no more
(training.levels = last). Writes information_floor.md, .csv, .png and .pdf.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.blocks import paper_values
from analysis.pictures import BLACK, COLORS, GREY, new_figure, render
from analysis.report import (
    Options,
    Provenance,
    markdown_table,
    plural,
    provenance,
    run_script,
    scope,
)
from analysis.runs import AnalysisError, select_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STEPS = {
    "float32": 2.0**-24,
    "uint16": 1 / (2**16 - 1),
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "uint8": 1 / 255,
}
"""The distance of neighbouring values at mid-range, in units of [0, 1]; the formats by fineness."""
METRICS = ("rmse", "ssim", "fid_digits")


@dataclass(frozen=True)
class Point:
    """Runs of one T and one format: means over seeds, and the deviation of the RMSE."""

    dataset: str
    T: int
    storage: str
    seeds: int
    samples: int | None
    split: str | None
    degraded: float
    values: dict[str, float | None]
    std: float | None


def points(runs: pd.DataFrame) -> list[Point]:
    """By data set, T and fineness of the format.

    Raises:
        AnalysisError: where no run restores directly and no more, or where runs of one T and format
            differ in more than their seed.
    """
    from analysis.runs import recipe_columns

    runs = runs[runs["params.training.levels"] == "last"]
    if runs.empty:
        raise AnalysisError(
            "no run restores directly and no more: make some with --training.levels last "
            "--training.own-states 0 and the formats of --degradation.storage"
        )
    found = []
    for (dataset, T, storage), group in runs.groupby(
        ["dataset", "T", "params.degradation.storage"]
    ):
        for name in [*recipe_columns(group), "samples", "split"]:
            if group[name].nunique(dropna=False) > 1:
                raise AnalysisError(
                    f"runs of T = {T} and {storage} differ in {name.removeprefix('params.')}: "
                    "choose some with --preset, or another experiment"
                )
        found.append(_point(str(dataset), int(str(T)), str(storage), group))
    return sorted(found, key=lambda p: (p.dataset, p.T, list(STEPS).index(p.storage)))


def _point(dataset: str, T: int, storage: str, group: pd.DataFrame) -> Point:
    def mean(kind: str, metric: str) -> float | None:
        name = f"metrics.eval/{kind}/{metric}"
        values = [float(v) for v in group[name].dropna()] if name in group else []
        return statistics.fmean(values) if values else None

    errors = [float(v) for v in group["metrics.eval/direct/rmse"]]
    first = group.iloc[0]
    return Point(
        dataset=dataset,
        T=T,
        storage=storage,
        seeds=len(group),
        samples=None if first.isna()["samples"] else int(first["samples"]),
        split=None if first.isna()["split"] else str(first["split"]),
        degraded=mean("degraded", "rmse") or 0.0,
        values={metric: mean("direct", metric) for metric in METRICS},
        std=statistics.stdev(errors) if len(errors) > 1 else None,
    )


def to_csv(found: Iterable[Point]) -> str:
    """One row a point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "T", "storage", "step", "degraded_rmse", *METRICS, "std", "seeds"])
    for p in found:
        values = [p.degraded, *(p.values[metric] for metric in METRICS), p.std]
        exact = ["" if value is None else f"{value:.10g}" for value in values]
        writer.writerow([p.dataset, p.T, p.storage, f"{STEPS[p.storage]:.4g}", *exact, p.seeds])
    return text.getvalue()


def to_markdown(found: Sequence[Point], footer: Provenance) -> str:
    """What the figure shows as a table, its legend and provenance."""
    digits = {"rmse": 3, "ssim": 3, "fid_digits": 2}
    rows = []
    for p in found:
        shown = [
            "" if value is None else f"{value:.{digits[metric]}f}"
            for metric, value in p.values.items()
        ]
        if p.std is not None:
            shown[0] += f" ± {p.std:.3f}"
        step = f"{STEPS[p.storage]:.1e}"
        rows.append([p.storage, str(p.T), step, f"{p.degraded:.3f}", *shown])
    header = ["x_T kept in", "T", "step", "RMSE of x_T", "RMSE direct", "SSIM", "FID(digits)"]
    first = found[0]
    counts = sorted({p.seeds for p in found})
    legend = (
        f"Networks that restore directly from x_T, each trained and tested on x_T rounded to that "
        f"format; {' or '.join(plural(n, 'seed') for n in counts)} each, "
        f"{scope(first.samples, first.split)}. The step is the distance of neighbouring values at "
        "mid-range, in units of the [0, 1] range. Dotted: the mean of the x_T themselves; dashed: "
        "the paper's direct restoration."
    )
    picture = "![Error of direct restoration against the format of x_T](information_floor.png)"
    parts = ["# The information floor", picture, legend, markdown_table(header, rows)]
    return "\n\n".join([*parts, footer.markdown()])


def draw(found: Sequence[Point]) -> Figure:
    """RMSE of direct restoration against the formats, from fine to coarse; a line a T."""
    figure = new_figure(5.2, 3.2)
    axes = figure.add_subplot()
    places = {name: i for i, name in enumerate(STEPS)}
    groups = dict.fromkeys((p.dataset, p.T) for p in found)
    for color, (dataset, T) in zip(COLORS * 5, groups, strict=False):
        line = [p for p in found if (p.dataset, p.T) == (dataset, T)]
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "capsize": 2}
        axes.errorbar(
            [places[p.storage] for p in line],
            [p.values["rmse"] or 0.0 for p in line],
            [p.std or 0.0 for p in line],
            label=f"T = {T}" + (f", {dataset}" if len({p.dataset for p in found}) > 1 else ""),
            **style,
        )
    axes.axhline(max(p.degraded for p in found), color=GREY, linestyle=":", label="x_T itself")
    printed = paper_values().get((found[0].dataset, "direct", "rmse"))
    if printed:
        axes.axhline(
            float(printed), color=BLACK, linestyle="--", linewidth=1, label="paper, direct"
        )
    axes.set_xticks(range(len(STEPS)), [f"{name}\n{step:.0e}" for name, step in STEPS.items()])
    axes.set_ylabel("RMSE of direct restoration")
    axes.set_xlabel("x_T kept in, and its step")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def make(options: Options) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    runs = select_runs(options.experiment, options.tracking_uri, options.preset)
    found = points(runs)
    shown = runs[runs["params.training.levels"] == "last"]
    footer = provenance(shown, options)
    caption = "; ".join(footer.lines())
    for form, content in render(lambda: draw(found), caption).items():
        write_atomic(options.out / f"information_floor.{form}", content)
    write_atomic(options.out / "information_floor.csv", to_csv(found))
    markdown = to_markdown(found, footer)
    write_atomic(options.out / "information_floor.md", markdown)
    sys.stdout.write(markdown)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, Options, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
