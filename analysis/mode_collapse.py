"""Why zeros? The mode-collapse study, from tracked runs.

Reads the generated sets of an experiment's runs (results/mode_collapse/plan.toml makes them) and
the training images. Writes mode_collapse.md, summary.json, sets.jsonl (every set measured) and
figures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import collapse_figures as figures
from analysis import collapse_page as page
from analysis.collapse_cells import PER_CELL, Cell, cell_table, cells, draw_cells
from analysis.collapse_controls import control_table, controls
from analysis.collapse_data import data_of, of_the_data
from analysis.collapse_design import SAMPLING, TRAINING
from analysis.collapse_table import (
    add_recorded,
    conditions,
    factorial,
    read_sets,
    sets_as_text,
    usual_T,
)
from analysis.effects import Effect, effects
from analysis.pictures import render
from analysis.report import Options, provenance, run_script
from analysis.runs import download, sampling, select_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


PAPER = {factor: next(iter(levels)) for factor, levels in SAMPLING.items()}
CURE = PAPER | {"start": "model", "noise": "0", "levels": "20-10-0"}
PLAIN = {factor: next(iter(levels)) for factor, levels in TRAINING.items()}
STUDENT = PLAIN | {"flip": "yes", "discrete": "yes"}


@dataclass(frozen=True)
class StudyOptions(Options):
    """Options of the study."""

    data_root: Path | None = None
    """Where the training images are; by default where the runs had them."""
    recorded: tuple[Path, ...] = ()
    """Files sets.jsonl of earlier studies, whose runs are in no store any more, to add."""


def make(options: StudyOptions) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    runs = sampling(select_runs(options.experiment, options.tracking_uri, options.preset))
    table = read_sets(runs, options.tracking_uri)
    footer = provenance(runs[runs["colddiff_run_id"].isin(table["network"])], options)
    data = data_of(runs, options.data_root)
    tracked, table = table, add_recorded(table, options.recorded)
    designed = factorial(table)
    floors, predicted, in_data = of_the_data(data)
    drawings: dict[str, Callable[[], Figure]] = {}
    parts = ["# Mode collapse"]
    named = _named(table)
    if named:
        pictures = {name: _images(rows, options) for name, rows in _named(tracked).items()}
        chosen = {name: (rows, pictures.get(name)) for name, rows in named.items()}
        drawings["before_and_after"] = lambda: figures.draw_before_and_after(chosen, in_data.total)
        parts += [_image("before_and_after"), page.comparison(named, floors)]
    grid = cells(designed)
    if grid:
        parts += ["## By training and sampler", cell_table(grid)]
        examples = _examples(cells(factorial(tracked)), options)
        if examples:
            drawings["cells"] = lambda: draw_cells(examples)
            parts.append(_image("cells"))
    beside = controls(table)
    if beside:
        parts += ["## Other networks, and the plain one beside them", control_table(beside)]
    estimated = _effects(designed)
    if estimated:
        mains, pairs = estimated
        drawings["effects"] = lambda: figures.draw_effects(mains)
        parts += ["## Effects", page.method(designed), _image("effects")]
        parts += [page.effect_table(mains), "### Interactions", page.interaction_table(pairs)]
    elif len(designed):
        parts += ["## Effects", page.incomplete(designed)]
    parts += [
        "## What the data say of a constant start",
        page.prediction_table(predicted, in_data.total),
    ]
    by_intensity = _by_intensity(named)
    drawings["intensity"] = lambda: figures.draw_intensity(
        in_data.shares, by_intensity, in_data.edges
    )
    parts.append(_image("intensity"))
    curves = _curves(table)
    if curves:
        drawings["training"] = lambda: figures.draw_curves(curves)
        parts += ["## Along training", _image("training"), page.curve_table(curves)]
    for name, draw in drawings.items():
        for form, content in render(draw, footer.summary()).items():
            write_atomic(options.out / f"{name}.{form}", content)
    summary = {
        "experiment": options.experiment,
        "floors": floors,
        "predictions": [dataclasses.asdict(each) for each in predicted],
        "effects": _plain_effects(*estimated) if estimated else [],
        "conditions": conditions(table),
    }
    write_atomic(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(options.out / "sets.jsonl", sets_as_text(table))
    markdown = "\n\n".join([*parts, footer.markdown()])
    write_atomic(options.out / "mode_collapse.md", markdown)
    sys.stdout.write(markdown)


def _named(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The sets of the first figure, from the student's way to the cure; hot diffusion."""
    last = table[(table["step"] == 0) & (table["T"] == usual_T(table))]
    hot = last["kind"] == "noise"

    def chosen(preset: str, levels: Mapping[str, str]) -> pd.DataFrame:
        rows = last[~hot & last["preset"].str.startswith(preset)]
        for factor, level in levels.items():
            rows = rows[rows[factor] == level]
        return rows

    sets = {
        "the student's setting": chosen("mnist-student", PAPER),
        "flips and rounding, our optimiser": chosen("collapse-", STUDENT | PAPER),
        "without them, the paper's sampler": chosen("collapse-", PLAIN | PAPER),
        "without them, x_T from a model": chosen("collapse-", PLAIN | CURE),
        "preset mnist-generate": chosen("mnist-generate", CURE),
        "hot diffusion, DDPM": last[hot & last["slug"].str.contains("ddpm")],
    }
    return {name: rows for name, rows in sets.items() if len(rows)}


