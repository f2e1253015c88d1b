"""The report on real studies in a real MLflow store, against Optuna's own account of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.axes import Axes
from optuna import Study
from PIL import Image
from tiny import replaced, tiny
from tracked_runs import EXPERIMENT, Store, error_line
from tracked_studies import (
    begin,
    hill,
    quality_and_calls,
    run_trials,
    small_config,
    valley,
    values,
)

from analysis.studies import Objective, Trial, read_study
from analysis.studies import Study as Recorded
from analysis.sweep_axes import Scale, limits, varying
from analysis.sweep_figures import figures, history, pareto, slices
from analysis.sweep_page import answer
from analysis.sweep_report import main
from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from jobs.launch import base_config
from sweeps.record import parent_run, record_all, record_study
from sweeps.study import StudyConfig
from sweeps.terminal import linear_rmse


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    monkeypatch.setattr("sweeps.overview.draw", lambda record: Figure())


@pytest.fixture
def fewer_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.sweep_figures.figures", lambda study: {})


def report(store: Store, out: Path, *options: str) -> tuple[str, dict[str, Any]]:
    arguments = ["--experiment", EXPERIMENT, "--study", "small", "--out", str(out)]
    assert main([*arguments, "--tracking-uri", store.uri, *options]) == 0
    return (out / "report.md").read_text(), json.loads((out / "summary.json").read_text())


def recorded(store: Store, study: Study, config: StudyConfig, folder: Path) -> Recorded:
    """The study as the report reads it, without the runs of its trials."""
    record_study(study, config, store.uri, parent_run(config, store.uri, EXPERIMENT))
    return read_study(EXPERIMENT, config.name, store.uri, folder / "artifacts")


def levels_of(params: dict[str, Any]) -> str:
    """Of the tiny base, whose T is 4."""
    calls, exponent = params["calls"], params["exponent"]
    found = {round(4 * (1 - k / calls) ** exponent) for k in range(calls + 1)}
    return "-".join(str(level) for level in sorted(found, reverse=True))


def one_line(page: str) -> str:
    return " ".join(page.split())


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows below a heading."""
    lines = page.split(f"## {heading}\n")[1].strip().splitlines()
    rows = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]]]


@pytest.mark.usefixtures("fewer_figures")
def test_numbers_are_the_study_s(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=14)
    study = run_trials(config, valley, 14, pruned={3}, failed={5})
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "out")

    best, reference = study.best_trial, study.trials[0]
    gain = 1 - best.value / reference.value
    expected = {
        "trial": best.number,
        "run": best.user_attrs["run"],
        "values": {"rmse": best.value},
        "params": best.params,
        "adjusted": {},
        "levels": "all",
    }
    assert {key: summary["best"][key] for key in expected} == expected
    assert summary["reference"]["values"] == {"rmse": reference.value}
    assert summary["gain"] == {"rmse": pytest.approx(gain)}
    counts = [summary[key] for key in ("wanted", "finished", "pruned", "failed")]
    assert counts == [14, 13, 1, 1]
    said = (
        f"**The best trial is trial {best.number} with sampled RMSE (validation) {best.value:.4g}: "
        f"{gain:.1%} better in sampled RMSE (validation) than the reference, trial 0 with sampled "
        f"RMSE (validation) {reference.value:.4g}.**"
    )
    assert said in one_line(page)
    assert page.index(said[:30]) < page.index("## ")
    assert "13 trials finished (of 14 wanted: it is not over), 1 of them pruned, 1 of 14" in page

    header, *rows = table(page, "The best 10")
    assert header == ["trial", "run", "sampled RMSE (validation)", "better by", *best.params]
    ranked = sorted((v, n) for n, v in enumerate(values(study)) if v is not None)
    names = [row[0].removesuffix(" (reference)") for row in rows]
    assert [int(name) for name in names[:10]] == [number for _, number in ranked[:10]]
    assert sum("(reference)" in row[0] for row in rows) == 1
    for row in rows:
        trial = study.trials[int(row[0].removesuffix(" (reference)"))]
        assert row[1] == f"`{trial.user_attrs['run']}`"
        assert row[2] == f"{trial.value:.5g}"
        assert row[4] == f"{trial.params['lr']:.4g}"
    assert rows[0][3] == f"{gain:+.1%}"


