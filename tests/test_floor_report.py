"""The information floor's table and figure from real MLflow runs, by numbers worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tracked_runs import EXPERIMENT, Store, error_line

from analysis.information_floor import STEPS, draw, main, points
from analysis.runs import select_runs
from colddiff.degradation import stored


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def log(store: Store, T: int, storage: str, rmse: float, seed: int = 0, **params: Any) -> None:
    store.log(
        f"floor-{T}-{storage}-{seed}",
        seed=seed,
        preset=f"floor-T{T}-{storage}",
        metrics={"degraded/rmse": 0.25, "direct/rmse": rmse, "direct/ssim": 0.5},
        params={"degradation.T": T, "degradation.storage": storage, "training.levels": "last"}
        | params,
    )


def made(store: Store) -> Path:
    out = Path(store.uri.removeprefix("sqlite:///")).parent / "out"
    options = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(out)]
    assert main(options) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "information_floor.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("storage", STEPS)
def test_steps_are_those_of_the_formats(storage: Any) -> None:
    """Values in [0.5, 1) of [0, 1], where digits' x_T lie on the [-1, 1] scale below 0."""
    x = torch.linspace(-1 + 2**-6, -0.5, 200_001, dtype=torch.float64)
    kept = stored(x.float() if storage == "float32" else x, storage).double().unique()
    largest = float(kept.diff().max()) / 2  # in units of [0, 1]
    assert largest <= max(STEPS[storage], 2 * float(x.diff().max())) * 1.01
    if storage != "float32":
        assert largest >= STEPS[storage] / 2.1


def test_means_over_seeds_in_order_of_fineness(store: Store) -> None:
    log(store, 20, "uint8", 0.25)
    log(store, 20, "float32", 0.1, seed=0)
    log(store, 20, "float32", 0.2, seed=1)
    log(store, 10, "uint8", 0.125)
    store.log("sampling", metrics={"direct/rmse": 0.9})  # no part of it
    out = made(store)
    found = [(row["T"], row["storage"], row["rmse"], row["seeds"]) for row in rows(out)]
    assert found == [
        ("10", "uint8", "0.125", "1"),
        ("20", "float32", "0.15", "2"),
        ("20", "uint8", "0.25", "1"),
    ]
    assert float(rows(out)[1]["std"]) == pytest.approx(0.1 / 2**0.5)
    text = (out / "information_floor.md").read_text()
    assert "| float32     |  20 | 6.0e-08 |       0.250 | 0.150 ± 0.071 | 0.500 |" in text
    assert "sampling: seed" not in text
    for form in ("png", "pdf"):
        assert (out / f"information_floor.{form}").stat().st_size > 1000
    picture = np.asarray(Image.open(out / "information_floor.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_the_figures_lines_are_the_tables_numbers(store: Store) -> None:
    for T, storage, rmse in ((20, "float32", 0.1), (20, "uint8", 0.3), (40, "uint8", 0.2)):
        log(store, T, storage, rmse)
    found = points(select_runs(EXPERIMENT, store.uri))
    axes = draw(found).axes[0]
    lines = {line.get_label(): line for line in axes.containers for line in [line]}
    data = {
        label: [list(map(float, values)) for values in line[0].get_data()]
        for label, line in lines.items()
    }
    assert data == {"T = 20": [[0.0, 4.0], [0.1, 0.3]], "T = 40": [[4.0], [0.2]]}
    assert [text.get_text().split("\n")[0] for text in axes.get_xticklabels()] == list(STEPS)


def test_mistakes_are_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--out", str(tmp_path / "o"), "--tracking-uri", store.uri, "--experiment", EXPERIMENT)
    store.log("sampling", metrics={"direct/rmse": 0.9})
    assert "--training.levels last" in error_line(main, capsys, *common)
    log(store, 20, "uint8", 0.1)
    log(store, 20, "uint8", 0.2, seed=1, **{"training.steps": 5})
    message = error_line(main, capsys, *common)
    assert "runs of T = 20 and uint8 differ in training.steps" in message
    assert not (tmp_path / "o").exists()
