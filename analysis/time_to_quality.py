"""Minutes of training until direct restoration of the validation images is good enough.

Takes the runs of an experiment that were validated while training. Writes time_to_quality.md, .csv,
.png and .pdf.
"""

from __future__ import annotations

import csv
import io
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

DASHES = ("-", "--", ":", "-.")
ERROR, SPEED = "validation/rmse", "speed/images_per_second"


@dataclass(frozen=True)
class TimeOptions(Options):
    """Options of this script."""

    rmse: tuple[float, ...] = (0.150, 0.139)
    """What is good enough, on the [0, 1] range; the paper prints 0.142 for MNIST's test digits."""


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
    machine: str
    """GPU, or processor and threads; empty where that was not recorded."""
    points: tuple[Validated, ...]

    def reached(self, rmse: float) -> Validated | None:
        """The first validation that is no worse than ``rmse``; None where there is none."""
        return next((point for point in self.points if point.rmse <= rmse), None)


def read(runs: pd.DataFrame, uri: str | None) -> list[Curve]:
    """The curves of the runs, by recipe; runs without a validation, or without speeds, have none.

    Raises:
        AnalysisError: where no run has one.
    """
    found = []
    with reading(uri) as client:
        for dataset, preset, T, group in recipes(runs):
            for row in group.sort_values("seed").to_dict("records"):
                curve = _curve(client, f"{dataset}, {preset}, T = {T}", row)
                if curve is not None:
                    found.append(curve)
    if not found:
        raise AnalysisError(
            "no run has times of validations: they need data.validation, training.validate_every "
            "and training.log_every"
        )
    return found


def _curve(client: MlflowClient, recipe: str, row: Mapping[Any, Any]) -> Curve | None:
    def history(name: str) -> dict[int, float]:
        records = client.get_metric_history(row["run_id"], name)
        return {record.step: float(record.value) for record in records}

    errors, speeds = history(ERROR), history(SPEED)
    last = max(speeds, default=0)
    batch = int(row["params.training.batch_size"]) * int(row["params.training.accumulation"])
    points = tuple(
        Validated(step, minutes_until(step, speeds, batch), errors[step])
        for step in sorted(errors)
        if step <= last
    )
    seed, run_id = int(row["seed"]), str(row["colddiff_run_id"])
    machine = str(row["machine"])
    return Curve(recipe, run_id, seed, batch, machine, points) if points else None


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
    writer.writerow(["recipe", "run", "seed", "machine", "step", "minutes", "rmse"])
    for curve in curves:
        for point in curve.points:
            values = (point.step, f"{point.minutes:.6g}", f"{point.rmse:.10g}")
            writer.writerow([curve.recipe, curve.run_id, curve.seed, curve.machine, *values])
    return text.getvalue()


def to_markdown(curves: Sequence[Curve], wanted: Sequence[float], footer: Provenance) -> str:
    """Figure, table and provenance."""
    header = ["recipe", "seed", "machine", "images a step", "images a second"]
    header += [f"{rmse:g}: {unit}" for rmse in wanted for unit in ("step", "minutes")]
    rows = []
    for curve in curves:
        last = curve.points[-1]
        speed = last.step * curve.batch / last.minutes / 60
        row = [curve.recipe, str(curve.seed), curve.machine, str(curve.batch), f"{speed:.0f}"]
        for rmse in wanted:
            found = curve.reached(rmse)
            row += [f"{found.step:,}", f"{found.minutes:.1f}"] if found else ["never", ""]
        rows.append([*row, f"{last.rmse:.4f} at {last.step:,}, {last.minutes:.0f} min"])
    header.append("last")
    legend = (
        "The first validation at which direct restoration from x_T, by the averaged weights, is no "
        "worse than that RMSE. Minutes are of training, without start, validation and evaluation, "
        "beside whatever else the machine did. Machine: GPUs, or processor x threads."
    )
    picture = "![RMSE on the validation images against minutes of training](time_to_quality.png)"
    parts = ["# Time to quality", picture, legend, markdown_table(header, rows)]
    return "\n\n".join([*parts, footer.markdown()])


def draw(curves: Sequence[Curve], wanted: Sequence[float]) -> Figure:
    """RMSE against minutes; a line a run, a colour a recipe (and dashes after six of them)."""
    figure = new_figure(WIDTH, 3.4)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(curve.recipe for curve in curves))
    for curve in curves:
        dashes, color = divmod(names.index(curve.recipe), len(COLORS))
        first = curve is next(each for each in curves if each.recipe == curve.recipe)
        axes.plot(
            [point.minutes for point in curve.points],
            [point.rmse for point in curve.points],
            color=COLORS[color],
            linestyle=DASHES[dashes % len(DASHES)],
            marker="o",
            markersize=3,
            label=curve.recipe if first else None,
        )
    for rmse in wanted:
        axes.axhline(rmse, color=GREY, linestyle=":")
        side = "bottom" if rmse == max(wanted) else "top"
        axes.annotate(f"{rmse:g}", (1, rmse), xycoords=("axes fraction", "data"), va=side)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("RMSE of direct restoration")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def make(options: TimeOptions) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    if not options.rmse or min(options.rmse) <= 0:
        given = " ".join(f"{rmse:g}" for rmse in options.rmse)
        raise AnalysisError(f"--rmse {given}: some numbers above 0 are wanted")
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
