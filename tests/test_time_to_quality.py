"""Minutes to a wanted RMSE, from curves whose times are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tracked_runs import EXPERIMENT, Store, error_line

from analysis.runs import select_runs
from analysis.time_to_quality import Curve, Validated, draw, main, minutes_until, read

BATCH = 120  # images a step: 60 images a second are 2 s a step


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def log(
    store: Store,
    seed: int,
    errors: dict[int, float],
    speeds: dict[int, float],
    preset: str = "ours",
    machine: str = "GPU",
) -> None:
    """A run that was validated and timed at those steps."""
    from mlflow.entities import Metric

    run_id = store.log(
        f"{preset}-{seed}",
        preset=preset,
        seed=seed,
        metrics={"direct/rmse": 0.1},
        params={"training.batch_size": BATCH // 2, "training.accumulation": 2},
        tags={"colddiff.machine": machine} if machine else {},
    )
    histories = {"validation/rmse": errors, "speed/images_per_second": speeds}
    records = [
        Metric(name, value, 1_000 + step, step)
        for name, values in histories.items()
        for step, value in values.items()
    ]
    store.client.log_batch(run_id, metrics=records)


def make(store: Store, tmp_path: Path, *options: str) -> tuple[int, Path]:
    out = tmp_path / "out"
    words = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(out), *options]
    return main(words), out


def table(folder: Path) -> list[list[str]]:
    lines = (folder / "time_to_quality.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return rows[2:]


def test_minutes_are_of_the_steps_at_their_own_speeds() -> None:
    speeds = {30: 60.0, 60: 120.0, 90: 30.0}  # 2, 1 and 4 s a step
    assert minutes_until(30, speeds, BATCH) == pytest.approx(30 * 2 / 60)
    assert minutes_until(45, speeds, BATCH) == pytest.approx((30 * 2 + 15 * 1) / 60)
    assert minutes_until(90, speeds, BATCH) == pytest.approx((60 + 30 + 120) / 60)


def test_table_says_when_each_run_was_good_enough(store: Store, tmp_path: Path) -> None:
    steady = {30 * n: 60.0 for n in (1, 2, 3)}  # a minute each
    log(store, 1, {30: 0.149, 60: 0.145, 90: 0.12}, {30: 30.0, 60: 60.0, 90: 60.0})
    log(store, 0, {30: 0.2, 60: 0.15, 90: 0.13}, steady)
    log(store, 0, {30: 0.3, 60: 0.25, 90: 0.2}, steady, preset="theirs", machine="")
    code, out = make(store, tmp_path)
    assert code == 0
    assert table(out) == [
        ["mnist, ours, T = 20", *"0 GPU 120 60 60 2.0 90 3.0".split(), "0.1300 at 90, 3 min"],
        ["mnist, ours, T = 20", *"1 GPU 120 45 30 2.0 90 4.0".split(), "0.1200 at 90, 4 min"],
        ["mnist, theirs, T = 20", "0", "", "120", "60", *["never", ""] * 2, "0.2000 at 90, 3 min"],
    ]


def test_validations_beyond_the_last_known_speed_have_no_time(store: Store, tmp_path: Path) -> None:
    log(store, 0, {30: 0.2, 60: 0.1}, {30: 60.0})
    log(store, 1, {}, {30: 60.0})  # never validated
    code, out = make(store, tmp_path)
    assert code == 0
    assert [row[1:] for row in table(out)] == [
        ["0", "GPU", "120", "60", *["never", ""] * 2, "0.2000 at 30, 1 min"]
    ]


def test_csv_and_figure_show_every_validation(store: Store, tmp_path: Path) -> None:
    log(store, 0, {30: 0.2, 60: 0.15}, {30: 60.0, 60: 60.0})
    code, out = make(store, tmp_path)
    assert code == 0
    with (out / "time_to_quality.csv").open(newline="") as file:
        rows = [(row["step"], float(row["minutes"]), row["rmse"]) for row in csv.DictReader(file)]
    assert rows == [("30", 1.0, "0.2"), ("60", 2.0, "0.15")]
    figure = draw(read(select_runs(EXPERIMENT, store.uri), store.uri), [0.15])
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([1, 2])
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.15])


def test_every_recipe_has_a_line_of_its_own_look() -> None:
    names = [f"recipe {i}" for i in range(13) for _ in (0, 1)]  # two seeds each
    points = (Validated(1, 1.0, 0.2), Validated(2, 2.0, 0.1))
    curves = [Curve(name, name, i % 2, 64, "", points) for i, name in enumerate(names)]
    lines = draw(curves, []).axes[0].lines
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == 13
    assert looks[::2] == looks[1::2]


def test_runs_without_times_and_odd_thresholds_are_mistakes(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.log("untimed", metrics={"direct/rmse": 0.1})
    words = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(tmp_path)]
    assert "no run has times of validations" in error_line(main, capsys, *words)
    assert "above 0" in error_line(main, capsys, *words, "--rmse", "0")
