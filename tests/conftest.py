"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from local_jobs import processes
from tiny import tiny

from colddiff.run_folder import RunFolder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a few steps; do not write into it (see ``copied_run``)."""
    from colddiff.training import train

    folder = RunFolder.create(tmp_path_factory.mktemp("runs"), tiny(steps=6, validate_every=0))
    train(folder)
    return folder


@pytest.fixture
def copied_run(trained_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of ``trained_run`` for this test alone."""
    copy = tmp_path / "runs" / trained_run.path.name
    shutil.copytree(trained_run.path, copy)
    return RunFolder(copy)


@pytest.fixture
def no_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Inception weights are found, whatever lies on this machine."""
    import torch

    from colddiff.metrics import INCEPTION_VARIABLE

    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow asks a server that is gone twice, without the seconds of rest between."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without a GPU, and without other users' launches; no process outlives the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    yield tmp_path
    for process in processes(tmp_path):
        process.kill()
    psutil.wait_procs(processes(tmp_path), timeout=10)
