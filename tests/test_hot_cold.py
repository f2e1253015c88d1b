"""Hot beside cold from real MLflow runs: what was restored, what was generated."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked_runs import EXPERIMENT, Store, error_line

from analysis.hot_cold import draw, main, read
from analysis.pictures import image_rows
from analysis.runs import select_runs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def log(
    store: Store, folder: Path, name: str, kind: str, errors: list[float], seed: int = 0
) -> str:
    """A run of T = 4 whose level t was restored from 0.1 t to ``errors[t - 1]``."""
    mlflow_id = store.log(
        f"{name}-{seed}",
        preset=name,
        seed=seed,
        metrics={"direct/rmse": 0.1},
        params={"degradation.kind": kind, "degradation.T": 4},
    )
    levels = [
        {"t": t, "degraded_rmse": 0.1 * t, "rmse": error, "ssim": 1 - error}
        for t, error in enumerate(errors, start=1)
    ]
    path = folder / "evaluation.json"
    path.write_text(json.dumps({"samples": 9, "split": "test", "by_level": levels}))
    store.add_file(mlflow_id, path)
    return mlflow_id


def generated(
    store: Store,
    folder: Path,
    mlflow_id: str,
    fid: float = 12.345,
    seconds: float = 5.0,
    pictured: int = 0,
    **settings: Any,
) -> None:
    values = {"n": 1000, "start": "means", "components": 1, "symmetry_noise": 0.002}
    values |= {"algorithm": "algorithm2", "levels": ""} | settings
    counts = [370, *([70] * 9)]
    quality = {"fid_digits": fid, "counts": counts, "total_variation": 0.271}
    quality |= {"blank_rate": 0.002, "unreadable_rate": 0.5}
    record = {"settings": values, "network_calls": 4}
    record |= {"sampling_seconds": seconds, "quality": quality}
    path = folder / f"generated-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(record))
    store.add_file(mlflow_id, path, "samples")
    if pictured:
        images = np.full((20, 4, 4, 1), pictured, np.uint8)
        np.savez(path.with_suffix(".npz"), images=images)
        store.add_file(mlflow_id, path.with_suffix(".npz"), "samples")


def made(store: Store, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    options = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(out)]
    assert main(options) == 0
    return out


def table(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines][2:]


def test_restoration_and_generation(store: Store, tmp_path: Path) -> None:
    cold = log(store, tmp_path, "mnist", "blur", [0.01, 0.02, 0.03, 0.04])
    hot = log(store, tmp_path, "mnist-hot", "noise", [0.05, 0.1, 0.2, 0.4])
    other = log(store, tmp_path, "mnist", "blur", [0.03, 0.04, 0.05, 0.06], seed=1)
    generated(store, tmp_path, cold)
    generated(store, tmp_path, other, fid=8.345, seconds=3.0)
    generated(store, tmp_path, cold, start="terminals", components=50)
    generated(store, tmp_path, cold, start="real", levels="4-2-0")
    generated(store, tmp_path, hot, algorithm="ddpm")
    out = made(store, tmp_path)
    text = (out / "hot_cold.md").read_text()
    first, second = "cold: mnist, T = 4", "hot: mnist-hot, T = 4"
    assert table(text, "Restoration") == [
        [first, "1 of 4", "2", "0.100", "0.020", "0.980"],
        [first, "2 of 4", "2", "0.200", "0.030", "0.970"],
        [first, "3 of 4", "2", "0.300", "0.040", "0.960"],
        [first, "4 of 4", "2", "0.400", "0.050", "0.950"],
        [second, "1 of 4", "1", "0.100", "0.050", "0.950"],
        [second, "2 of 4", "1", "0.200", "0.100", "0.900"],
        [second, "3 of 4", "1", "0.300", "0.200", "0.800"],
        [second, "4 of 4", "1", "0.400", "0.400", "0.600"],
    ]
    numbers = ["1,000", "4", "12.35", "0.271", "37.0%", "0.2%", "50.0%", "5.0"]
    twice = ["1,000", "4", "10.35", "0.271", "37.0%", "0.2%", "50.0%", "4.0"]
    start = "Algorithm 2, from"
    assert table(text, "Generation") == [
        [first, f"{start} a model of x_T, 50 components, noise 0.002", "1", *numbers],
        [first, f"{start} means, 1 component, noise 0.002", "2", *twice],
        [first, f"{start} x_T of training images, noise 0.002, levels 4-2-0", "1", *numbers],
        [second, "fresh noise (DDPM)", "1", *numbers],
    ]
    with (out / "hot_cold.csv").open(newline="") as file:
        found = [(row["kind"], row["t"], row["rmse"]) for row in csv.DictReader(file)]
    assert found[7:9] == [("blur", "4", "0.06"), ("noise", "1", "0.05")]
    assert "mnist-hot-0: seed 0" in text.split("\n---\n")[1]
    assert (out / "hot_cold.pdf").stat().st_size > 1000


def test_the_figures_lines_are_the_runs_numbers(store: Store, tmp_path: Path) -> None:
    log(store, tmp_path, "mnist", "blur", [0.01, 0.02, 0.03, 0.04])
    runs, _ = read(select_runs(EXPERIMENT, store.uri), store.uri)
    left, right = draw(runs).axes
    assert left.lines[0].get_xdata().tolist() == [0.25, 0.5, 0.75, 1.0]  # type: ignore[union-attr]
    for axes in (left, right):
        assert list(axes.lines[0].get_ydata()) == [0.01, 0.02, 0.03, 0.04]
    assert list(right.lines[0].get_xdata()) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_images_stand_beside_their_sampler(store: Store, tmp_path: Path) -> None:
    cold = log(store, tmp_path, "mnist", "blur", [0.01, 0.02, 0.03, 0.04])
    generated(store, tmp_path, cold, pictured=7)
    generated(store, tmp_path, cold, start="real", pictured=9)
    generated(store, tmp_path, cold, start="terminals")  # whose images MLflow does not have
    _, sets = read(select_runs(EXPERIMENT, store.uri), store.uri)
    rows = {each.sampler: each.images for each in sets}
    axes = image_rows(rows).axes
    shown = {ax.texts[0].get_text().replace("\n", " "): ax.images[0].get_array() for ax in axes}
    assert {name: set(np.unique(pixels)) for name, pixels in shown.items()} == {
        "Algorithm 2, from means, 1 component, noise 0.002": {7},
        "Algorithm 2, from x_T of training images, noise 0.002": {9},
    }
    out = made(store, tmp_path)
    assert "(generated.png)" in (out / "hot_cold.md").read_text()
    assert (out / "generated.png").stat().st_size > 1000


def test_nothing_to_compare_is_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(store, tmp_path, "mnist", "blur", [])
    options = (
        "--experiment",
        EXPERIMENT,
        "--tracking-uri",
        store.uri,
        "--out",
        str(tmp_path / "o"),
    )
    message = error_line(main, capsys, *options)
    assert "--evaluation.by-level 2000" in message
    assert "generate --n 2000" in message