def test_files(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 6)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    page, _ = report(store, tmp_path / "out")
    names = ("history", "importances", "slices", "parallel")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = {f"{name}.{form}" for name in names for form in ("png", "pdf")}
    assert files == {"report.md", "summary.json", "best.json", *drawn}
    for name in names:
        assert f"![{name}]({name}.png)" in page
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert study.best_trial.user_attrs["run"] in picture.info["Description"]
            assert np.asarray(picture.convert("L")).min() < 64
    best = tmp_path / "out" / "best.json"
    config_again, _ = base_config(["--config", str(best)])
    assert config_again.run_id == study.best_trial.user_attrs["run"]
    assert f"python jobs/launch.py train --config {best} --seeds 0 1 2" in page
    assert f"MLflow run {parent}" in page
    footer = page.split("\n---\n")[1]
    assert "Experiment study at sqlite:///mlflow.db; " in footer
    assert f"- {study.best_trial.user_attrs['run']}: seed 0, commit aaaaaaaaaaaa" in footer


@pytest.mark.usefixtures("fewer_figures")
def test_value_that_is_maximised(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, metric="ssim", trials=8)
    study = run_trials(config, hill, 8)
    record_all(study, config, store.uri, EXPERIMENT)
    _, summary = report(store, tmp_path / "out")
    assert summary["best"]["trial"] == study.best_trial.number
    assert summary["best"]["values"]["ssim"] == max(values(study))  # type: ignore[type-var]
    gain = study.best_trial.value / study.trials[0].value - 1
    assert summary["gain"]["ssim"] == pytest.approx(gain) != 0


def test_reference_that_is_best(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, lambda p: (abs(p["lr"] - 1e-3),), 5)
    study_there = recorded(store, study, config, tmp_path)
    assert study_there.best.number == 0
    assert answer(study_there).startswith("No trial is better than the reference: that is trial 0")


@pytest.mark.usefixtures("fewer_figures")
def test_reference_without_a_value(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 5, pruned={0})
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "out")
    assert "The reference, trial 0, is pruned." in one_line(page)
    assert (summary["reference"], summary["gain"]) == (None, None)
    assert summary["best"]["trial"] == study.best_trial.number


@pytest.mark.usefixtures("fewer_figures")
def test_one_trial(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    record_all(run_trials(config, valley, 1), config, store.uri, EXPERIMENT)
    page, _ = report(store, tmp_path / "out")
    assert len(table(page, "All trials")) == 2


def test_figures_of_one_trial(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = recorded(store, run_trials(config, valley, 1), config, tmp_path)
    assert list(figures(study)) == ["history"]


def told(number: int, worth: float, *, more: bool = False) -> Trial:
    left = 0.15 if more else 0.2
    return Trial(number, "complete", f"run-{number}", {"T": 4}, {}, "", (worth,), left, more)


def test_the_best_one_leaves_no_more_than_the_reference() -> None:
    trials = (told(0, 0.4), told(1, 0.1, more=True), told(2, 0.3), told(3, 0.2, more=True))
    study = Recorded(
        name="s",
        run_id="",
        settings={},
        wanted=4,
        objectives=(Objective("rmse", "RMSE", "minimize"),),
        parameters={},
        trials=trials,
        reference_number=0,
        front=(2,),
        importances={},
        runs=pd.DataFrame(),
    )
    text = answer(study)
    assert text.startswith("The best trial is trial 2 with RMSE 0.3: 25.0% better")
    assert "Trial 1 with RMSE 0.1 is better still, but has been given more" in text
    assert "to RMSE 0.150, from the reference's to 0.200" in text
    fair = dataclasses.replace(study, trials=(trials[0], trials[2], told(2, 0.5, more=True)))
    assert fair.better_but_leaving_more is None
    assert "given more" not in answer(fair)


@pytest.mark.usefixtures("fewer_figures")
def test_what_the_schedules_leave_is_shown(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, space="steps", trials=6, sampler="grid")
    study = run_trials(config, lambda params: (50.0 - params["T"],), 6)
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "out")
    own = linear_rmse(config.base.degradation, config.base.data)
    found = {}
    first = {trial.user_attrs["run"]: trial.number for trial in reversed(study.trials)}
    for name, number in first.items():  # a configuration is listed once
        run = RunFolder(tmp_path / "runs" / name)
        found[number] = linear_rmse(run.config.degradation, run.config.data)
    allowed = {number for number, left in found.items() if left >= own * 0.995}
    assert 1 < len(allowed) < len(found)
    best = min(allowed, key=lambda number: study.trials[number].values[0])
    better = {n for n in found if study.trials[n].values[0] < study.trials[best].values[0]}
    for heading, expected, star in (
        (f"The best {len(allowed)}", allowed, ""),
        ("Better, but given more of the images", better | {0}, " *"),
    ):
        header, *rows = table(page, heading)
        assert header[-1] == "linear RMSE at T"
        texts = {int(row[0].removesuffix(" (reference)")): row[-1] for row in rows}
        assert texts == {n: f"{found[n]:.4f}{star if n else ''}" for n in expected}
    assert summary["reference"]["linear_rmse"] == pytest.approx(own)
    assert summary["best"]["trial"] == best == study.best_trial.number


@pytest.mark.usefixtures("fewer_figures")
def test_a_configuration_is_listed_once(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, sampler="random")
    study = run_trials(config, valley, 2)
    study.enqueue_trial(study.best_params)
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, valley(trial.params)[0])
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "out")
    assert len(table(page, "All trials")) == 3
    assert summary["best"]["trial"] == min(
        n for n in (0, 1) if values(study)[n] == study.best_value
    )


