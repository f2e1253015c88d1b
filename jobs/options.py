"""What the commands share: where things lie, where jobs run, and how they are started."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from colddiff.config import RunConfig
from colddiff.tracking import TrackingError
from colddiff.uris import absolute_uri, default_uri, is_server, mask_secrets
from jobs.cluster import Cluster, run_here, submit_locally
from jobs.tasks import Task


@dataclass(frozen=True)
class Place:
    """Where things lie, for every command."""

    runs: Path = Path("runs")
    """Folder of the run folders."""
    experiment: str = "colddiff"
    """MLflow experiment."""
    tracking_uri: str | None = None
    """MLflow store or server; MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here, by default."""

    def initialise(self) -> None:
        """Create the store's schema and the experiment, before jobs race to do so."""
        from colddiff.tracking import initialise_store

        initialise_store(self.uri, self.experiment)

    @property
    def uri(self) -> str:
        """The tracking URI to use."""
        return absolute_uri(self.tracking_uri) if self.tracking_uri else default_uri()


@dataclass(frozen=True)
class Launch(Place):
    """Where and how jobs run."""

    cluster: Cluster = "local"
    """local: in the background of this machine, one after the other. debug: here and now."""
    data_root: str | None = None
    """Where data sets lie: short for --data.root, kept in the runs' configurations."""

    def launch(self, tasks: Sequence[Task]) -> int:
        """Carry out or submit; prints what became of it."""
        if not tasks:
            return 0
        with self.tolerated():
            self.initialise()
        if self.cluster == "debug":
            for made in run_here([dataclasses.replace(task, progress=True) for task in tasks]):
                say(f"done: {made}")
        else:
            job = submit_locally(tasks, (self.runs / "jobs").absolute())
            say(f"submitted job {job.job_id} with {len(tasks)} runs; it writes {job.stderr}")
            say(f"kill {job.job_id} stops it; the same command goes on")
        uri = mask_secrets(self.uri)
        ui = uri if is_server(uri) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        say(f"MLflow: {ui}")
        return 0

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """A tracking server that is down stops no training: its record is sent later."""
        try:
            yield
        except TrackingError as error:
            if not is_server(self.uri):
                raise
            say(f"warning: {error}\nThe runs go on; python jobs/launch.py sync sends their record")

    def placed(self, config: RunConfig) -> RunConfig:
        """The configuration with the data root of the command line."""
        if self.data_root is None:
            return config
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, root=self.data_root)
        )


def say(text: str) -> None:
    """Print, at once even into a pipe."""
    print(text, flush=True)
