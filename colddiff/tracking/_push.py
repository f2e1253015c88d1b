"""One push: bring the MLflow run of a run folder up to date."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from colddiff.config import RunConfig
from colddiff.files import write_json
from colddiff.journal import read_records, same_bits
from colddiff.tracking import _contents as contents
from colddiff.tracking._store import LOCK_TIMEOUT_S, initialise_store, open_client, store_errors
from colddiff.uris import absolute_uri, mask_secrets, run_link

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
BATCH_METRICS = 1000  # the most that MLflow takes in one call
BATCH_RECORDS = 500  # journal records between two saves of the offset


@dataclass(frozen=True)
class PushReport:
    """What one push did: how many metric values it sent and which artifacts it uploaded."""

    experiment_id: str
    mlflow_run_id: str
    metrics: int
    artifacts: tuple[str, ...]
    link: str


def push(
    folder: Path, uri: str, experiment: str, *, parent_run_id: str | None = None
) -> PushReport:
    """Bring the MLflow run of ``folder`` up to date; what is there already is not sent again.

    The run is found by its tags ``colddiff.run_id`` and ``colddiff.started_ms``, or created; with
    ``parent_run_id`` it is nested under that run. Processes that push one folder take turns.

    Raises:
        FileNotFoundError: if ``folder`` is no run folder.
        ValueError: if the folder is corrupt or was never started, or the experiment deleted.
        TrackingError: if the store cannot be reached or refuses; what arrived is remembered.
    """
    config = RunConfig.from_json((folder / "config.json").read_text())
    if contents.first_start_ms(contents.read_or_empty(folder / "environment.json")) is None:
        # Its run id alone might find the MLflow run of another folder.
        raise ValueError(f"{folder.name} was not started yet: there is nothing to send")
    uri = absolute_uri(uri)
    lock = FileLock(folder / ".tracking.lock", timeout=LOCK_TIMEOUT_S)
    with store_errors(uri), lock:
        experiment_id = initialise_store(uri, experiment)
        run = _TrackedRun(folder, config, uri, experiment, experiment_id)
        run.describe(parent_run_id)
        metrics = run.send_journal() + run.send_evaluation()
        run.send_status()
        # Last, because metrics and status must arrive even where artifacts cannot be stored.
        artifacts = run.send_artifacts()
    link = run_link(uri, experiment_id, run.run_id)
    return PushReport(experiment_id, run.run_id, metrics, artifacts, link)


class _TrackedRun:
    """The MLflow run of a folder, and what of the folder it has; used under the folder's lock."""

    def __init__(
        self, folder: Path, config: RunConfig, uri: str, experiment: str, experiment_id: str
    ) -> None:
        self._folder = folder
        self._config = config
        self._experiment_id = experiment_id
        self._environment = contents.read_or_empty(folder / "environment.json")
        self._status = contents.read_or_empty(folder / "status.json")
        self._client = open_client(uri)
        self._states = contents.read_or_empty(folder / "tracking.json")
        states = self._states.setdefault(mask_secrets(uri), {})
        known = states.get(experiment, {}).get("run_id")
        self._run = self._recall(known) or self._find_or_create()
        self.run_id = str(self._run.info.run_id)
        if self.run_id != known:  # the state was lost, or the store was, or the run was deleted
            states[experiment] = {"run_id": self.run_id, "offset": 0, "artifacts": {}}
        self._state: dict[str, Any] = states[experiment]

    def describe(self, parent_run_id: str | None) -> None:
        """Send parameters, tags and the data set."""
        from mlflow.entities import Param, RunTag

        params = {
            key: str(value)[: contents.LONGEST_PARAM] for key, value in self._config.flat().items()
        }
        tags = contents.tags(self._environment) | self._identity()
        tags["colddiff.preset"] = self._config.preset
        parent = self._run.data.tags.get("mlflow.parentRunId", parent_run_id)
        if parent_run_id == parent and parent_run_id:  # else it stays with whom it belongs to
            tags["mlflow.parentRunId"] = parent_run_id
        digest = contents.digest(json.dumps([params, tags]).encode())
        if self._state.get("described") == digest:
            return
        # MLflow refuses to change a parameter. What may differ between attempts (folders, log
        # intervals) is no part of the run id: the first value stays and the change is a tag.
        there = self._run.data.params
        changed = [f"{k}: {there[k]} -> {v}" for k, v in params.items() if there.get(k, v) != v]
        tags["colddiff.changed_params"] = "; ".join(changed)[: contents.LONGEST_TAG]
        self._client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in params.items() if key not in there],
            tags=[RunTag(key, value) for key, value in tags.items() if value],
            synchronous=True,
        )
        self._describe_data(params)
        self._save(described=digest)

    def send_journal(self) -> int:
        """Send the journal from the stored offset on; returns the number of values sent."""
        from mlflow.entities import Metric

        path = self._folder / "journal.jsonl"
        if not path.exists():
            return 0
        # What MLflow has must survive a power cut here too: rewritten, it would have other times.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sent, offset, end = 0, int(self._state["offset"]), path.stat().st_size
        if offset > end:
            offset = 0  # not the journal that was sent; MLflow drops what it has already
        while offset < end:  # not to the end of a journal that may grow faster than it is sent
            records, offset = read_records(path, offset, BATCH_RECORDS)
            if not records:
                break
            metrics = [
                Metric(contents.metric_key(key), value, record.timestamp_ms, record.step)
                for record in records
                for key, value in record.metrics.items()
            ]
            self._log_metrics(metrics)
            sent += len(metrics)
            self._save(offset=offset)
        return sent

    def send_evaluation(self) -> int:
        """Send the metrics of ``evaluation.json`` that are new; returns their number."""
        path = self._folder / "evaluation.json"
        if not path.exists():
            return 0
        content = path.read_bytes()
        digest = contents.digest(content)
        if self._state.get("evaluation") == digest:
            return 0
        evaluation = json.loads(content)
        step = int(evaluation.get("step", 0))
        time_ms = int(evaluation.get("timestamp_ms") or path.stat().st_mtime_ns // 10**6)
        values = contents.evaluation_metrics(evaluation)
        metrics = [
            metric
            for key, value in values.items()
            if (metric := self._unless_latest(key, value, step, time_ms))
        ]
        self._log_metrics(metrics)
        for key, text in contents.evaluation_tags(evaluation, values).items():
            self._client.set_tag(self.run_id, key, text)
        self._save(evaluation=digest)
        return len(metrics)

    def send_status(self) -> None:
        """Set the MLflow status to what happened to the run."""
        state = self._status.get("state")
        if state is None:
            return
        if state not in STATUS:
            raise ValueError(f"status.json: state = {state!r} is none of {', '.join(STATUS)}")
        wanted = STATUS[state]
        if self._run.info.status == wanted:
            return
        if wanted == "RUNNING":
            self._client.update_run(self.run_id, status=wanted)
        else:
            self._client.set_terminated(self.run_id, wanted, self._status.get("updated_ms"))
        message = mask_secrets(str(self._status.get("message", "")))
        self._client.set_tag(self.run_id, "colddiff.message", message[: contents.LONGEST_TAG])

    def send_artifacts(self) -> tuple[str, ...]:
        """Upload the files whose content changed; returns their paths in the run."""
        seen, sent = self._state["artifacts"], []
        final = self._status.get("state") != "running"
        for path in contents.artifact_paths(self._folder, final=final):
            name = str(path.relative_to(self._folder))
            status = path.stat()  # before the content: a later change is then seen next time
            stamp = [status.st_size, status.st_mtime_ns]
            before = seen.get(name, {})
            if before.get("stamp") == stamp:
                continue
            digest = contents.file_digest(path)
            if before.get("sha256") != digest:
                self._upload(path, name)
                sent.append(name)
            seen[name] = {"stamp": stamp, "sha256": digest}
            self._save()
        return tuple(sent)

    def _recall(self, run_id: str | None) -> Run | None:
        """The run that ``tracking.json`` names, unless this store does not have it any more."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        there = run.info.lifecycle_stage == "active"
        return run if there and run.info.experiment_id == self._experiment_id else None

    def _find_or_create(self) -> Run:
        runs = self._search()
        if not runs:
            self._client.create_run(
                self._experiment_id,
                start_time=contents.first_start_ms(self._environment),
                tags=self._identity(),
                run_name=self._config.run_id,
            )
            runs = self._search()
        first, *copies = sorted(
            runs, key=lambda run: (not run.data.metrics, run.info.start_time, run.info.run_id)
        )
        for copy in copies:
            # A creation whose answer was lost is repeated by the HTTP layer and makes two.
            if not copy.data.metrics:
                self._client.delete_run(copy.info.run_id)
        return first

    def _search(self) -> list[Run]:
        terms = [f"tags.`{key}` = '{value}'" for key, value in self._identity().items()]
        return list(self._client.search_runs([self._experiment_id], " and ".join(terms)))

    def _identity(self) -> dict[str, str]:
        return contents.identity(self._config.run_id, self._environment)

    def _describe_data(self, params: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        checksum = self._environment.get("data_sha256")
        if not checksum:
            return
        samples = self._environment.get("data_samples")
        data = Dataset(
            name=params["data.name"],
            digest=checksum[:16],
            source_type="local",
            source=json.dumps({"uri": params["data.root"]}),
            profile=json.dumps({"num_rows": samples, "sha256": checksum}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        inputs = [DatasetInput(data, tags)]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except MlflowException as error:
            # Runs of one data set enter it at the same moment: who lost finds it the next time.
            if "unique" not in str(error).lower():
                raise
            self._client.log_inputs(self.run_id, inputs)

    def _unless_latest(self, key: str, value: float, step: int, time_ms: int) -> Metric | None:
        from mlflow.entities import Metric

        if key in self._run.data.metrics:
            history = self._client.get_metric_history(self.run_id, key)
            last = max(history, key=lambda metric: (metric.step, metric.timestamp))
            if last.step == step and same_bits(last.value, value):
                return None
            time_ms = max(time_ms, last.timestamp + 1)  # of one step, the later one is shown
        return Metric(key, value, time_ms, step)

    def _log_metrics(self, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), BATCH_METRICS):
            batch = metrics[start : start + BATCH_METRICS]
            # Explicitly synchronous: MLflow's asynchronous logging loses data silently.
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)

    def _upload(self, path: Path, name: str) -> None:
        target = str(Path(name).parent) if "/" in name else None
        if path.suffix in (".json", ".diff", ".sh"):
            text = path.read_text(errors="replace")
            if mask_secrets(text) != text:
                with tempfile.TemporaryDirectory() as scratch:
                    masked = Path(scratch) / path.name
                    masked.write_text(mask_secrets(text))
                    self._client.log_artifact(self.run_id, str(masked), target)
                return
        self._client.log_artifact(self.run_id, str(path), target)

    def _save(self, **changes: Any) -> None:
        self._state.update(changes)
        write_json(self._folder / "tracking.json", self._states)