@pytest.mark.usefixtures("fewer_figures")
def test_what_a_run_could_not_keep_is_shown(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    trial = study.ask()
    begin(trial, config)
    trial.set_user_attr("adjusted", {"dim": 77})
    study.tell(trial.number, 0.01)
    there = recorded(store, study, config, tmp_path)
    assert there.best.used == {**trial.params, "dim": 77}
    page, summary = report(store, tmp_path / "out")
    header, first, *_ = table(page, "All trials")
    assert first[header.index("dim")] == f"{trial.params['dim']} → 77"
    assert "since no schedule with a" in page
    assert summary["best"]["adjusted"] == {"dim": 77}


@pytest.mark.usefixtures("fewer_figures")
def test_other_seeds_of_the_best_and_the_reference(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 5)
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "first")
    assert [run["seed"] for run in summary["best"]["seeds"]] == [0]
    assert "## Runs of these configurations" not in page

    def evaluated(trial: optuna.trial.FrozenTrial, seed: int, rmse: float) -> None:
        path = Path(config.runs) / trial.user_attrs["run"] / "config.json"
        own = replaced(RunConfig.from_json(path.read_text()), "training", seed=seed)
        store.log(own.run_id, metrics={"sampled/rmse": rmse}, params=own.flat())

    for seed, rmse in ((1, 0.2), (2, 0.3)):
        evaluated(study.best_trial, seed, rmse)
        evaluated(study.trials[0], seed, 2 * rmse)
    store.log("other", metrics={"sampled/rmse": 9.0}, seed=1)
    page, summary = report(store, tmp_path / "second")
    seeds = summary["best"]["seeds"]
    assert [(run["seed"], run.get("eval/sampled/rmse")) for run in seeds] == [
        (0, None),
        (1, 0.2),
        (2, 0.3),
    ]
    assert seeds[0]["objective/rmse"] == study.best_value
    header, *rows = table(page, "Runs of these configurations")
    column = header.index("eval/sampled/rmse")
    cells = {(row[0], row[1]): row[column] for row in rows}
    spread = statistics.stdev([0.2, 0.3])
    assert cells["best", "mean ± std (n)"] == f"0.25 ± {spread:.2g} (2)"
    assert cells["reference", "mean ± std (n)"] == f"0.5 ± {2 * spread:.2g} (2)"
    chosen = [row for row in rows if row[1] == "mean ± std (n)"][0]
    assert chosen[header.index("objective/rmse")] == ""  # of one value, picked for being good
    assert cells["best", "0"] == ""


@pytest.mark.usefixtures("fewer_figures")
def test_direct_restoration_has_its_own_numbers_and_says_what_was_kept(
    store: Store, tmp_path: Path
) -> None:
    """Also where the base has a list of levels."""
    base = replaced(tiny(), "evaluation", levels=("4-2-0",))
    config = small_config(tmp_path, base=base, objective="direct", keep=("dim",))
    study = run_trials(config, lambda params: (params["lr"],), 3)
    record_all(study, config, store.uri, EXPERIMENT)
    own = replaced(base, "training", seed=1)
    metrics = {"sampled_4-2-0/rmse": 0.3, "direct/rmse": 0.2, "sampled/rmse": 0.4}
    store.log(own.run_id, metrics=metrics, params=own.flat(), start=2_000_000_000_000)
    page, summary = report(store, tmp_path / "out")
    assert summary["best"]["levels"] == summary["reference"]["levels"] == "none"
    first, second = summary["reference"]["seeds"]
    assert first == {"run": base.run_id, "seed": 0, "objective/direct_rmse": study.trials[0].value}
    assert second == {"run": own.run_id, "seed": 1, "eval/direct/rmse": 0.2}
    assert "Space recipe but dim around preset" in page


