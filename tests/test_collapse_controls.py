"""Which sets stand beside the design, and what they are called."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.collapse_controls import control_table, controls
from analysis.collapse_table import MEASURES

PAPER = {"start": "mean, 1", "noise": "0.002", "algorithm": "2", "levels": "all"}
NAIVE = PAPER | {"algorithm": "1"}
PLAIN = "collapse-no_flip-no_discrete-l1"


def row(preset: str, zeros: float, **change: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"preset": preset, "kind": "blur", "T": 20, "step": 0, "seed": 0}
    values |= {"flip": "no", "discrete": "no", "loss": "l1", "weights": "average", "slug": "x"}
    values |= PAPER | dict.fromkeys(MEASURES, 0.0) | {"zero_ratio": zeros} | change
    return values | {"network": f"{preset}-{values['T']}-{values['seed']}"}


def test_other_networks_stand_beside_the_plain_one_sampled_likewise() -> None:
    noise = {"kind": "noise", "start": "mean, 1", "algorithm": "other"}
    table = pd.DataFrame(
        [
            row(PLAIN, 1.0),
            row(PLAIN, 3.0, seed=1),
            row(PLAIN, 9.0, step=500),
            row(PLAIN, 9.0, **NAIVE, weights="raw"),  # nobody else is sampled so
            row("collapse-flip-no_discrete-l1", 9.0, flip="yes"),
            row("collapse-T40", 4.0, T=40),
            row("collapse-T40", 5.0, T=40, **NAIVE),
            row("collapse-T40", 9.0, T=40, step=250),
            row("mnist-student-small", 6.0, flip="yes", discrete="yes"),
            row("collapse-hot", 7.0, **noise, slug="generated-means1-noise0.002-ddpm-seed0-n9"),
        ]
    )
    found = controls(table)
    way = "Algorithm {}, all; x_T: mean, 1; noise 0.002"
    assert {place: list(sets["zero_ratio"]) for place, sets in found.items()} == {
        ("no_flip-no_discrete-l1, T = 20", way.format(2)): [1.0, 3.0],
        ("T40, T = 40", way.format(2)): [4.0],
        ("T40, T = 40", way.format(1)): [5.0],
        ("mnist-student-small, T = 20", way.format(2)): [6.0],
        ("hot, T = 20", "fresh noise (DDPM)"): [7.0],
    }
    first = control_table(found).splitlines()[2]
    cells = [cell.strip() for cell in first.split("|")[1:5]]
    assert cells == ["no_flip-no_discrete-l1, T = 20", way.format(2), "2", "2.00"]


def test_a_study_without_them_has_none() -> None:
    assert controls(pd.DataFrame([row(PLAIN, 1.0), row(PLAIN, 2.0, seed=1)])) == {}
