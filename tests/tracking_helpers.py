"""Run folders written by hand, and what MLflow should then have."""

import math
from pathlib import Path

from colddiff.config import RunConfig
from colddiff.files import write_json
from colddiff.journal import Journal, read_records

ROOT = Path(__file__).parents[1]
CONFIG = RunConfig()
ATTEMPT = {
    "started_ms": 1_700_000_000_000,
    "command": "launch.py train --uri http://ann:hunter2@host:5000",
    "git_sha": "a" * 40,
    "git_dirty": True,
    "host": "node01",
    "device": "cpu",
    "slurm": {"job_id": 71},
}


def run_folder(folder: Path, records: int = 0, started_ms: int = 1_700_000_000_000) -> Path:
    """A run folder written by hand; its journal has a NaN and an infinity."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(CONFIG.to_json())
    attempts = [{**ATTEMPT, "started_ms": started_ms}]
    write_json(
        folder / "environment.json",
        {"attempts": attempts, "data_sha256": "d" * 64, "data_samples": 4000},
    )
    set_state(folder, "running")
    append(folder, range(records))
    return folder


def append(folder: Path, steps: range) -> None:
    with Journal.open(folder / "journal.jsonl") as journal:
        for step in steps:
            loss = {3: math.nan, 4: math.inf}.get(step, 1 / (step + 1))
            journal.append(step, {"loss": loss, "rmse/direct": step / 3, "speed/images": 9.0})


def set_state(folder: Path, state: str, message: str = "") -> None:
    status = {"state": state, "step": 1, "message": message, "updated_ms": 1_800_000_000_000}
    write_json(folder / "status.json", status)


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str = "test"):
    mlflow = client(uri)
    return mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])


def only_run(uri: str, experiment: str = "test"):
    (run,) = runs(uri, experiment)
    return run


def assert_exactly_the_journal(folder: Path, uri: str, run_id: str) -> None:
    expected: dict[str, list[tuple[int, int, str]]] = {}
    for record in read_records(folder / "journal.jsonl")[0]:
        for key, value in record.metrics.items():
            stored = 1.7976931348623157e308 if value == math.inf else value
            row = (record.step, record.timestamp_ms, repr(stored))
            expected.setdefault(key, []).append(row)
    mlflow = client(uri)
    for key, rows in expected.items():
        history = mlflow.get_metric_history(run_id, key)
        assert sorted((m.step, m.timestamp, repr(float(m.value))) for m in history) == sorted(rows)
    other = ("eval/", "objective/")  # of the evaluation, and of a study
    there = {key for key in mlflow.get_run(run_id).data.metrics if not key.startswith(other)}
    assert there == set(expected)
