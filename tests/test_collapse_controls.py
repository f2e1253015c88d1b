"""Which sets stand beside the design, and what they are called."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.collapse_controls import control_table, controls
from analysis.collapse_table import MEASURES

PAPER = {"start": "mean, 1", "noise": "0.002", "algorithm": "2", "levels": "all"}
NAIVE = PAPER | {"algorithm": "1"}
SHORT = "no_flip-no_discrete-l1"
PLAIN = f"collapse-{SHORT}"


def row(preset: str, zeros: float, **change: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"preset": preset, "kind": "blur", "T": 20, "step": 0, "seed": 0}
    values |= {"training": '["16", "1500"]'}
    values |= {"flip": "no", "discrete": "no", "loss": "l1", "weights": "average", "slug": "x"}
    values |= PAPER | dict.fromkeys(MEASURES, 0.0) | {"zero_ratio": zeros} | change
    return values | {"network": f"{preset}-{values['T']}-{values['seed']}"}


def test_other_networks_stand_beside_the_plain_one_sampled_likewise() -> None:
    noise = {"kind": "noise", "algorithm": "other"}
    table = pd.DataFrame(
        [
            row("mnist-student-small", 6.0, flip="yes", training='["16", "10000"]'),
            row("collapse-hot", 7.0, **noise, slug="generated-means1-noise0.002-ddpm-seed0-n9"),
            row("collapse-hot", 8.0, **noise, slug="made by hand", weights="raw"),
            row("collapse-T40", 4.0, T=40),
            row("collapse-T40", 5.0, T=40, **NAIVE),
            row("collapse-T40", 2.0, T=40, start="other", slug="means 3"),
            row("collapse-T40", 9.0, T=40, step=250),
            row("collapse-flip-no_discrete-l1", 9.0, flip="yes"),
            row(PLAIN, 1.0),
            row(PLAIN, 3.0, seed=1),
            row(PLAIN, 9.0, step=500),
            row(PLAIN, 9.0, **NAIVE, weights="raw"),  # nobody else is sampled so
            row(PLAIN, 9.0, noise="0"),
        ]
    )
    found = controls(table)
    way = "Algorithm {}, all; x_T: mean, 1; noise 0.002"
    plain, T40 = (f"{name}, dim 16, 1,500 steps" for name in (f"{SHORT}: T = 20", "T40: T = 40"))
    assert [(*place, list(sets["zero_ratio"])) for place, sets in found.items()] == [
        (plain, way.format(2), [1.0, 3.0]),
        (T40, way.format(2), [4.0]),
        (T40, way.format(1), [5.0]),
        (T40, "Algorithm 2, all; x_T: other; noise 0.002; means 3", [2.0]),
        ("mnist-student-small: T = 20, dim 16, 10,000 steps", way.format(2), [6.0]),
        ("hot: T = 20, dim 16, 1,500 steps", "fresh noise (DDPM); all", [7.0]),
        ("hot: T = 20, dim 16, 1,500 steps", "made by hand; raw weights", [8.0]),
    ]
    first = control_table(found).splitlines()[2]
    cells = [cell.strip() for cell in first.split("|")[1:5]]
    assert cells == [plain, way.format(2), "2", "2.00"]


def test_a_study_without_them_has_none() -> None:
    assert controls(pd.DataFrame([row(PLAIN, 1.0), row(PLAIN, 2.0, seed=1)])) == {}
