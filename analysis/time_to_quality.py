"""Minutes of training until direct restoration of the validation images is good enough.

Recipes are compared by the runs that MLflow has of them. Writes time_to_quality.md, .csv, .png and
.pdf.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.blocks import recipes
from analysis.pictures import COLORS, GREY, WIDTH, new_figure, render
from analysis.report import Options, Provenance, markdown_table, provenance, run_script
from analysis.runs import AnalysisError, reading, select_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

ERROR, SPEED = "validation/rmse", "speed/images_per_second"


@dataclass(frozen=True)
class TimeOptions(Options):
    """Options of this script."""

    rmse: tuple[float, ...] = (0.150, 0.139)
    """What is good enough, on the [0, 1] range."""


@dataclass(frozen=True)
class Validated:
    """A network during its training; ``minutes`` are of training steps alone."""

    step: int
    minutes: float
    rmse: float


@dataclass(frozen=True)
class Curve:
    """One run."""

    recipe: str
    run_id: str
    seed: int
    batch: int
    """Images a step."""
    points: tuple[Validated, ...]

    def reached(self, rmse: float) -> Validated | None:
        """The first validation that is no worse than ``rmse``; None where there is none."""
        return next((point for point in self.points if point.rmse <= rmse), None)


def read(runs: pd.DataFrame, uri: str | None) -> list[Curve]:
    """The curves of the runs, by recipe.

    Raises:
        AnalysisError: where a run was never validated, or its speed is not recorded.
    """
    found = []
    with reading(uri) as client:
        for _, preset, T, group in recipes(runs):
            for row in group.to_dict("records"):
                found.append(_curve(client, f"{preset}, T = {T}", row))
    return found


def _curve(client: MlflowClient, recipe: str, row: Mapping[Any, Any]) -> Curve:
    def history(name: str) -> dict[int, float]:
        # A run that was interrupted has some steps twice; the later counts.
        records = sorted(client.get_metric_history(row["run_id"], name), key=lambda r: r.timestamp)
        values = {record.step: float(record.value) for record in records}
        return {step: values[step] for step in sorted(values)}

    errors, speeds = history(ERROR), history(SPEED)
    batch = int(row["params.training.batch_size"]) * int(row["params.training.accumulation"])
    if not errors or not speeds or max(speeds) < max(errors):
        raise AnalysisError(
            f"run {row['colddiff_run_id']} has no time to its validations: it needs "
            "data.validation, training.validate_every and training.log_every"
        )
    return Curve(
        recipe=recipe,
        run_id=str(row["colddiff_run_id"]),
        seed=int(row["seed"]),
        batch=batch,
        points=tuple(
            Validated(step, minutes_until(step, speeds, batch), error)
            for step, error in errors.items()
        ),
    )


def minutes_until(step: int, speeds: Mapping[int, float], batch: int) -> float:
    """Minutes of training up to ``step``, from images a second between the steps of ``speeds``.

    What lies between the steps, such as validation or waiting in a queue, has no part in it.
    """
    seconds, before = 0.0, 0
    for end, speed in sorted(speeds.items()):
        seconds += max(0, min(end, step) - before) * batch / speed
        before = end
    return seconds / 60


def to_csv(curves: Iterable[Curve]) -> str:
    """One row a validation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["recipe", "run", "seed", "step", "minutes", "rmse"])
    for curve in curves:
        for point in curve.points:
            values = (point.step, f"{point.minutes:.6g}", f"{point.rmse:.10g}")
            writer.writerow([curve.recipe, curve.run_id, curve.seed, *values])
    return text.getvalue()


def to_markdown(curves: Sequence[Curve], wanted: Sequence[float], footer: Provenance) -> str:
    """Figure, table and provenance."""
    header = ["recipe", "seeds", "images a step", "images a second"]
    header += [f"{rmse:g}: {unit}" for rmse in wanted for unit in ("steps", "minutes")]
    rows = []
    for name in dict.fromkeys(curve.recipe for curve in curves):
        group = [curve for curve in curves if curve.recipe == name]
        ends = [curve.points[-1] for curve in group]
        speeds = [
            end.step * curve.batch / end.minutes / 60
            for curve, end in zip(group, ends, strict=True)
        ]
        cells = [str(len(group)), str(group[0].batch), f"{statistics.fmean(speeds):.0f}"]
        for rmse in wanted:
            cells += _reached(group, rmse)
        last = statistics.fmean(end.rmse for end in ends)
        rows.append([name, *cells, f"{last:.4f} at {ends[0].step:,}"])
    header.append("last RMSE, at step")
    legend = (
        "The first validation at which direct restoration from x_T, by the averaged weights, is no "
        "worse than that RMSE: means over seeds. Minutes are of training steps alone, without "
        "validation, start and evaluation."
    )
    picture = "![RMSE on the validation images against minutes of training](time_to_quality.png)"
    parts = ["# Time to quality", picture, legend, markdown_table(header, rows)]
    return "\n\n".join([*parts, footer.markdown()])


def _reached(group: Sequence[Curve], rmse: float) -> list[str]:
    """Steps and minutes, or how far the runs went without."""
    found = [curve.reached(rmse) for curve in group]
    points = [point for point in found if point is not None]
    if len(points) < len(group):
        ends = [curve.points[-1] for curve in group]
        short = f" ({len(points)} of {len(group)} did)" if points else ""
        steps, minutes = min(e.step for e in ends), min(e.minutes for e in ends)
        return [f"not in {steps:,}{short}", f"not in {minutes:.0f}{short}"]
    mean_step = statistics.fmean(point.step for point in points)
    return [f"{mean_step:,.0f}", f"{statistics.fmean(point.minutes for point in points):.1f}"]


def draw(curves: Sequence[Curve], wanted: Sequence[float]) -> Figure:
    """RMSE against minutes; a line a run, a colour a recipe."""
    figure = new_figure(WIDTH, 3.4)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(curve.recipe for curve in curves))
    for curve in curves:
        color = COLORS[names.index(curve.recipe) % len(COLORS)]
        first = curve is next(each for each in curves if each.recipe == curve.recipe)
        axes.plot(
            [point.minutes for point in curve.points],
            [point.rmse for point in curve.points],
            color=color,
            marker="o",
            markersize=3,
            label=curve.recipe if first else None,
        )
    for rmse in wanted:
        axes.axhline(rmse, color=GREY, linestyle=":")
        axes.annotate(f"{rmse:g}", (1, rmse), xycoords=("axes fraction", "data"), va="center")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("RMSE of direct restoration")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def make(options: TimeOptions) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    if not options.rmse or min(options.rmse) <= 0:
        raise AnalysisError(f"--rmse {options.rmse}: some numbers above 0 are wanted")
    runs = select_runs(options.experiment, options.tracking_uri, options.preset)
    curves = read(runs, options.tracking_uri)
    footer = provenance(runs, options)
    figures = render(lambda: draw(curves, options.rmse), "; ".join(footer.lines()))
    for form, content in figures.items():
        write_atomic(options.out / f"time_to_quality.{form}", content)
    write_atomic(options.out / "time_to_quality.csv", to_csv(curves))
    markdown = to_markdown(curves, options.rmse, footer)
    write_atomic(options.out / "time_to_quality.md", markdown)
    sys.stdout.write(markdown)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, TimeOptions, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
