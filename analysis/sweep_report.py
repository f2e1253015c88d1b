"""What a study found: the best trial against the reference, figures, and how to repeat it.

Writes report.md, summary.json, best.json (of several objectives also pareto/) and the figures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Suppress

from analysis.report import Options, Provenance, provenance, run_script
from analysis.runs import AnalysisError, download
from analysis.studies import FINISHED, Study, Trial, read_study, seeds_of, value
from analysis.sweep_page import best_of, better_of_those_given_more, front_of, to_markdown


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Options of this script."""

    study: str
    """The study's name."""
    preset: Annotated[str | None, Suppress] = None  # a study is of one


def summarise(study: Study) -> dict[str, Any]:
    """``summary.json``."""
    best, reference = study.best, study.reference
    all_levels = "none" if study.settings["objective"] == "direct" else "all"

    def told(trial: Trial) -> dict[str, Any]:
        return {
            "trial": trial.number,
            "run": trial.run,
            "values": {o.key: value(trial, i) for i, o in enumerate(study.objectives)},
            "params": dict(trial.params),
            "adjusted": dict(trial.adjusted),
            "levels": trial.levels or all_levels,
            "linear_rmse": trial.linear_rmse,
            "seeds": seeds_of(study, trial),
        }

    gains = None
    if reference:
        gains = {
            objective.key: objective.gain(value(best, i), value(reference, i))
            for i, objective in enumerate(study.objectives)
        }
    return {
        "study": study.name,
        "mlflow_run_id": study.run_id,
        "objectives": [dataclasses.asdict(objective) for objective in study.objectives],
        "wanted": study.wanted,
        "finished": study.count(*FINISHED),
        "pruned": study.count("pruned"),
        "failed": study.count("failed"),
        "reference": told(reference) if reference else None,
        "best": told(best),
        "better_but_leaving_more": told(more) if (more := study.better_but_leaving_more) else None,
        "gain": gains,
        "front": list(study.front) if len(study.objectives) > 1 else None,
        "importances": study.importances,
    }


def save_configs(study: Study, options: SweepOptions, scratch: Path) -> None:
    """Write best.json and pareto/."""
    from colddiff.files import write_atomic

    single = len(study.objectives) == 1
    names = {n: "best.json" if single else f"pareto/{n}.json" for n in study.front}
    for number, name in names.items():
        try:
            text = download(study.run_id, name, options.tracking_uri, scratch).read_text()
        except AnalysisError:
            continue  # its run folder was gone when the study was recorded
        write_atomic(options.out / name, text)
        if number == study.best.number and not single:
            write_atomic(options.out / "best.json", text)


def make(options: SweepOptions) -> None:
    """Read, draw and write; see the module's description."""
    from analysis.pictures import render
    from analysis.sweep_figures import figures
    from colddiff.files import write_atomic, write_json

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        study = read_study(options.experiment, options.study, options.tracking_uri, folder)
        save_configs(study, options, folder)
    summary = summarise(study)
    footer = _provenance(study, options)
    drawn = figures(study)
    for name, draw in drawn.items():
        for form, content in render(
            functools.partial(draw, study), "; ".join(footer.lines())
        ).items():
            write_atomic(options.out / f"{name}.{form}", content)
    page = to_markdown(study, summary, list(drawn), options.out, footer)
    write_json(options.out / "summary.json", summary)
    write_atomic(options.out / "report.md", page)
    sys.stdout.write(page)


def _provenance(study: Study, options: SweepOptions) -> Provenance:
    """Of the runs that the page names."""
    import pandas as pd

    named = best_of(study) + better_of_those_given_more(study)
    named += [study.reference] if study.reference else []
    named += front_of(study) if len(study.objectives) > 1 else []
    runs = study.runs[study.runs["colddiff_run_id"].isin([trial.run for trial in named])]
    known = runs.get("metrics.eval/samples", pd.Series(math.nan, runs.index))
    samples = [None if math.isnan(number) else int(number) for number in known]
    return provenance(runs.assign(samples=pd.Series(samples, runs.index, dtype=object)), options)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, SweepOptions, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
