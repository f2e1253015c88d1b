"""Minutes to a wanted RMSE, from curves whose times are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tracked_runs import EXPERIMENT, Store, error_line

from analysis.runs import select_runs
from analysis.time_to_quality import draw, main, minutes_until, read

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
) -> None:
    """A run that was validated and timed at those steps."""
    from mlflow.entities import Metric

    run_id = store.log(
        f"{preset}-{seed}",
        preset=preset,
        seed=seed,
        metrics={"direct/rmse": 0.1},
        params={"training.batch_size": BATCH // 2, "training.accumulation": 2},
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


def test_table_has_means_over_seeds_and_how_far_a_recipe_went_without(
    store: Store, tmp_path: Path
) -> None:
    steady = {30 * n: 60.0 for n in (1, 2, 3)}  # a minute each
    log(store, 0, {30: 0.2, 60: 0.15, 90: 0.13}, steady)
    log(store, 1, {30: 0.149, 60: 0.145, 90: 0.12}, {30: 30.0, 60: 60.0, 90: 60.0})
    log(store, 0, {30: 0.3, 60: 0.25, 90: 0.2}, steady, preset="theirs")
    code, out = make(store, tmp_path)
    assert code == 0
    ours, theirs = table(out)
    # Seed 0 after steps 60 and 90, minutes 2 and 3; seed 1 after 30 and 90, minutes 2 and 4.
    expected = ["2", "120", "52", "45", "2.0", "90", "3.5", "0.1250 at 90"]
    assert ours == ["ours, T = 20", *expected]
    nowhere = ["not in 90", "not in 3"]
    assert theirs == ["theirs, T = 20", "1", "120", "60", *nowhere, *nowhere, "0.2000 at 90"]


def test_a_recipe_that_only_some_seeds_get_there_with_is_said_to(
    store: Store, tmp_path: Path
) -> None:
    speeds = {30: 60.0}
    log(store, 0, {30: 0.1}, speeds)
    log(store, 1, {30: 0.2}, speeds)
    code, out = make(store, tmp_path, "--rmse", "0.15")
    assert code == 0
    assert table(out)[0][4:6] == ["not in 30 (1 of 2 did)", "not in 1 (1 of 2 did)"]


def test_a_step_that_was_done_again_counts_as_it_was_the_second_time(
    store: Store, tmp_path: Path
) -> None:
    from mlflow.entities import Metric

    log(store, 0, {30: 0.2}, {30: 60.0})
    run = store.client.search_runs([store.experiment_id])[0]
    store.client.log_metric(run.info.run_id, "validation/rmse", 0.11, 9_000, 30)
    store.client.log_batch(
        run.info.run_id, metrics=[Metric("speed/images_per_second", 30.0, 9_000, 30)]
    )
    curve = read(select_runs(EXPERIMENT, store.uri), store.uri)[0]
    assert [(p.step, p.rmse) for p in curve.points] == [(30, 0.11)]
    assert curve.points[0].minutes == pytest.approx(2)


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


def test_runs_without_times_and_odd_thresholds_are_mistakes(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.log("untimed", metrics={"direct/rmse": 0.1})
    words = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(tmp_path)]
    assert "untimed has no time to its validations" in error_line(main, capsys, *words)
    assert "above 0" in error_line(main, capsys, *words, "--rmse", "0")
