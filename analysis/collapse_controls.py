"""Networks beside the design: other T, the student's setting, hot diffusion, the preset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.collapse_design import SAMPLING, TRAINING
from analysis.collapse_page import shown
from analysis.collapse_table import MEASURES
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
    typical = table["T"].mode().iloc[0]
    study = last["preset"].str.startswith("collapse-") & (last["kind"] == "blur")
    study &= last["T"] == typical
    others, plain = last[~study], last[study]
    for factor, levels in TRAINING.items():
        plain = plain[plain[factor] == next(iter(levels))]
    wanted = {_levels(row) for row in others[others["kind"] == "blur"].to_dict("records")}
    plain = plain[[_levels(row) in wanted for row in plain.to_dict("records")]]
    found: dict[Control, list[Any]] = {}
    for part in (plain, others.sort_values(["kind", "preset", "T"])):
        for index, row in zip(part.index, part.to_dict("records"), strict=True):
            place = (f"{str(row['preset']).removeprefix('collapse-')}, T = {row['T']}", _way(row))
            found.setdefault(place, []).append(index)
    return {place: table.loc[rows] for place, rows in found.items()}


def _levels(row: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(row[factor]) for factor in SAMPLING)


def _way(row: Mapping[Any, Any]) -> str:
    raw = ", raw weights" * (row["weights"] == "raw")
    if row["kind"] == "noise":  # whose samplers are no levels of the design
        names = "|".join(name for _, name in SAMPLERS)
        match = re.search(rf"-({names})-", row["slug"])
        return SAMPLERS["noise", match[1]] + raw if match else str(row["slug"])
    return (
        f"Algorithm {row['algorithm']}, {row['levels']}; x_T: {row['start']}; "
        f"noise {row['noise']}{raw}"
    )


def control_table(found: Mapping[Control, pd.DataFrame]) -> str:
    """Means over seeds."""
    rows = [
        [network, way, str(sets["network"].nunique())]
        + [shown(measure, float(sets[measure].mean())) for measure in MEASURES]
        for (network, way), sets in found.items()
    ]
    return markdown_table(["network", "sampler", "seeds", *MEASURES.values()], rows, words=2)
