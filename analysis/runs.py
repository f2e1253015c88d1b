"""Runs as a DataFrame: the one place where analysis reads MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

FINISHED = "FINISHED"
PAGE = 1000
RESULT = "metrics.eval/"
"""Prefix of the columns that an evaluation gave."""


class AnalysisError(ValueError):
    """A user's mistake, told in one line; the scripts end with exit code 2."""


def load_runs(
    experiment: str, uri: str | None = None, *, finished_only: bool = True, page: int = PAGE
) -> pd.DataFrame:
    """One row a run of ``experiment``, newest first, from the MLflow store at ``uri``.

    Columns: ``run_id`` (MLflow's), ``colddiff_run_id``, ``dataset``, ``preset``, ``T``, ``seed``,
    ``git_sha``, ``git_dirty``, ``status``, ``started_ms``, ``artifact_uri``, ``machine``,
    ``split``, ``params.*`` (text) and the latest ``metrics.*``. Runs without the tag
    ``colddiff.run_id`` (parents of sweeps) are left out.

    Raises:
        AnalysisError: if the store cannot be read or has no such experiment.
    """
    import pandas as pd

    with reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            raise AnalysisError(f"no experiment {experiment!r} {_existing(client)}")
        text = f"attributes.status = '{FINISHED}'" if finished_only else ""
        rows: list[dict[str, Any]] = []
        token: str | None = None
        while True:
            with _uncollected():
                runs = client.search_runs(
                    [found.experiment_id], text, max_results=page, page_token=token
                )
                rows += [_row(run) for run in runs if "colddiff.run_id" in run.data.tags]
            token = runs.token
            if not token:
                break
    frame = pd.DataFrame(rows, columns=None if rows else list(_COLUMNS))
    frame = frame.astype({"T": "Int64", "seed": "Int64"})
    return frame.sort_values("started_ms", ascending=False, kind="stable", ignore_index=True)


def select_runs(experiment: str, uri: str | None = None, preset: str | None = None) -> pd.DataFrame:
    """The runs that tables and figures are made of, of one ``preset`` or of all, newest first.

    These are the newest finished MLflow run of every run id, as far as they are evaluated, with a
    further column ``samples``: how many images of ``split`` that was on.

    Raises:
        AnalysisError: as :func:`load_runs`, and if no run is left, saying what there is.
    """
    import pandas as pd

    runs = load_runs(experiment, uri).drop_duplicates("colddiff_run_id")
    where = f"in experiment {experiment!r}"
    if runs.empty:
        command = f"python jobs/launch.py train --preset {preset or 'demo'}"
        raise AnalysisError(f"no finished run {where}: make one with `{command}`")
    if preset is not None:
        known = ", ".join(sorted(set(runs["preset"])))
        runs = runs[runs["preset"] == preset]
        if runs.empty:
            raise AnalysisError(f"no finished run of preset {preset!r} {where}, which has: {known}")
    results = [name for name in runs if str(name).startswith(RESULT)]
    runs = runs[runs[results].notna().any(axis=1)].reset_index(drop=True)
    if runs.empty:
        raise AnalysisError(
            f"no finished run {where} is evaluated: `python jobs/launch.py evaluate` does it"
        )
    told = runs.reindex(columns=["artifact_uri", f"{RESULT}samples", "split"]).to_numpy().tolist()
    scopes = [_scope(root, samples, split, uri) for root, samples, split in told]
    runs["samples"] = pd.array([samples for samples, _ in scopes], dtype="Int64")
    runs["split"] = pd.Series([split for _, split in scopes], dtype=object)
    return runs


def download(
    run_id: str, artifact: str, uri: str | None = None, folder: Path | None = None
) -> Path:
    """The local path of a run's artifact, copied into ``folder`` where one is given.

    Raises:
        AnalysisError: if the run has no such artifact or the store cannot be read.
    """
    with reading(uri) as client:
        # By artifact URI: the client's own download looks the run up three times a file.
        root = client.get_run(run_id).info.artifact_uri
        if not _exists(f"{root}/{artifact}", uri):
            raise AnalysisError(
                f"MLflow run {run_id} has no artifact {artifact!r}: evaluate the run again with "
                "`python jobs/launch.py evaluate`, or send what is missing with "
                "`python jobs/launch.py sync`"
            )
        return _copied(f"{root}/{artifact}", uri, folder)


def artifacts(run_id: str, folder: str, uri: str | None = None) -> list[str]:
    """The paths of a run's artifacts in ``folder``."""
    with reading(uri) as client:
        return [entry.path for entry in client.list_artifacts(run_id, folder) if not entry.is_dir]


