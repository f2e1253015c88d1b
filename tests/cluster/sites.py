"""Fixtures: an MLflow server, a user's folder on the cluster, runs that nothing happened to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT, Site, wait_for
from slurm_cluster import SlurmCluster

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder

TRAIN = (
    "import sys; from pathlib import Path; from colddiff.run_folder import RunFolder;"
    "from colddiff.training import train; train(RunFolder(Path(sys.argv[1])))"
)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real tracking server; its address."""
    place = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{place}/mlflow.db"]
    command += ["--artifacts-destination", str(place / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def answers() -> bool:
        try:
            path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
            with urllib.request.urlopen(uri + path, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        wait_for("the MLflow server", answers)
        yield uri
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def site(slurm: SlurmCluster, mlflow_server: str, tmp_path: Path) -> Iterator[Site]:
    """A working folder of its own, and an empty queue before and after."""
    site = Site(tmp_path / "site", slurm, mlflow_server, experiment=tmp_path.name)
    yield site
    slurm.cancel_all()


@pytest.fixture(scope="session")
def reference(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunFolder]:
    """The same run, uninterrupted: in one process here, or, given words, as a job of its own."""
    place = tmp_path_factory.mktemp("reference")
    made: dict[tuple[str, ...], RunFolder] = {}

    def reference(run: RunConfig, *words: str) -> RunFolder:
        key = (run.to_json(), *words)  # the weights' file has the whole configuration in it
        if key not in made:
            runs = place / str(len(made))
            if words:
                alone = Site(runs, slurm, "http://127.0.0.1:9")
                alone.train(run, "--offline", "--wait", *words)
                made[key] = alone.folder(run)
            else:
                folder = made[key] = RunFolder.create(runs, run)
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-c", TRAIN, str(folder.path)]
                subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return made[key]

    return reference