@pytest.mark.usefixtures("fewer_figures")
def test_levels_are_evaluated_by_their_own_list(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, space="levels")
    study = run_trials(config, lambda p: (abs(p["calls"] - 2) + abs(p["exponent"] - 1),), 6)
    study.enqueue_trial({"calls": 2, "exponent": 1.0})
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, 0.0)
    run = {"eval/sampled/rmse": 0.4, "eval/sampled_4-2-0/rmse": 0.3}
    metrics = {key.removeprefix("eval/"): value for key, value in run.items()}
    record_all(study, config, store.uri, EXPERIMENT)
    store.log(
        config.base.run_id, metrics=metrics, params=config.base.flat(), start=2_000_000_000_000
    )
    page, summary = report(store, tmp_path / "out")
    assert RunConfig.from_json((tmp_path / "out" / "best.json").read_text()).evaluation.levels == (
        "4-2-0",
    )
    told = {name: summary[name]["seeds"] for name in ("best", "reference")}
    name = config.base.run_id
    assert told["best"] == [{"run": name, "seed": 0, "eval/sampled_4-2-0/rmse": 0.3}]
    assert told["reference"] == [{"run": name, "seed": 0, "eval/sampled/rmse": 0.4}]
    visited = [levels_of(trial.params) for trial in study.trials]
    header, *rows = table(page, "All trials")
    told = [row[header.index("levels")] for row in rows]
    assert sorted(told) == sorted({"all" if text == "4-3-2-1-0" else text for text in visited})


def test_several_objectives(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, space="levels", objective="pareto", trials=10)
    study = run_trials(config, quality_and_calls, 10)
    record_all(study, config, store.uri, EXPERIMENT)
    page, summary = report(store, tmp_path / "out")
    told = [tuple(trial.values) for trial in study.trials]
    front = [
        n
        for n, a in enumerate(told)
        if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in told)
    ]
    assert summary["front"] == front
    reference = told[0]
    best = min((v, n) for n, v in enumerate(told) if v[1] <= reference[1])[1]
    assert summary["best"]["trial"] == best
    assert summary["best"]["values"] == {"fid_digits": told[best][0], "calls": told[best][1]}
    gains = {key: 1 - told[best][i] / reference[i] for i, key in enumerate(("fid_digits", "calls"))}
    assert summary["gain"] == pytest.approx(gains)
    header, *rows = table(page, "Pareto front")
    calls = [float(row[header.index("network calls")]) for row in rows if row[0] in map(str, front)]
    assert calls == sorted(calls)
    out = tmp_path / "out"
    assert {path.name for path in (out / "pareto").iterdir()} == {f"{n}.json" for n in front}
    assert (out / "best.json").read_bytes() == (out / "pareto" / f"{best}.json").read_bytes()
    assert {path.stem for path in out.glob("*.png")} == {
        "history",
        "pareto",
        "importances",
        "slices",
        "plane",
        "parallel",
    }
    there = read_study(EXPERIMENT, "small", store.uri, tmp_path / "artifacts")
    axes = pareto(there).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert sorted(zip(line.get_ydata(), line.get_xdata(), strict=True)) == sorted(
        {told[n] for n in front}
    )


def dots(axes: Axes) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.collections[0].get_offsets()]


def test_history_shows_the_values_and_the_best_so_far(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=9)
    study = run_trials(config, valley, 9, pruned={4})
    axes = history(recorded(store, study, config, tmp_path)).axes[0]
    measured = [(n, v) for n, v in enumerate(values(study)) if v is not None]
    low, high = axes.get_ylim()
    assert dots(axes) == [(n, pytest.approx(min(max(v, low), high))) for n, v in measured]
    lines = {line.get_label(): line for line in axes.lines}
    best = [min(v for _, v in measured[: i + 1]) for i in range(len(measured))]
    assert list(lines["best so far"].get_ydata()) == pytest.approx(best)
    assert list(lines["pruned"].get_xdata()) == [4]
    assert list(lines["reference (trial 0)"].get_ydata()) == [values(study)[0]]
    assert axes.get_ylabel() == "sampled RMSE (validation)\nlower is better"


