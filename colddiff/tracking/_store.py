"""Opening a tracking store: MLflow's environment, the schema and the experiment."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from colddiff.uris import absolute_uri, is_server, mask_secrets, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    # By default a call to a server that is gone blocks for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
LOCK_TIMEOUT_S = 300.0
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's page for training runs; it takes an experiment without traces for one of language models
otherwise."""


class TrackingError(Exception):
    """The tracking store cannot be reached, or refuses; the message holds no secrets."""


def initialise_store(uri: str, experiment: str) -> str:
    """Create the store's schema and the experiment unless they exist; returns the experiment's id.

    Safe from several processes at once: a file lock guards a database's migrations, on which
    processes that open it together would race.

    Raises:
        ValueError: if an experiment of this name exists but is deleted.
        TrackingError: if the store cannot be reached.
    """
    uri = absolute_uri(uri)
    with store_errors(uri), _schema_lock(uri):
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return _create_experiment(client, uri, experiment)
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {experiment!r} is deleted in {mask_secrets(uri)}: choose another name, or "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return str(found.experiment_id)


def set_environment() -> None:
    """Set MLflow's variables where the user has not; some are only read when it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def open_client(uri: str) -> MlflowClient:
    """A client of the store; on a fresh database this runs the migrations."""
    set_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn the errors of MLflow and what it stands on into :class:`TrackingError`.

    Their messages quote the URI with its password, so they are masked and not chained.
    """
    set_environment()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        message = f"MLflow at {uri}: {type(error).__name__}: {error}"
        raise TrackingError(mask_secrets(message)) from None


def _create_experiment(client: MlflowClient, uri: str, experiment: str) -> str:
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    location = None
    if database is not None:
        # Beside the database, wherever this process was started; a server has its own place.
        name = re.sub(r"[^\w.-]", "_", experiment)
        location = str(database.parent / "mlruns" / name)
    try:
        return str(
            client.create_experiment(experiment, artifact_location=location, tags=EXPERIMENT_TAGS)
        )
    except MlflowException:
        found = client.get_experiment_by_name(experiment)  # another process was faster
        if found is None:
            raise
        return str(found.experiment_id)


def _schema_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    if is_server(uri):
        # A server makes its schema before it answers, and waiting for a lock whose holder waits
        # for a dead server helps nobody; experiment names are unique there.
        return contextlib.nullcontext()
    database = sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        path = database.with_name(f"{database.name}.lock")
    else:
        name = f"colddiff-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
        path = Path(tempfile.gettempdir()) / name
    return FileLock(path, timeout=LOCK_TIMEOUT_S)
