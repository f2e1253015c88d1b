"""Generated sets of tracked runs as a table: one row a set, with its factors and its measures."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.collapse_design import SAMPLING, TRAINING, levels_of
from analysis.runs import AnalysisError, generated_sets

if TYPE_CHECKING:
    import pandas as pd

MEASURES = {
    "zero_ratio": "zeros (data: 1)",
    "blank_rate": "blank",
    "unreadable_rate": "unreadable",
    "tv_distance": "class distance",
    "mirrored_rate": "mirrored",
    "duplicate_rate": "duplicates",
    "coverage": "coverage",
    "fid_digits": "FID(digits)",
}
"""Columns of the table, and what the page calls them."""
CONDITION = ("kind", "T", *TRAINING, *SAMPLING, "step", "training")
"""Columns that say what was done; seeds are averaged over."""
OTHER = "other"
"""A level that is none of the design's."""


def read_sets(runs: pd.DataFrame, uri: str | None) -> pd.DataFrame:
    """One row a set of generated digits of ``runs``, as :func:`analysis.runs.select_runs` has them.

    Columns: ``network`` (run id), ``preset``, ``seed``, ``kind``, ``T``, the design's factors as
    text, ``step`` (0: the end), ``training`` (parameters that are no factor, as text),
    :data:`MEASURES`, ``samples``, ``slug``, ``mlflow_run``, ``git_sha`` and ``quality`` (all that
    was measured).

    Raises:
        AnalysisError: where no set has the measures of collapse.
    """
    import pandas as pd

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(runs.to_dict("records")):
            for path, record in generated_sets(run["run_id"], uri, Path(folder, str(number))):
                quality = record["quality"] or {}
                if "blank_rate" in quality:
                    rows.append(_row(run, record) | {"slug": Path(path).stem})
    if not rows:
        raise AnalysisError(
            "no run has measured sets of generated digits: "
            "python jobs/launch.py generate --n 2000, or "
            "python jobs/launch.py train --plan results/mode_collapse/plan.toml"
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["preset", "seed", "slug"], ignore_index=True)


def add_recorded(table: pd.DataFrame, recorded: Sequence[Path]) -> pd.DataFrame:
    """``table`` and the sets that earlier studies wrote down, as far as they are no sets of it.

    Raises:
        AnalysisError: for a file that cannot be read or is none of :func:`sets_as_text`.
    """
    import pandas as pd

    parts = [table]
    for path in recorded:
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found = pd.DataFrame(rows)[list(table.columns)]
        except (OSError, ValueError, KeyError) as error:
            raise AnalysisError(f"{path} is no sets.jsonl of this study: {error}") from None
        parts.append(found.astype(table.dtypes))
    every = pd.concat(parts, ignore_index=True).drop_duplicates(["network", "slug"])
    return every.sort_values(["preset", "seed", "slug"], ignore_index=True)


def sets_as_text(table: pd.DataFrame) -> str:
    """A line of JSON a set: all that the study is computed from, for :func:`add_recorded`."""
    rows = table.sort_values(["network", "slug"]).to_dict("records")
    return "".join(json.dumps(_rounded(row), separators=(",", ":")) + "\n" for row in rows)


def factorial(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the designed experiment, of the study's own networks at their end.

    Further sets of the same networks would tip its balance; they are left out.
    """
    places = {factor: list(levels) for factor, levels in TRAINING.items()}

    def belongs(row: Mapping[Any, Any]) -> bool:
        flip, discrete, loss = (places[factor].index(row[factor]) for factor in TRAINING)
        wanted = levels_of(flip, discrete, loss, int(row["seed"]))
        return {factor: row[factor] for factor in SAMPLING} in wanted

    rows = table[of_the_study(table) & (table["step"] == 0)]
    mine: pd.DataFrame = rows[[belongs(row) for row in rows.to_dict("records")]]
    return mine if len(rows) else rows


def of_the_study(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of the designed experiment's networks: blur, at the T that most are of."""
    mine = table["preset"].str.startswith("collapse-") & (table["kind"] == "blur")
    return mine & (table["T"] == usual_T(table))


def usual_T(table: pd.DataFrame) -> int:
    """The T that most sets are of; others are there to compare it with."""
    return int(table["T"].mode().iloc[0])


def conditions(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over seeds of each condition, for ``summary.json``."""
    found = []
    for key, group in table.groupby([*CONDITION, "preset"], sort=True):
        values = dict(zip([*CONDITION, "preset"], key, strict=True))
        means = {name: round(float(group[name].mean()), 6) for name in MEASURES}
        spread = {
            f"{name}_range": [
                round(float(group[name].min()), 6),
                round(float(group[name].max()), 6),
            ]
            for name in ("tv_distance", "zero_ratio", "unreadable_rate")
        }
        found.append(
            {name: _plain(value) for name, value in values.items() if name != "training"}
            | means
            | spread
            | {
                "samples": int(group["samples"].sum()),
                "seeds": sorted({int(seed) for seed in group["seed"]}),
                "networks": sorted(set(group["network"])),
            }
        )
    return found


def _row(run: Mapping[Any, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    quality, settings = record["quality"], record["settings"]
    measures = {
        "zero_ratio": quality["ratios"][0],
        "tv_distance": quality["total_variation"],
    }
    measures |= {name: quality[name] for name in MEASURES if name not in measures}
    return {
        "network": run["colddiff_run_id"],
        "mlflow_run": run["run_id"],
        "git_sha": run["git_sha"],
        "preset": run["preset"],
        "seed": int(run["seed"]),
        "kind": run["params.degradation.kind"],
        "T": int(run["T"]),
        **{factor: training_level(factor, run) for factor in TRAINING},
        **{factor: sampling_level(factor, settings) for factor in SAMPLING},
        "step": int(settings.get("step", 0)),
        "training": json.dumps([run["params.model.dim"], run["params.training.steps"]]),
        **measures,
        "samples": int(quality["n"]),
        "quality": quality,
    }


def training_level(factor: str, run: Mapping[Any, Any]) -> str:
    """The level whose settings the run has; the reference has the others' settings at default."""
    levels = TRAINING[factor]
    for level, settings in levels.items():
        if settings and all(str(run[f"params.{k}"]) == str(v) for k, v in settings.items()):
            return level
    return next(iter(levels))


def sampling_level(factor: str, settings: Mapping[str, Any]) -> str:
    """The level of a sampling factor that a set's settings stand at, or :data:`OTHER`."""
    from colddiff.config import GenerationConfig

    defaults = dataclasses.asdict(GenerationConfig())
    levels = SAMPLING[factor]
    names = {name for change in levels.values() for name in change}
    has = {name: settings.get(name, defaults[name]) for name in names}
    if has.get("start") == "real":
        has["components"] = defaults["components"]  # which it does not use
    for level, change in levels.items():
        if all(_same(has[name], change.get(name, defaults[name])) for name in names):
            return level
    return OTHER


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float):
        return math.isclose(first, float(second), abs_tol=1e-12)
    return bool(first == second)


def _rounded(value: Any) -> Any:
    """JSON values with as many digits as anyone reads."""
    match value:
        case dict():
            return {name: _rounded(each) for name, each in value.items()}
        case list():
            return [_rounded(each) for each in value]
        case float():
            return float(f"{value:.6g}")
    return _plain(value)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