def test_slices_have_every_trial_at_its_parameter(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=9)
    study = run_trials(config, valley, 9)
    there = recorded(store, study, config, tmp_path)
    panels = {axes.get_xlabel(): axes for axes in slices(there).axes if axes.get_xlabel()}
    assert list(panels) == varying(there)
    assert [x for x, _ in dots(panels["lr"])] == [trial.params["lr"] for trial in study.trials]
    assert panels["lr"].get_xscale() == "log"
    choices = [text.get_text() for text in panels["loss"].get_xticklabels()]
    assert choices == ["l1", "l2"]
    near = [round(x) for x, _ in dots(panels["loss"])]
    assert [choices[x] for x in near] == [trial.params["loss"] for trial in study.trials]


def test_disasters_do_not_squeeze_the_others(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 9)
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, 50.0)
    there = recorded(store, study, config, tmp_path)
    usual = [v for v in values(study) if v is not None and v < 1]
    low, high = limits(there)
    assert low < min(usual)
    assert high < 1
    assert values(study)[0] < high  # type: ignore[operator]


def test_scale_of_a_logarithmic_parameter(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    scale = Scale(recorded(store, run_trials(config, valley, 2), config, tmp_path), "lr")
    assert [text for _, text in scale.ticks()] == ["1e-05", "0.0001", "0.001", "0.01"]
    assert [place for place, _ in scale.parts()] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.usefixtures("fewer_figures")
def test_newest_study_of_a_name(store: Store, tmp_path: Path) -> None:
    for number in (1, 2):
        config = small_config(tmp_path / str(number))
        study = run_trials(config, lambda p, number=number: (float(number),), 1)  # type: ignore[misc]
        record_all(study, config, store.uri, EXPERIMENT)
    assert report(store, tmp_path / "out")[1]["best"]["values"] == {"rmse": 2.0}


def test_nothing_to_report_is_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def error(*options: str) -> str:
        arguments = ["--experiment", EXPERIMENT, "--study", "small", "--out", str(out)]
        return error_line(main, capsys, *arguments, "--tracking-uri", store.uri, *options)

    assert "no study 'small' in experiment 'study', which has: none" in error()
    config = small_config(tmp_path)
    parent = parent_run(config, store.uri, EXPERIMENT)
    assert "no complete trial in MLflow yet" in error()
    study = run_trials(config, valley, 2, pruned={0}, failed={1})
    record_study(study, config, store.uri, parent)
    assert "no complete trial yet: 0 running, 1 failed, 1 pruned" in error()
    assert "no study 'smal' in experiment 'study', which has: small" in error("--study", "smal")
    assert "no experiment 'none'" in error("--experiment", "none")
    assert "no MLflow store at" in error("--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert not out.exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from analysis.sweep_report import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'mlflow', 'pandas', 'matplotlib', 'torch', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--study" in result.stdout
    assert "--preset" not in result.stdout


@pytest.mark.parametrize(
    ("values_told", "best"),
    [
        # quality and cost: the reference first, then the best of all, which costs more
        ([(5.0, 8.0), (1.0, 9.0), (4.0, 8.0), (4.0, 7.0), (4.5, 1.0)], 3),
        ([(5.0, 8.0), (1.0, 9.0), (6.0, 1.0)], 0),
        ([(5.0, 8.0), (5.0, 7.0)], 1),
    ],
)
def test_best_of_several_costs_no_more_than_the_reference(
    values_told: list[tuple[float, ...]], best: int
) -> None:
    trials = tuple(
        Trial(number, "complete", f"run{number}", {}, {}, "", told)
        for number, told in enumerate(values_told)
    )
    study = Recorded(
        name="small",
        run_id="",
        settings={"space": "steps"},
        wanted=len(trials),
        objectives=(Objective("fid", "FID", "minimize"), Objective("calls", "calls", "minimize")),
        parameters={},
        trials=trials,
        reference_number=0,
        front=(),
        importances={},
        runs=pd.DataFrame(),
    )
    assert study.best.number == best
    alone = dataclasses.replace(study, reference_number=None)
    assert alone.best.values == min(values_told)
