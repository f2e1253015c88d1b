"""Real studies in a real MLflow store, against Optuna's own account of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow.entities import Run
from optuna.trial import TrialState
from tracked_runs import EXPERIMENT, Store
from tracked_studies import begin, quality_and_calls, run_trials, small_config, valley, values

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from colddiff.tracking import TrackingError, push
from jobs.launch import base_config
from sweeps import contents, record
from sweeps.overview import draw
from sweeps.record import Recorder, parent_run, record_all, record_study, record_trial
from sweeps.study import StudyConfig


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("sweeps.overview.draw", lambda record: Figure())  # slow, and tested once
    return Store(tmp_path)


def artifact(store: Store, run_id: str, name: str, folder: Path) -> Any:
    return json.loads(Path(store.client.download_artifacts(run_id, name, str(folder))).read_text())


def history(store: Store, run_id: str, key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for metric in store.client.get_metric_history(run_id, key):
        found.setdefault(metric.step, []).append(metric.value)
    return found


def nested(store: Store, parent: str) -> list[Run]:
    return list(
        store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    )


def the_run(store: Store, parent: str, number: int) -> Run:
    found = [
        run
        for run in nested(store, parent)
        if str(number) in run.data.tags["colddiff.trial"].split(",")
    ]
    assert len(found) == 1
    return found[0]


def test_parent_run_is_found_again(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, seed=3, pruner="median")
    first = parent_run(config, store.uri, EXPERIMENT)
    raised = dataclasses.replace(config, trials=9)
    assert parent_run(raised, store.uri, EXPERIMENT) == first
    run = store.client.get_run(first)
    assert run.data.params == {
        "space": "recipe",
        "objective": "restoration",
        "metric": "rmse",
        "sampler": "random",
        "pruner": "median",
        "preset": "tiny",
        "trials": "6",
        "seed": "3",
        "storage": "journal",
    }
    assert run.data.tags["colddiff.study"] == "small"
    assert run.data.tags["colddiff.kind"] == "study"
    assert (run.info.run_name, run.info.status) == ("small", "RUNNING")
    other = small_config(tmp_path, name="other")
    assert parent_run(other, store.uri, EXPERIMENT) != first


def test_a_study_that_was_removed_and_begun_anew_has_another_run(
    store: Store, tmp_path: Path
) -> None:
    config = small_config(tmp_path)
    first = parent_run(config, store.uri, EXPERIMENT)
    (config.folder / "tracking.json").unlink()
    assert parent_run(config, store.uri, EXPERIMENT) != first


def test_workers_at_once_make_one_parent_run(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    ready, found = threading.Barrier(6), []

    def start() -> None:
        ready.wait()
        found.append(parent_run(config, store.uri, EXPERIMENT))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (6, 1)
    assert [run.info.run_id for run in store.client.search_runs([store.experiment_id])] == found[:1]


def test_metrics_are_the_best_values_so_far(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=8)
    study = run_trials(config, valley, 9, pruned={2, 5}, failed={4})
    parent = parent_run(config, store.uri, EXPERIMENT)
    record_study(study, config, store.uri, parent)
    finished = [v for n, v in enumerate(values(study)) if n != 4]
    expected = {step: [min(v for v in finished[:step] if v is not None)] for step in range(1, 9)}
    assert history(store, parent, "best/rmse") == expected
    assert history(store, parent, "trials/finished") == {n: [n] for n in range(1, 9)}
    metrics = store.client.get_run(parent).data.metrics
    names = ("trials/complete", "trials/pruned", "trials/failed")
    assert [metrics[name] for name in names] == [6, 2, 1]


def test_best_of_a_value_that_is_maximised(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, metric="ssim")
    study = run_trials(config, lambda params: (1 - valley(params)[0],), 6)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    found = values(study)
    assert history(store, parent, "best/ssim") == {
        step: [max(v for v in found[:step] if v is not None)] for step in range(1, 7)
    }
    trials = artifact(store, parent, "trials.json", tmp_path)
    assert trials["front"] == [study.best_trial.number]


def test_infinite_values_are_no_best(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=3)
    study = run_trials(config, lambda _: (math.inf,), 1)
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, 0.5)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    assert history(store, parent, "best/rmse") == {2: [0.5]}


def test_status_follows_the_number_of_trials_wanted(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=4)
    study = run_trials(config, valley, 3)
    parent = parent_run(config, store.uri, EXPERIMENT)

    def status(wanted: int) -> tuple[str, str]:
        record_study(study, dataclasses.replace(config, trials=wanted), store.uri, parent)
        run = store.client.get_run(parent)
        return run.info.status, run.data.tags["colddiff.trials_wanted"]

    assert status(4) == ("RUNNING", "4")
    assert status(3) == ("FINISHED", "3")
    assert status(4) == ("RUNNING", "4")


def test_a_study_on_which_nobody_works_is_killed_until_it_goes_on(
    store: Store, tmp_path: Path
) -> None:
    config = small_config(tmp_path, trials=6)
    study = run_trials(config, valley, 2)
    parent = record_all(study, config, store.uri, EXPERIMENT, working=False)
    assert store.client.get_run(parent).info.status == "KILLED"
    record_study(study, config, store.uri, parent)
    assert store.client.get_run(parent).info.status == "RUNNING"


def test_studies_of_one_base_keep_their_own_trials(store: Store, tmp_path: Path) -> None:
    """Their references share a run, which stays with the study that had it first."""
    first, second = (small_config(tmp_path, name=name) for name in ("first", "second"))
    parents = [
        record_all(run_trials(config, valley, 2), config, store.uri, EXPERIMENT)
        for config in (first, second)
    ]
    for parent in parents:
        numbers = [run.data.tags["colddiff.trial"] for run in nested(store, parent)]
        assert sorted(numbers) == ["0", "1"]


def test_sent_again_nothing_changes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 5, pruned={3})
    parent = record_all(study, config, store.uri, EXPERIMENT)
    keys = ("best/rmse", "trials/finished", "trials/complete", "trials/pruned")
    before = [history(store, parent, key) for key in keys]
    runs = {run.info.run_id for run in nested(store, parent)}
    with monkeypatch.context() as patch:
        patch.setattr("sweeps.overview.draw", lambda record: pytest.fail("drawn again"))
        assert record_all(study, config, store.uri, EXPERIMENT) == parent
    assert [history(store, parent, key) for key in keys] == before
    assert {run.info.run_id for run in nested(store, parent)} == runs
    trial = the_run(store, parent, 1)
    assert history(store, trial.info.run_id, "objective/rmse") == {1: [values(study)[1]]}


def test_trials_that_finish_later_are_added(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 2)
    parent = parent_run(config, store.uri, EXPERIMENT)
    record_study(study, config, store.uri, parent)
    for value in (0.05, 0.2):
        trial = study.ask()
        begin(trial, config)
        study.tell(trial.number, value)
        record_study(study, config, store.uri, parent)
    first = values(study)[:2]
    expected = {1: [first[0]], 2: [min(first)], 3: [0.05], 4: [0.05]}  # type: ignore[type-var]
    assert history(store, parent, "best/rmse") == expected
    trials = artifact(store, parent, "trials.json", tmp_path)
    assert ([trial["number"] for trial in trials["trials"]], trials["front"]) == ([0, 1, 2, 3], [2])


def test_artifacts_say_what_optuna_knows(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 6, pruned={2}, failed={3})
    running = study.ask()
    parent = record_all(study, config, store.uri, EXPERIMENT)
    trials = artifact(store, parent, "trials.json", tmp_path)
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
    assert len(trials["trials"]) == 7
    for told, trial in zip(trials["trials"], study.trials, strict=True):
        assert told["number"] == trial.number
        assert told["state"] == states[trial.state.name]
        assert told["params"] == trial.params
        assert told["run"] == trial.user_attrs.get("run")
        complete = trial.state == TrialState.COMPLETE
        assert told["values"] == (trial.values if complete else None)
        assert told["started_ms"] == round(trial.datetime_start.timestamp() * 1000)
        assert (told["finished_ms"] is None) == (trial.number == running.number)
    assert trials["trials"][2]["intermediate"] == {"10": 9.0}
    assert trials["trials"][3]["user_attrs"]["error"] == "RuntimeError: at http://***@host"
    assert (trials["reference"], trials["wanted"]) == (0, 6)
    assert trials["parameters"]["lr"] == {"low": 1e-5, "high": 1e-2, "log": True}
    assert trials["parameters"]["loss"] == {"choices": ["l1", "l2"]}
    told = Path(store.client.download_artifacts(parent, "study.json", str(tmp_path))).read_text()
    assert StudyConfig.from_json(told) == config
    names = {entry.path for entry in store.client.list_artifacts(parent)}
    wanted = {"study.json", "trials.json", "best.json", "importances.json", "overview.png"}
    assert names == wanted


def test_the_best_configuration_can_be_launched(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 6)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    path = store.client.download_artifacts(parent, "best.json", str(tmp_path))
    best, rest = base_config(["--config", path, "--seeds", "1"])
    assert best.run_id == study.best_trial.user_attrs["run"]
    assert best.optimiser.lr == study.best_params["lr"]
    assert rest == ["--seeds", "1"]


def test_without_its_run_folder_there_is_no_best_configuration(
    store: Store, tmp_path: Path
) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 2)
    RunFolder(Path(config.runs) / study.best_trial.user_attrs["run"]).config_file.unlink()
    parent = parent_run(config, store.uri, EXPERIMENT)
    record_study(study, config, store.uri, parent)
    names = {entry.path for entry in store.client.list_artifacts(parent)}
    assert "trials.json" in names
    assert "best.json" not in names


def test_several_values_have_a_front(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, space="levels", objective="pareto", trials=12)
    study = run_trials(config, quality_and_calls, 12)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    told = [tuple(trial.values) for trial in study.trials]
    front = [
        n
        for n, a in enumerate(told)
        if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in told)
    ]
    trials = artifact(store, parent, "trials.json", tmp_path)
    assert trials["front"] == front
    names = {entry.path for entry in store.client.list_artifacts(parent, "pareto")}
    assert names == {f"pareto/{number}.json" for number in front}
    number = front[-1]
    own = RunConfig.from_json(
        json.dumps(artifact(store, parent, f"pareto/{number}.json", tmp_path))
    )
    assert len(own.evaluation.level_lists[0]) - 1 <= study.trials[number].params["calls"]
    metrics = store.client.get_run(parent).data.metrics
    assert metrics["best/fid_digits"] == min(quality for quality, _ in told)
    assert metrics["best/calls"] == min(calls for _, calls in told)


def test_reference_is_a_later_trial_of_its_values_where_trial_0_failed(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 2, failed={0})
    assert contents.study_record(study, config)["reference"] is None
    study.enqueue_trial(study.trials[0].params)
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, 0.3)
    assert contents.study_record(study, config)["reference"] == 2


def test_trials_are_nested_runs(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 4, pruned={2}, failed={3})
    parent = record_all(study, config, store.uri, EXPERIMENT)
    assert len(nested(store, parent)) == 4
    for trial, state in zip(
        study.trials, ("complete", "complete", "pruned", "failed"), strict=True
    ):
        run = the_run(store, parent, trial.number)
        assert run.data.tags["colddiff.run_id"] == trial.user_attrs["run"]
        assert run.data.tags["colddiff.trial_state"] == state
        assert run.data.tags["colddiff.study"] == "small"
        assert run.data.params["optimiser.lr"] == str(trial.params["lr"])
        expected = {"objective/rmse": trial.values[0]} if state == "complete" else {}
        assert run.data.metrics == expected


def test_trials_of_one_run_share_it(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    study.enqueue_trial(study.trials[0].params)
    trial = study.ask()
    begin(trial, config)
    study.tell(trial.number, valley(trial.params)[0])
    parent = record_all(study, config, store.uri, EXPERIMENT)
    (run,) = nested(store, parent)
    assert run.data.tags["colddiff.trial"] == "0,1"
    value = valley(trial.params)[0]
    assert history(store, run.info.run_id, "objective/rmse") == {0: [value], 1: [value]}


def test_trials_of_levels_have_entries_of_their_own(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path, space="levels", trials=3)
    study = run_trials(config, lambda params: (1 / params["calls"],), 3)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    record_all(study, config, store.uri, EXPERIMENT)
    assert len(nested(store, parent)) == 3
    for trial in study.trials:
        run = the_run(store, parent, trial.number)
        assert "colddiff.run_id" not in run.data.tags  # which would make it a run of its own
        assert run.data.params["trial.calls"] == str(trial.params["calls"])
        assert run.data.params["run"] == config.base.run_id
        assert run.data.metrics == {"objective/rmse": trial.values[0]}
        assert run.info.status == "FINISHED"


def test_a_trial_that_never_began_is_only_in_the_list(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    trial = study.ask()
    study.tell(trial.number, state=TrialState.FAIL)
    parent = record_all(study, config, store.uri, EXPERIMENT)
    assert len(nested(store, parent)) == 1
    trials = artifact(store, parent, "trials.json", tmp_path)["trials"]
    assert [each["state"] for each in trials] == ["complete", "failed"]


def test_importances(tmp_path: Path) -> None:
    config = small_config(tmp_path, trials=20)
    study = run_trials(config, valley, 3)
    assert contents.importances(study, config) == {}, "three trials tell nothing"
    study = run_trials(config, valley, 17)
    shares = contents.importances(study, config)["rmse"]
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() == study.best_params.keys()


def test_importances_need_differences(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert contents.importances(run_trials(config, lambda _: (0.5,), 5), config) == {}


def test_the_page_says_where_the_study_stands(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 5, pruned={2}, failed={3})
    parent = record_all(study, config, store.uri, EXPERIMENT)
    note = store.client.get_run(parent).data.tags["mlflow.note.content"]
    best = study.best_trial
    assert "4 of 6 trials are finished (1 of them pruned); 1 failed." in note
    assert f"{best.value:.5g}, trial {best.number} ({best.user_attrs['run']})" in note
    assert f"Reference: sampled RMSE (validation) {study.trials[0].value:.5g}, trial 0" in note


def test_no_secret_of_the_storage_is_sent(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    secret = dataclasses.replace(config, storage="postgresql://host/db?sslkey=hunter2")
    parent = record_all(study, secret, store.uri, EXPERIMENT)
    run = store.client.get_run(parent)
    told = Path(store.client.download_artifacts(parent, "study.json", str(tmp_path))).read_text()
    assert run.data.params["storage"] == "postgresql"
    assert "sslkey=***" in told
    assert "hunter2" not in told + str(run.to_dictionary())


def test_recorder_goes_on_without_mlflow_and_sends_the_rest_later(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 4)
    clock = itertools.count()
    monkeypatch.setattr("sweeps.record.time.monotonic", lambda: float(next(clock)))
    recorder = Recorder(config, store.uri, EXPERIMENT)

    def broken(*_: object) -> None:
        raise TrackingError("MLflow at http://me:hunter2@host is gone")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "colddiff.sweeps"):
        patch.setattr(record, "record_trial", broken)
        for trial in study.trials[:3]:
            recorder.trial(trial)
        recorder.study(study, last=True)
    assert [entry.message for entry in caplog.records] == [
        "MLflow has not the study yet, which goes on: MLflow at http://***@host is gone"
    ]
    parent = recorder.parent_run_id
    assert parent is not None
    assert nested(store, parent) == []
    recorder.trial(study.trials[3])
    assert nested(store, parent) == [], "it waits a while after a failure"
    recorder.study(study, last=True)
    assert len(nested(store, parent)) == 4
    assert store.client.get_run(parent).data.metrics["trials/finished"] == 4


def test_the_last_record_has_trials_whose_worker_was_killed(store: Store, tmp_path: Path) -> None:
    """One was told and not described, one not even sent; what is there already stays as it is."""
    config = small_config(tmp_path)
    study = run_trials(config, valley, 4)
    survivor = Recorder(config, store.uri, EXPERIMENT)
    survivor.trial(study.trials[0])
    survivor.trial(study.trials[3])
    parent = survivor.parent_run_id
    assert parent is not None
    push(
        Path(config.runs) / study.trials[1].user_attrs["run"],
        store.uri,
        EXPERIMENT,
        parent_run_id=parent,
    )
    survivor.study(study)
    numbers = [run.data.tags.get("colddiff.trial") for run in nested(store, parent)]
    assert sorted(map(str, numbers)) == ["0", "3", "None"]
    survivor.study(study, last=True)
    numbers = [run.data.tags.get("colddiff.trial") for run in nested(store, parent)]
    assert sorted(map(str, numbers)) == ["0", "1", "2", "3"]


def test_recorder_without_an_address_does_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    recorder = Recorder(config, "", EXPERIMENT)
    recorder.trial(study.trials[0])
    recorder.study(study, last=True)
    assert recorder.parent_run_id is None
    assert not list(tmp_path.glob("**/mlflow.db"))


def test_recorder_takes_a_small_part_of_the_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 1)
    now = [0.0]
    sent: list[float] = []

    def slow(*_: object) -> None:
        sent.append(now[0])
        now[0] += 2

    monkeypatch.setattr("sweeps.record.time.monotonic", lambda: now[0])
    monkeypatch.setattr(record, "record_study", slow)
    recorder = Recorder(config, store.uri, EXPERIMENT)
    while now[0] < 200:
        recorder.study(study)
        now[0] += 1
    assert len(sent) == 5  # 2 s in every 42 s
    recorder.study(study, last=True)
    assert len(sent) == 6


def test_server_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = small_config(tmp_path)
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127\.0\.0\.1:9"):
        parent_run(config, "http://me:hidden@127.0.0.1:9", EXPERIMENT)
    recorder = Recorder(config, "http://me:hidden@127.0.0.1:9", EXPERIMENT)
    assert recorder.parent_run_id is None


def test_record_trial_is_quiet_about_a_trial_without_a_run(store: Store, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, valley, 0)
    frozen = study.trials[0]
    assert frozen.state == TrialState.WAITING
    record_trial(frozen, config, store.uri, EXPERIMENT, "no such run")


def test_picture_shows_every_trial_over_every_parameter(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    study = run_trials(config, lambda p: (99.0,) if p["lr"] == 0.001 else valley(p), 7, pruned={2})
    figure = draw(contents.study_record(study, config))
    panels = {axes.get_xlabel(): axes for axes in figure.axes}
    assert panels.keys() == {"trial", *study.best_params}
    dots = [(line.get_xdata()[0], line.get_ydata()[0], line) for line in panels["lr"].lines]
    complete = [trial for trial in study.trials if trial.number != 2]
    assert [x for x, _, _ in dots] == [trial.params["lr"] for trial in complete]
    shown = {x: y for x, y, line in dots if line.get_marker() != "^"}
    assert shown == {trial.params["lr"]: trial.values[0] for trial in complete if trial.number}
    assert all(y < 1 for _, y, _ in dots), "the disaster squeezes the others"
    orange = [x for x, _, line in dots if line.get_color() == "#d55e00"]
    assert orange == [study.best_params["lr"]]
