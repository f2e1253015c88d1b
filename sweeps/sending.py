"""What is sent to the MLflow runs of a study and its trials, under the study's lock."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colddiff.files import write_atomic, write_json
from colddiff.uris import mask_secrets
from sweeps import contents

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from optuna import Study
    from optuna.trial import FrozenTrial

    from sweeps.study import StudyConfig

BATCH_METRICS = 1000  # the most that MLflow takes in one call
NOTE = "mlflow.note.content"
RECORDED = "colddiff.recorded"
"""Tag of the study's run: which state of the study its artifacts show."""


def find_or_create(
    client: MlflowClient,
    experiment_id: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str],
    name: str,
) -> Run:
    """The run with the tags ``identity``, made with ``tags`` beside them where there is none."""
    terms = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    runs = list(client.search_runs([experiment_id], terms))
    if not runs:
        client.create_run(experiment_id, tags={**identity, **tags}, run_name=name)
        runs = list(client.search_runs([experiment_id], terms))
    first, *copies = sorted(
        runs, key=lambda run: (not run.data.metrics, run.info.start_time, run.info.run_id)
    )
    for copy in copies:
        # A creation whose answer was lost is repeated by the HTTP layer and makes two.
        if not copy.data.metrics:
            client.delete_run(copy.info.run_id)
    return first


def add_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    """Those that the run has not: MLflow refuses to change a parameter."""
    from mlflow.entities import Param

    new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    if new:
        client.log_batch(run.info.run_id, params=new, synchronous=True)


def send_progress(client: MlflowClient, run: Run, record: Mapping[str, Any]) -> None:
    """Metrics: the best values at every number of finished trials that is new, and the counts."""
    from mlflow.entities import Metric

    there = run.data.metrics
    metrics: list[Metric] = []
    point = None
    for point in contents.progress(record):
        if point.finished > there.get("trials/finished", 0):
            new = {f"best/{key}": value for key, value in point.best.items()}
            # With the values of its step in one batch: it says up to where they have arrived.
            new["trials/finished"] = point.finished
            metrics += [Metric(k, v, point.time_ms, point.finished) for k, v in new.items()]
    step = point.finished if point else 0
    now = round(time.time() * 1000)
    for key, count in contents.counts(record).items():
        if key != "trials/finished" and there.get(key) != count:
            metrics.append(Metric(key, count, now, step))
    for start in range(0, len(metrics), BATCH_METRICS):
        batch = metrics[start : start + BATCH_METRICS]
        client.log_batch(run.info.run_id, metrics=batch, synchronous=True)


def send_status(
    client: MlflowClient, run: Run, record: Mapping[str, Any], *, working: bool
) -> None:
    """FINISHED once as many trials are finished as are wanted, and what the page says."""
    run_id = run.info.run_id
    complete = contents.counts(record)["trials/finished"] >= record["wanted"]
    wanted = "FINISHED" if complete else "RUNNING" if working else "KILLED"
    if run.info.status != wanted:
        if wanted == "RUNNING":
            client.update_run(run_id, status=wanted)
        else:
            client.set_terminated(run_id, wanted)
    tags = {"colddiff.trials_wanted": str(record["wanted"]), NOTE: contents.note(record)}
    for key, text in tags.items():
        if run.data.tags.get(key) != text:
            client.set_tag(run_id, key, text)


def send_artifacts(
    client: MlflowClient, run: Run, record: dict[str, Any], study: Study, config: StudyConfig
) -> None:
    """The study, its trials, importances, the best configurations and a picture."""
    from sweeps.overview import draw

    text = json.dumps(record, indent=1)
    state = hashlib.sha256(text.encode()).hexdigest()
    if run.data.tags.get(RECORDED) == state:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_atomic(folder / "study.json", mask_secrets(config.to_json()))
        write_atomic(folder / "trials.json", text)
        write_json(folder / "importances.json", contents.importances(study, config))
        for name, best in contents.best_configs(record, config).items():
            write_atomic(folder / name, best.to_json())
        draw(record).savefig(folder / "overview.png")
        client.log_artifacts(run.info.run_id, str(folder))
    client.set_tag(run.info.run_id, RECORDED, state)


def entry(
    client: MlflowClient,
    experiment_id: str,
    trial: FrozenTrial,
    config: StudyConfig,
    parent_run_id: str,
) -> Run:
    """The nested run of a trial whose run folder is not its own."""
    identity = {"mlflow.parentRunId": parent_run_id, "colddiff.trial": str(trial.number)}
    name = f"{config.name}-trial-{trial.number}"
    run = find_or_create(client, experiment_id, identity, {"colddiff.kind": "trial"}, name)
    params = {f"trial.{key}": str(value) for key, value in trial.params.items()}
    params["run"] = str(trial.user_attrs["run"])
    add_params(client, run, params)
    ended = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}.get(trial.state.name)
    if ended and run.info.status != ended:
        client.set_terminated(run.info.run_id, ended)
    return run


def numbers_below(client: MlflowClient, parent_run_id: str) -> set[int]:
    """The trials that the runs nested under the study's say they are."""
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    found: set[int] = set()
    token: str | None = None
    while True:
        terms = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
        runs = client.search_runs([experiment_id], terms, max_results=1000, page_token=token)
        for run in runs:
            numbers = run.data.tags.get("colddiff.trial", "").split(",")
            found |= {int(number) for number in numbers if number}
        token = runs.token
        if not token:
            return found


def describe(client: MlflowClient, run: Run, trial: FrozenTrial, config: StudyConfig) -> None:
    """Say on a trial's run which trial it is, how it ended and what it was worth."""
    from mlflow.entities import Metric, RunTag

    there = run.data.tags
    same_study = there.get("colddiff.study") == config.name
    before = there.get("colddiff.trial", "").split(",") if same_study else []
    numbers = sorted({int(number) for number in [*before, str(trial.number)] if number})
    tags = {
        "colddiff.study": config.name,
        "colddiff.trial": ",".join(map(str, numbers)),
        "colddiff.trial_state": contents.STATES.get(trial.state.name, trial.state.name.lower()),
    }
    ended_ms = contents.milliseconds(trial.datetime_complete) or 0
    keys = [f"objective/{value.key}" for value in contents.values_of(config)]
    complete = trial.state.name == "COMPLETE"
    metrics = [
        Metric(key, value, ended_ms, trial.number)
        for key, value in (zip(keys, trial.values, strict=True) if complete else ())
    ]
    new = [RunTag(key, text) for key, text in tags.items() if there.get(key) != text]
    client.log_batch(run.info.run_id, metrics=metrics, tags=new, synchronous=True)