def generated_sets(
    run_id: str, uri: str | None, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sets of images that ``generate`` made of a run: artifact path and record of each.

    The records are copied into ``folder`` on the way.
    """
    with reading(uri) as client:
        root = client.get_run(run_id).info.artifact_uri
        for path in artifacts(run_id, "samples", uri):
            if Path(path).name.startswith("generated-") and path.endswith(".json"):
                yield path, json.loads(_copied(f"{root}/{path}", uri, folder).read_text())


def sampling(runs: pd.DataFrame) -> pd.DataFrame:
    """Those whose networks sample, and do not only restore directly from the last level.

    Raises:
        AnalysisError: where there is none.
    """
    if "params.training.levels" in runs:
        runs = runs[runs["params.training.levels"] != "last"]
    if runs.empty:
        raise AnalysisError("all runs only restore directly: training.levels = last")
    return runs


def recipe_columns(runs: pd.DataFrame) -> list[str]:
    """The parameters that define a run's result, but for its seed, as far as every run has them."""
    from colddiff.config import RunConfig

    names = [f"params.{name}" for name, _ in _identity(RunConfig, "") if name != "training.seed"]
    return [name for name in names if name in runs and runs[name].notna().all()]


def resolve_uri(uri: str | None) -> str:
    """``uri``, or the store that the jobs use by default; SQLite paths absolute."""
    from colddiff.tracking import absolute_uri, default_uri

    return default_uri() if uri is None else absolute_uri(uri)


_COLUMNS = (
    "run_id", "colddiff_run_id", "dataset", "preset", "T", "seed",
    "git_sha", "git_dirty", "status", "started_ms", "artifact_uri", "machine", "split",
    "eval_git_sha",
)  # fmt: skip


def _row(run: Run) -> dict[str, Any]:
    params, tags = run.data.params, run.data.tags
    name = params.get("data.name", "")
    row: dict[str, Any] = {
        "run_id": run.info.run_id,
        "colddiff_run_id": tags["colddiff.run_id"],
        "dataset": Path(params.get("data.folder", "")).name.lower() if name == "folder" else name,
        # The tag is of the last launch; a parameter keeps its first value.
        "preset": tags.get("colddiff.preset") or params.get("preset", ""),
        "T": _integer(params.get("degradation.T")),
        "seed": _integer(params.get("training.seed")),
        "git_sha": tags.get("colddiff.git_sha", ""),
        "git_dirty": tags.get("colddiff.git_dirty", "").lower() == "true",
        "status": run.info.status,
        "started_ms": run.info.start_time,
        "artifact_uri": run.info.artifact_uri,
        "machine": tags.get("colddiff.machine", ""),
        "split": tags.get("colddiff.eval_split"),
        "eval_git_sha": tags.get("colddiff.eval_git_sha", ""),
    }
    row |= _defaults() | {f"params.{key}": value for key, value in params.items()}
    metrics = {f"metrics.{key}": value for key, value in run.data.metrics.items()}
    if "colddiff.eval_keys" in tags:  # MLflow still has those of earlier evaluations
        current = {f"{RESULT}{key}" for key in tags["colddiff.eval_keys"].split()}
        metrics = {k: v for k, v in metrics.items() if not k.startswith(RESULT) or k in current}
    return row | metrics


def _scope(
    root: str, samples: float, split: str | None, uri: str | None
) -> tuple[int | None, str | None]:
    """Samples and split of an evaluation: as MLflow has them, else from its evaluation.json."""
    if samples == samples and isinstance(split, str):
        return int(samples), split
    file = f"{root}/evaluation.json"
    with contextlib.suppress(AnalysisError), tempfile.TemporaryDirectory() as folder, reading(uri):
        if _exists(file, uri):
            value = json.loads(_copied(file, uri, Path(folder)).read_text())
            return int(value["samples"]), str(value["split"])
    return None, None


def _exists(artifact: str, uri: str | None) -> bool:
    """Whether an artifact URI names something."""
    from mlflow.artifacts import list_artifacts

    parent, _, name = artifact.rpartition("/")
    listed = list_artifacts(artifact_uri=parent, tracking_uri=resolve_uri(uri))
    return name in [Path(entry.path).name for entry in listed]


def _copied(artifact: str, uri: str | None, folder: Path | None) -> Path:
    """The local path of what an artifact URI names, copied into ``folder`` where one is given."""
    from mlflow.artifacts import download_artifacts

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    target, store = None if folder is None else str(folder), resolve_uri(uri)
    return Path(download_artifacts(artifact_uri=artifact, dst_path=target, tracking_uri=store))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector, which else takes much of a long query's time.

    SQLAlchemy makes a hundred objects a run, none of them garbage before the page is read.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


@functools.cache
def _defaults() -> dict[str, str]:
    """Parameters that came after runs existed: those have them at their default."""
    from colddiff.config import RunConfig
    from colddiff.schema import is_added

    fields = ((name, item) for name, item in _identity(RunConfig, "") if is_added(item))
    return {f"params.{name}": str(item.default) for name, item in fields}


def _identity(section: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """The dotted names of a configuration class's fields that are part of the run id."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _identity(hints[item.name], f"{prefix}{item.name}.")
        elif item.metadata.get("identity", True):
            yield prefix + item.name, item


def _existing(client: MlflowClient) -> str:
    from colddiff.tracking import mask_secrets

    names = sorted(found.name for found in client.search_experiments(max_results=PAGE))
    return f"in {mask_secrets(client.tracking_uri)}, which has: {', '.join(names) or 'none'}"


@contextlib.contextmanager
def reading(uri: str | None) -> Iterator[MlflowClient]:
    """A client whose failures come out as one :class:`AnalysisError`."""
    from colddiff.tracking import TrackingError, open_client, store_errors
    from colddiff.uris import sqlite_path

    uri = resolve_uri(uri)
    database = sqlite_path(uri)
    if database and not database.is_file():  # MLflow would create an empty store there
        raise AnalysisError(
            f"no MLflow store at {database}: run from the folder that holds mlflow.db, or pass "
            "--tracking-uri"
        )
    try:
        with store_errors(uri):
            yield open_client(uri)
    except (TrackingError, OSError) as error:
        raise AnalysisError(str(error).splitlines()[0]) from error