def _images(rows: pd.DataFrame, options: StudyOptions) -> NDArray[np.uint8]:
    """The images of the first of the sets, ``n h w``."""
    import tempfile

    first = rows.iloc[0]
    with tempfile.TemporaryDirectory() as folder:
        name = f"samples/{first['slug']}.npz"
        path = download(first["mlflow_run"], name, options.tracking_uri, Path(folder))
        with np.load(path) as arrays:
            images: NDArray[np.uint8] = arrays["images"][..., 0]
    return images


def _examples(
    grid: Mapping[Cell, pd.DataFrame], options: StudyOptions
) -> dict[Cell, NDArray[np.uint8]]:
    """The first image of each of some sets of one network, by cell."""
    return {
        place: np.stack([_images(rows.iloc[[i]], options)[0] for i in range(PER_CELL)])
        for place, rows in grid.items()
        if len(rows) >= PER_CELL
    }


def _effects(
    designed: pd.DataFrame,
) -> tuple[dict[str, list[Effect]], dict[str, list[Effect]]] | None:
    """Main effects, by what they do to zeros, and interactions; None where sets are missing."""
    if designed.empty:
        return None
    try:
        found = {
            measure: effects(designed, measure, "network", _levels(TRAINING), _levels(SAMPLING))
            for measure in page.EXPLAINED
        }
    except ValueError:
        return None
    zeros = [e for e in found["zero_ratio"] if len(e.factors) == 1]
    order = sorted(range(len(zeros)), key=lambda i: -abs(zeros[i].size))
    mains = {name: [every[i] for i in order] for name, every in found.items()}
    pairs = {name: every[len(zeros) :] for name, every in found.items()}
    return mains, pairs


def _levels(factors: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    return {factor: tuple(levels) for factor, levels in factors.items()}


def _plain_effects(*parts: Mapping[str, list[Effect]]) -> list[dict[str, Any]]:
    return [
        {"measure": measure, **dataclasses.asdict(effect)}
        for part in parts
        for measure, every in part.items()
        for effect in every
    ]


def _curves(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Sets along training, by training and sampler; ``at`` is the step."""
    found = {}
    mine = table[table["preset"].str.startswith("collapse-")]
    for training, what in ((STUDENT, "student's training"), (PLAIN, "plain training")):
        for sampler, how in ((PAPER, "the paper's sampler"), (CURE, "x_T from a model")):
            rows = mine[mine["kind"] == "blur"]
            for factor, level in (training | sampler).items():
                rows = rows[rows[factor] == level]
            if rows["step"].nunique() > 1:
                rows = rows[rows["network"].isin(rows[rows["step"] > 0]["network"])].copy()
                steps = json.loads(rows.iloc[0]["training"])[1]
                rows["at"] = [step or int(steps) for step in rows["step"]]
                found[f"{what}, {how}"] = rows
    return found


def _by_intensity(named: Mapping[str, pd.DataFrame]) -> dict[str, NDArray[Any]]:
    """The classes by intensity of those sets whose start has one: noise has none."""
    return {
        name: _shares(rows)
        for name, rows in named.items()
        if rows.iloc[0]["quality"]["by_intensity"]
    }


def _shares(rows: pd.DataFrame) -> NDArray[Any]:
    """P(class | bin of the start's intensity), over all seeds."""
    counts = np.sum([quality["by_intensity"] for quality in rows["quality"]], axis=0)
    shares: NDArray[Any] = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    return shares


def _image(name: str) -> str:
    return f"![{name.replace('_', ' ')}]({name}.png)"


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, StudyOptions, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
