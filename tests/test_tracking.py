"""MLflow has exactly what the run folder has, whatever is repeated, lost or cut short."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_helpers import (
    ATTEMPT,
    CONFIG,
    ROOT,
    append,
    assert_exactly_the_journal,
    client,
    only_run,
    run_folder,
    set_state,
)

from colddiff.files import read_json, write_json
from colddiff.journal import Journal
from colddiff.tracking import (
    TrackingError,
    absolute_uri,
    default_uri,
    initialise_store,
    mask_secrets,
    push,
    run_link,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A database with MLflow's schema: the migrations take seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    initialise_store(f"sqlite:///{path}", "template")
    return path


@pytest.fixture
def uri(template: Path, tmp_path: Path) -> str:
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_importing_does_not_import_mlflow():
    program = "import sys, colddiff.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_uris(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db")
    assert default_uri() == f"sqlite:///{tmp_path}/sub/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert default_uri() == "http://host:5000"
    assert absolute_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert run_link("http://me:pw@h:5/", "3", "ab") == "http://***@h:5/#/experiments/3/runs/ab"
    assert run_link("sqlite:////a.db", "3", "ab") == "mlflow ui --backend-store-uri sqlite:////a.db"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("--uri http://ann:p@ss@host:5000/x y@z", "--uri http://***@host:5000/x y@z"),
        ("postgresql+psycopg://u:p@h/db?sslmode=on", "postgresql+psycopg://***@h/db?sslmode=on"),
        ("https://h/a?user=u&Api_Token=t&b=1", "https://h/a?user=u&Api_Token=***&b=1"),
        ("http://h/a@b and sqlite:////a@b/c.db", "http://h/a@b and sqlite:////a@b/c.db"),
    ],
)
def test_masking(text, masked):
    assert mask_secrets(text) == masked


def test_push_twice_is_push_once(tmp_path, uri):
    folder = run_folder(tmp_path / "run", records=700)
    report = push(folder, uri, "test")
    assert report.metrics == 2100
    assert_exactly_the_journal(folder, uri, report.mlflow_run_id)
    again = push(folder, uri, "test")
    assert (again.metrics, again.artifacts) == (0, ())
    assert again.mlflow_run_id == only_run(uri).info.run_id == report.mlflow_run_id
    assert_exactly_the_journal(folder, uri, report.mlflow_run_id)


def test_what_mlflow_is_told(tmp_path, uri):
    folder = run_folder(tmp_path / "run", records=1)
    environment = read_json(folder / "environment.json")
    environment["attempts"].append(
        {
            **ATTEMPT,
            **{"started_ms": 5, "git_sha": "b", "slurm": {"job_id": 72}},
            **{"processor": "Xeon", "threads": 4},
        }
    )
    last = environment["attempts"][-1]
    environment["attempts"] += [
        {**last, "device": "cuda:0"},  # recorded before GPUs had names
        {**last, "gpu": "NVIDIA A100", "world_size": 2},
    ]
    write_json(folder / "environment.json", environment)
    parent = client(uri).create_run(initialise_store(uri, "test")).info.run_id
    report = push(folder, uri, "test", parent_run_id=parent)
    run = client(uri).get_run(report.mlflow_run_id)
    assert run.data.params == {key: str(value) for key, value in CONFIG.flat().items()}
    assert run.info.run_name == CONFIG.run_id
    assert run.info.start_time == ATTEMPT["started_ms"]
    expected = {
        "colddiff.run_id": CONFIG.run_id,
        "colddiff.preset": CONFIG.preset,
        "colddiff.git_sha": "a" * 40 + ",b",
        "mlflow.source.git.commit": "b",
        "colddiff.git_dirty": "true",
        "colddiff.data_sha256": "d" * 64,
        "colddiff.slurm_job_ids": "71,72",
        "colddiff.attempts": "4",
        "colddiff.machine": "Xeon x 4,NVIDIA A100 x 2",
        "colddiff.host": "node01",
        "colddiff.device": "cpu",
        "mlflow.parentRunId": parent,
    }
    assert expected.items() <= run.data.tags.items()
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == (CONFIG.data.name, "d" * 16)
    assert json.loads(data.dataset.profile)["num_rows"] == 4000
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    (folder / "tracking.json").unlink()
    push(folder, uri, "test")
    run = client(uri).get_run(report.mlflow_run_id)
    assert len(run.inputs.dataset_inputs) == 1
    assert run.data.tags["mlflow.parentRunId"] == parent


def test_no_secret_reaches_mlflow(tmp_path, uri):
    folder = run_folder(tmp_path / "run")
    set_state(folder, "failed", "cannot reach http://ann:hunter2@host:5000")
    report = push(folder, uri, "test")
    run = client(uri).get_run(report.mlflow_run_id)
    uploaded = Path(run.info.artifact_uri) / "environment.json"
    assert "hunter2" not in str(run.data.tags) + uploaded.read_text()
    assert "http://***@host:5000" in run.data.tags["mlflow.source.name"]
    assert "http://***@host:5000" in run.data.tags["colddiff.message"]
    with pytest.raises(TrackingError) as error:
        initialise_store("postgresql+nodriver://ann:hunter2@host/db", "test")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("loss", ["partial offset", "no state", "torn state", "larger offset"])
def test_lost_or_old_state_changes_nothing(tmp_path, uri, loss):
    folder = run_folder(tmp_path / "run", records=5)
    state = folder / "tracking.json"
    first = push(folder, uri, "test")
    early = state.read_bytes()
    append(folder, range(5, 40))
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"step":40,"timest')
    push(folder, uri, "test")
    match loss:
        case "partial offset":
            state.write_bytes(early)
        case "no state":
            state.unlink()
        case "torn state":
            state.write_bytes(early[:20])
        case "larger offset":
            state.write_text(state.read_text().replace('"offset": ', '"offset": 9'))
    append(folder, range(40, 45))
    assert push(folder, uri, "test").mlflow_run_id == first.mlflow_run_id
    assert only_run(uri)
    assert_exactly_the_journal(folder, uri, first.mlflow_run_id)


def test_each_store_has_its_own_state(tmp_path, uri, template):
    folder = run_folder(tmp_path / "run", records=5)
    shutil.copy(template, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    for target, experiment in ((uri, "test"), (other, "test"), (uri, "second")):
        report = push(folder, target, experiment)
        assert report.metrics == 15
        assert only_run(target, experiment).info.run_id == report.mlflow_run_id
    assert {push(folder, target, "test").metrics for target in (uri, other)} == {0}


def test_status_is_true_to_what_happened(tmp_path, uri):
    folder = run_folder(tmp_path / "run")
    for state, status in (
        ("running", "RUNNING"),
        ("interrupted", "KILLED"),
        ("running", "RUNNING"),
        ("failed", "FAILED"),
        ("finished", "FINISHED"),
    ):
        set_state(folder, state)
        push(folder, uri, "test")
        assert only_run(uri).info.status == status
    assert only_run(uri).info.end_time == 1_800_000_000_000
    set_state(folder, "exploded")
    with pytest.raises(ValueError, match="state = 'exploded' is none of running, finished"):
        push(folder, uri, "test")


def test_artifacts_are_uploaded_when_they_change(tmp_path, uri):
    folder = run_folder(tmp_path / "run")
    (folder / "samples").mkdir()
    grid, weights = folder / "samples" / "grid.png", folder / "ema.safetensors"
    grid.write_bytes(b"one")
    weights.write_bytes(b"weights")
    (folder / "samples" / ".grid.png.tmp").write_bytes(b"half")
    report = push(folder, uri, "test")
    assert set(report.artifacts) == {"config.json", "environment.json", "samples/grid.png"}
    os.utime(grid)
    assert push(folder, uri, "test").artifacts == ()
    grid.write_bytes(b"two")
    assert push(folder, uri, "test").artifacts == ("samples/grid.png",)
    set_state(folder, "finished")
    assert push(folder, uri, "test").artifacts == ("ema.safetensors",)
    there = Path(only_run(uri).info.artifact_uri)
    assert there.is_relative_to(tmp_path / "mlruns" / "test")
    assert (there / "samples" / "grid.png").read_bytes() == b"two"
    assert (there / "ema.safetensors").read_bytes() == b"weights"
    assert (there / "config.json").read_text() == CONFIG.to_json()


def test_evaluation_once_and_again(tmp_path, uri):
    folder = run_folder(tmp_path / "run")
    kinds = {
        "direct": {"rmse": 0.14, "fid_inception": None, "rmse_per_class": [0.1, math.nan]},
        "sampled[20-10-0]": {"rmse": 0.2},
    }
    evaluation = {"split": "test", "samples": 1000, "step": 7, "kinds": kinds, "device": "cpu"}
    write_json(folder / "evaluation.json", evaluation)
    assert push(folder, uri, "test").metrics == 3
    keys = {"samples", "direct/rmse", "sampled_20-10-0/rmse"}
    run = only_run(uri)
    assert set(run.data.metrics) == {f"eval/{key}" for key in keys}
    assert run.data.tags["colddiff.eval_split"] == "test"
    os.utime(folder / "evaluation.json")
    (folder / "tracking.json").unlink()
    assert push(folder, uri, "test").metrics == 0
    kinds["direct"]["rmse"] = 0.13
    write_json(folder / "evaluation.json", evaluation)
    os.utime(folder / "evaluation.json", (1, 1))
    assert push(folder, uri, "test").metrics == 1
    assert only_run(uri).data.metrics["eval/direct/rmse"] == 0.13
    history = client(uri).get_metric_history(run.info.run_id, "eval/direct/rmse")
    assert [(m.step, m.value) for m in history] == [(7, 0.14), (7, 0.13)]


def test_what_is_left_of_an_earlier_evaluation_is_told_apart(tmp_path, uri):
    """MLflow keeps every metric: the tag names those of the last evaluation."""
    folder = run_folder(tmp_path / "run")
    evaluation = {"split": "test", "samples": 100, "step": 7, "git_sha": "ab" * 20}
    kinds = {"direct": {"rmse": 0.1}, "sampled[2-0]": {"rmse": 0.2}}
    write_json(folder / "evaluation.json", evaluation | {"kinds": kinds})
    push(folder, uri, "test")
    del kinds["sampled[2-0]"]
    write_json(folder / "evaluation.json", evaluation | {"samples": 1000, "kinds": kinds})
    os.utime(folder / "evaluation.json", (1, 1))
    push(folder, uri, "test")
    run = only_run(uri)
    assert "eval/sampled_2-0/rmse" in run.data.metrics
    assert run.data.tags["colddiff.eval_keys"] == "samples direct/rmse"
    assert run.data.tags["colddiff.eval_git_sha"] == "abababababab"


def test_a_data_set_that_another_run_enters_at_the_same_moment(tmp_path, uri, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    original, calls = MlflowClient.log_inputs, []

    def loses_once(self, *arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets")
        return original(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_inputs", loses_once)
    push(run_folder(tmp_path / "run"), uri, "test")
    assert len(calls) == 2
    assert len(only_run(uri).inputs.dataset_inputs) == 1


def test_a_folder_that_was_never_started_finds_no_run(tmp_path, uri):
    """Its run id alone is that of every folder of the same configuration."""
    push(run_folder(tmp_path / "run"), uri, "test")
    twin = run_folder(tmp_path / "twin")
    (twin / "environment.json").unlink()
    with pytest.raises(ValueError, match="not started yet"):
        push(twin, uri, "test")
    assert only_run(uri).info.status


def test_changed_folders_do_not_stop_the_sync(tmp_path, uri):
    folder = run_folder(tmp_path / "run", records=1)
    push(folder, uri, "test")
    config = CONFIG.to_dict()
    config["data"]["root"] = "/elsewhere"
    write_json(folder / "config.json", config)
    append(folder, range(1, 3))
    assert push(folder, uri, "test").metrics == 6
    run = only_run(uri)
    assert run.data.params["data.root"] == CONFIG.data.root
    assert (
        run.data.tags["colddiff.changed_params"] == f"data.root: {CONFIG.data.root} -> /elsewhere"
    )


def test_keys_that_mlflow_refuses(tmp_path, uri):
    folder = run_folder(tmp_path / "run")
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append(1, {"a[b]": 1.0, "/x//../y": 2.0, "z" * 300: 3.0, "": 4.0, "ü%": 5.0})
    push(folder, uri, "test")
    expected = {"a_b": 1.0, "x/y": 2.0, "z" * 250: 3.0, "_": 4.0, "ü_": 5.0}
    assert only_run(uri).data.metrics == expected


def test_runs_that_are_gone_or_double(tmp_path, uri):
    folder = run_folder(tmp_path / "run", records=2)
    first = push(folder, uri, "test").mlflow_run_id
    mlflow = client(uri)
    tags = {k: v for k, v in only_run(uri).data.tags.items() if k.startswith("colddiff")}
    copy = mlflow.create_run(initialise_store(uri, "test"), tags=tags, start_time=1).info.run_id
    (folder / "tracking.json").unlink()
    assert push(folder, uri, "test").mlflow_run_id == first
    assert only_run(uri).info.run_id == first
    assert mlflow.get_run(copy).info.lifecycle_stage == "deleted"
    mlflow.delete_run(first)
    second = push(folder, uri, "test").mlflow_run_id
    assert second not in (first, copy)
    assert_exactly_the_journal(folder, uri, second)
    anew = run_folder(tmp_path / "anew", records=2, started_ms=1_700_000_000_001)
    assert push(anew, uri, "test").mlflow_run_id != second
    assert_exactly_the_journal(folder, uri, second)


def test_mistakes(tmp_path, uri):
    with pytest.raises(FileNotFoundError):
        push(tmp_path / "nothing", uri, "test")
    assert not (tmp_path / "nothing").exists()
    folder = run_folder(tmp_path / "run")
    client(uri).delete_experiment(initialise_store(uri, "test"))
    with pytest.raises(ValueError, match="experiment 'test' is deleted .* restore"):
        push(folder, uri, "test")
