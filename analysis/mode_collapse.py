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
from analysis.collapse_design import SAMPLING, TRAINING, N
from analysis.collapse_table import (
    MEASURES,
    add_recorded,
    conditions,
    factorial,
    read_sets,
    sets_as_text,
)
from analysis.effects import Effect, effects
from analysis.pictures import render
from analysis.report import Options, provenance, run_script
from analysis.runs import download, sampling, select_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from analysis.intensity import Prediction
    from colddiff.config import DataConfig

PAPER = {factor: next(iter(levels)) for factor, levels in SAMPLING.items()}
CURE = PAPER | {"start": "model", "noise": "0", "levels": "20-10-0"}
PLAIN = {factor: next(iter(levels)) for factor, levels in TRAINING.items()}
STUDENT = PLAIN | {"flip": "yes", "discrete": "yes"}
NEIGHBOURS = 500


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
    data = _data(runs, options)
    tracked, table = table, add_recorded(table, options.recorded)
    designed = factorial(table)
    floors, predicted, in_data = _of_the_data(data)
    drawings: dict[str, Callable[[], Figure]] = {}
    parts = ["# Mode collapse"]
    named = _named(table)
    if named:
        pictures = {name: _images(rows, options) for name, rows in _named(tracked).items()}
        chosen = {name: (rows, pictures.get(name)) for name, rows in named.items()}
        drawings["before_and_after"] = lambda: figures.draw_before_and_after(chosen, in_data.total)
        parts += [_image("before_and_after"), page.comparison(named, floors)]
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
    by_intensity = {name: _shares(rows) for name, rows in named.items()}
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


@dataclass(frozen=True)
class DataClasses:
    """The training images' classes by intensity."""

    shares: NDArray[Any]
    """P(class | bin)."""
    total: tuple[float, ...]
    """P(class)."""
    edges: tuple[float, ...]


def _data(runs: pd.DataFrame, options: StudyOptions) -> DataConfig:
    """The data set of the runs, where it is now."""
    from colddiff.config import DataConfig

    first = runs.iloc[0]
    root = options.data_root or Path(str(first["params.data.root"]))
    return DataConfig(
        name=first["params.data.name"],
        root=str(root),
        image_size=int(first["params.data.image_size"]),
    )


def _of_the_data(
    data: DataConfig,
) -> tuple[dict[str, dict[str, float]], list[Prediction], DataClasses]:
    """What real digits score, what perfect restorers make of a mean, and the classes by mean."""
    import torch

    from analysis.intensity import (
        BINS,
        class_given_intensity,
        intensities,
        mean_starts,
        predict,
    )
    from colddiff.batches import to_batch
    from colddiff.classifier import load_digit_classifier
    from colddiff.collapse import blank, measure, reference_of
    from colddiff.data import load_images
    from colddiff.randomness import generator

    train, test = load_images(data, "train"), load_images(data, "test")
    every = to_batch(train.take(torch.arange(len(train))), data)
    real = to_batch(test.take(torch.arange(len(test))), data)
    labels = train.labels
    assert labels is not None, "digits have labels"
    n = min(N, len(test))
    classifier = load_digit_classifier()
    reference = reference_of(every, labels, real, classifier)
    # At random, because MNIST's first test digits are the neater ones.
    some = torch.randperm(len(real), generator=generator(0, "test digits"))[:n]
    measured = measure(real[some], reference, classifier)
    floors = {f"{n:,} test digits": _floor(dataclasses.asdict(measured))}
    drawn = labels[torch.randint(len(labels), (n,), generator=generator(0, "labels"))]
    shares = torch.bincount(labels, minlength=10).double() / len(labels)
    found = torch.bincount(drawn, minlength=10).double() / n
    floors["labels drawn at random"] = {
        "n": n,
        "zero_ratio": float(found[0] / shares[0]),
        "tv_distance": float((found - shares).abs().sum() / 2),
    }
    means = intensities(every)
    starts = mean_starts(means, n)
    predicted = predict(every, labels, starts, min(NEIGHBOURS, len(every)), is_blank=blank)
    table = class_given_intensity(means, labels, BINS)
    return floors, predicted, DataClasses(table.shares, tuple(shares.tolist()), table.edges)


def _floor(quality: Mapping[str, Any]) -> dict[str, float]:
    measures = {"zero_ratio": quality["ratios"][0], "tv_distance": quality["total_variation"]}
    return {"n": quality["n"], **measures} | {
        name: quality[name] for name in MEASURES if name not in measures
    }


def _named(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The sets of the first figure, from the student's way to the cure; hot diffusion."""
    last = table[table["step"] == 0]

    def chosen(preset: str, levels: Mapping[str, str]) -> pd.DataFrame:
        rows = last[last["preset"].str.startswith(preset)]
        for factor, level in levels.items():
            rows = rows[rows[factor] == level]
        return rows

    sets = {
        "student's setting (mnist-student)": chosen("mnist-student", PAPER),
        "flips and rounding, our optimiser": chosen("collapse-", STUDENT | PAPER),
        "without them, the paper's sampler": chosen("collapse-", PLAIN | PAPER),
        "without them, x_T from a model": chosen("collapse-", PLAIN | CURE),
        "preset mnist-generate": chosen("mnist-generate", CURE),
        "hot diffusion, DDPM": last[(last["kind"] == "noise") & last["slug"].str.contains("ddpm")],
    }
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    typical = table["T"].mode().iloc[0]
    return {name: rows[rows["T"] == typical] for name, rows in sets.items()}


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
