"""Networks beside the design: other T, the student's setting, hot diffusion, the preset."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.collapse_design import SAMPLING, TRAINING
from analysis.collapse_page import shown
from analysis.collapse_table import MEASURES, OTHER, of_the_study
from analysis.hot_cold import SAMPLERS
from analysis.report import markdown_table

if TYPE_CHECKING:
    import pandas as pd

Control = tuple[str, str]
"""A network and a way to sample, as the page names them."""


def controls(table: pd.DataFrame) -> dict[Control, pd.DataFrame]:
    """Sets of networks that are none of the design's, at their end, by network and sampler.

    Before them stand those of the design's plain network that were sampled as one of them was.
    """
    last = table[table["step"] == 0]
    study = of_the_study(last)
    others, plain = last[~study], last[study]
    for factor, levels in TRAINING.items():
        plain = plain[plain[factor] == next(iter(levels))]
    wanted = {_levels(row) for row in others[others["kind"] == "blur"].to_dict("records")}
    plain = plain[[_levels(row) in wanted for row in plain.to_dict("records")]]
    found: dict[Control, list[Any]] = {}
    for part in (plain, others.sort_values(["kind", "preset", "T"], kind="stable")):
        for index, row in zip(part.index, part.to_dict("records"), strict=True):
            found.setdefault((_network(row), _way(row)), []).append(index)
    return {place: table.loc[rows] for place, rows in found.items()}


def _network(row: Mapping[Any, Any]) -> str:
    dim, steps = json.loads(row["training"])
    name = str(row["preset"]).removeprefix("collapse-")
    return f"{name}: T = {row['T']}, dim {dim}, {int(steps):,} steps"


def _levels(row: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(row[factor]) for factor in SAMPLING)


def _way(row: Mapping[Any, Any]) -> str:
    if row["kind"] == "noise":
        name = re.search(rf"-({'|'.join(name for _, name in SAMPLERS)})-", row["slug"])
        parts = [SAMPLERS["noise", name[1]], row["levels"]] if name else [row["slug"]]
    else:
        levels = f"Algorithm {row['algorithm']}, {row['levels']}"
        parts = [levels, f"x_T: {row['start']}", f"noise {row['noise']}"]
    if OTHER in (row[factor] for factor in SAMPLING if row["kind"] == "blur"):
        parts.append(row["slug"])  # which tells apart what is no level of the design
    return "; ".join([*parts, *(["raw weights"] * (row["weights"] == "raw"))])


def control_table(found: Mapping[Control, pd.DataFrame]) -> str:
    """Means over seeds."""
    rows = [
        [network, way, str(sets["network"].nunique())]
        + [shown(measure, float(sets[measure].mean())) for measure in MEASURES]
        for (network, way), sets in found.items()
    ]
    header = ["network", "sampler", "networks", *MEASURES.values()]
    return markdown_table(header, rows, words=2)
