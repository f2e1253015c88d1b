"""Reading runs from MLflow: real stores, written by MLflow's client and by colddiff.tracking."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tracked_runs import EXPERIMENT, Store

from analysis.runs import AnalysisError, download, load_runs, recipe_columns, select_runs
from colddiff.config import RunConfig
from colddiff.files import write_json
from colddiff.tracking import push

SOME = {"direct/rmse": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_columns(store: Store) -> None:
    mlflow_id = store.log(
        "a", seed=3, preset="mine", metrics=SOME, tags={"colddiff.git_dirty": "true"}, start=7
    )
    row = load_runs(EXPERIMENT, store.uri).iloc[0]
    expected = {
        "run_id": mlflow_id,
        "colddiff_run_id": "a",
        "dataset": "mnist",
        "preset": "mine",
        "T": 20,
        "seed": 3,
        "git_sha": "0123456789abcdef",
        "git_dirty": True,
        "status": "FINISHED",
        "started_ms": 7,
        "split": "test",
        "params.degradation.kernel_size": "11",
        "metrics.eval/direct/rmse": 0.1,
        "metrics.eval/samples": 10_000,
    }
    assert {name: row[name] for name in expected} == expected


def test_latest_metric_counts(store: Store) -> None:
    run_id = store.log("a")
    for step, value in ((100, 0.5), (300, 0.25), (200, 0.75)):
        store.client.log_metric(run_id, "eval/direct/rmse", value, step=step)
    assert load_runs(EXPERIMENT, store.uri)["metrics.eval/direct/rmse"].tolist() == [0.25]


def test_paging_and_order(store: Store) -> None:
    for number in range(5):
        store.log(f"run{number}", start=1000 + number)
    for page in (1, 2, 5, 1000):
        runs = load_runs(EXPERIMENT, store.uri, page=page)
        assert runs["colddiff_run_id"].tolist() == ["run4", "run3", "run2", "run1", "run0"]


def test_only_finished_runs_of_colddiff(store: Store) -> None:
    store.log("done")
    for status in ("RUNNING", "FAILED", "KILLED"):
        store.log(status.lower(), status=status)
    parent = store.client.create_run(store.experiment_id)
    store.client.set_terminated(parent.info.run_id)
    deleted = store.log("deleted")
    store.client.delete_run(deleted)
    assert set(load_runs(EXPERIMENT, store.uri)["colddiff_run_id"]) == {"done"}
    everything = load_runs(EXPERIMENT, store.uri, finished_only=False)
    assert set(everything["colddiff_run_id"]) == {"done", "running", "failed", "killed"}


def test_empty_experiment_has_the_columns(store: Store) -> None:
    runs = load_runs(EXPERIMENT, store.uri)
    assert runs.empty
    assert {"run_id", "colddiff_run_id", "dataset", "preset", "T", "seed"} <= set(runs.columns)


def test_newest_finished_run_of_an_id_counts(store: Store) -> None:
    store.log("same", metrics={"direct/rmse": 0.3}, start=1_000)
    newest = store.log("same", metrics={"direct/rmse": 0.2}, start=3_000)
    store.log("same", metrics={"direct/rmse": 0.1}, start=2_000)
    store.log("same", metrics={"direct/rmse": 0.9}, start=4_000, status="RUNNING")
    other = store.log("other", metrics=SOME, start=500)
    assert select_runs(EXPERIMENT, store.uri)["run_id"].tolist() == [newest, other]


def test_runs_without_an_evaluation_are_left_out(store: Store) -> None:
    store.log("trained")
    evaluated = store.log("evaluated", metrics=SOME)
    assert select_runs(EXPERIMENT, store.uri)["run_id"].tolist() == [evaluated]


def test_preset_filter(store: Store) -> None:
    store.log("a", preset="demo", metrics=SOME)
    store.log("b", preset="mnist", metrics=SOME)
    assert select_runs(EXPERIMENT, store.uri, "mnist")["colddiff_run_id"].tolist() == ["b"]
    with pytest.raises(AnalysisError, match="preset 'mist' .* which has: demo, mnist$"):
        select_runs(EXPERIMENT, store.uri, "mist")


def test_folder_dataset_is_named_by_its_folder(store: Store) -> None:
    params = {"data.name": "folder", "data.folder": "images/CelebA"}
    store.log("a", metrics=SOME, params=params)
    assert load_runs(EXPERIMENT, store.uri)["dataset"].tolist() == ["celeba"]


def test_scope_from_mlflow_fields(store: Store) -> None:
    store.log("a", metrics=SOME, samples=400, split="train")
    row = select_runs(EXPERIMENT, store.uri).iloc[0]
    assert (row["samples"], row["split"]) == (400, "train")


def test_scope_from_the_artifact(store: Store, tmp_path: Path) -> None:
    run_id = store.log("a", metrics=SOME, split=None)
    write_json(tmp_path / "evaluation.json", {"split": "test", "samples": 123})
    store.add_file(run_id, tmp_path / "evaluation.json")
    row = select_runs(EXPERIMENT, store.uri).iloc[0]
    assert (row["samples"], row["split"]) == (123, "test")


def test_unknown_scope_is_empty(store: Store) -> None:
    store.log("a", metrics=SOME, samples=None, split=None)
    assert select_runs(EXPERIMENT, store.uri)[["samples", "split"]].isna().all(axis=None)


def test_download(store: Store, tmp_path: Path) -> None:
    run_id = store.log("a")
    (tmp_path / "file.txt").write_text("content")
    store.add_file(run_id, tmp_path / "file.txt", "samples")
    assert download(run_id, "samples/file.txt", store.uri).read_text() == "content"
    copy = download(run_id, "samples/file.txt", store.uri, tmp_path / "copy")
    assert copy.read_text() == "content"
    assert copy.is_relative_to(tmp_path / "copy")
    with pytest.raises(AnalysisError, match=f"{run_id} has no artifact 'samples/none.npz'"):
        download(run_id, "samples/none.npz", store.uri)


def test_recipe_is_what_defines_the_result_but_for_the_seed(store: Store) -> None:
    store.log("a")
    names = recipe_columns(load_runs(EXPERIMENT, store.uri))
    assert {"params.optimiser.lr", "params.data.flip", "params.degradation.T"} <= set(names)
    elsewhere = {"training.seed", "data.root", "training.device", "evaluation.samples", "preset"}
    assert not {f"params.{name}" for name in elsewhere} & set(names)


def test_recipe_ignores_what_an_older_run_does_not_record(store: Store) -> None:
    store.log("a")
    runs = load_runs(EXPERIMENT, store.uri)
    older = runs.assign(**{"params.optimiser.lr": [None]})
    assert "params.optimiser.lr" not in recipe_columns(older)


def test_missing_experiment_names_the_others(store: Store) -> None:
    store.client.create_experiment("another")
    gone = store.client.create_experiment("gone")
    store.client.delete_experiment(gone)
    for name in ("nothing", "gone"):
        with pytest.raises(AnalysisError, match="which has: Default, another, study$"):
            load_runs(name, store.uri)


def test_missing_store_is_not_created(tmp_path: Path) -> None:
    path = tmp_path / "none" / "mlflow.db"
    with pytest.raises(AnalysisError, match=f"no MLflow store at {path}"):
        load_runs(EXPERIMENT, f"sqlite:///{path}")
    assert not path.parent.exists()


def test_default_store_is_that_of_the_jobs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.log("a")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert len(load_runs(EXPERIMENT)) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    with pytest.raises(AnalysisError, match=r"no MLflow store at .*elsewhere\.db"):
        load_runs(EXPERIMENT)


def test_store_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("not a database" * 100)
    with pytest.raises(AnalysisError, match="not a database") as error:
        load_runs(EXPERIMENT, f"sqlite:///{path}")
    assert "\n" not in str(error.value)


def test_server_that_is_gone_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(AnalysisError, match=r"http://\*\*\*@127\.0\.0\.1:9") as error:
        load_runs(EXPERIMENT, "http://me:hidden@127.0.0.1:9")
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)


def test_reads_what_tracking_writes(store: Store, tmp_path: Path) -> None:
    config = RunConfig(preset="demo")
    folder = tmp_path / config.run_id
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "samples" / "restorations.npz").write_bytes(b"npz")
    attempts = [{"started_ms": 5, "git_sha": "abc", "git_dirty": True}]
    write_json(folder / "environment.json", {"attempts": attempts})
    status = {"state": "finished", "step": 9, "steps": 9, "message": "", "updated_ms": 10}
    write_json(folder / "status.json", status)
    kinds = {"direct": {"rmse": 0.5, "fid_inception": None}, "sampled[20-10-0]": {"rmse": 0.25}}
    evaluation = {"split": "test", "samples": 40, "step": 9, "kinds": kinds}
    write_json(folder / "evaluation.json", evaluation)
    push(folder, store.uri, EXPERIMENT)

    runs = select_runs(EXPERIMENT, store.uri)
    expected = {
        "colddiff_run_id": config.run_id,
        "dataset": "digits",
        "preset": "demo",
        "T": 20,
        "seed": 0,
        "git_sha": "abc",
        "git_dirty": True,
        "samples": 40,
        "split": "test",
        "metrics.eval/direct/rmse": 0.5,
        "metrics.eval/sampled_20-10-0/rmse": 0.25,
    }
    assert {name: runs.iloc[0][name] for name in expected} == expected
    assert {"params.data.name", "params.model.mults"} <= set(recipe_columns(runs))
    run_id = str(runs.iloc[0]["run_id"])
    assert download(run_id, "samples/restorations.npz", store.uri).read_bytes() == b"npz"
    assert json.loads(download(run_id, "evaluation.json", store.uri).read_text()) == evaluation


@pytest.mark.parametrize("script", ["table1", "figure3"])
def test_help_imports_nothing_heavy(script: str) -> None:
    code = (
        "import sys, contextlib\n"
        f"from analysis.{script} import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'mlflow', 'pandas', 'matplotlib', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--experiment" in result.stdout


def test_metrics_of_earlier_evaluations_are_left_out(store: Store) -> None:
    """MLflow cannot delete them; the tag names those of the last evaluation."""
    metrics = {"direct/rmse": 0.1, "sampled_20-0/rmse": 0.2}
    tags = {"colddiff.eval_keys": "samples direct/rmse", "colddiff.eval_git_sha": "abc"}
    store.log(metrics=metrics, tags=tags)
    runs = load_runs(EXPERIMENT, store.uri)
    assert runs["metrics.eval/direct/rmse"].item() == 0.1
    assert "metrics.eval/sampled_20-0/rmse" not in runs
    assert runs["eval_git_sha"].item() == "abc"
