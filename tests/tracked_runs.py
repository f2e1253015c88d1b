"""Small MLflow stores for the tests of analysis, written by MLflow's own client."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colddiff.config import RunConfig
from colddiff.tracking import initialise_store

EXPERIMENT = "study"


def fresh_store(folder: Path) -> str:
    """Make ``mlflow.db`` in the folder, without runs; its address."""
    path = folder / "mlflow.db"
    path.write_bytes(_migrated())
    return f"sqlite:///{path}"


@functools.cache
def _migrated() -> bytes:
    """An SQLite store with its schema: its migrations take seconds, so they run once."""
    with tempfile.TemporaryDirectory() as folder:
        initialise_store(f"sqlite:///{folder}/mlflow.db", "Default")
        return Path(folder, "mlflow.db").read_bytes()


class Store:
    """A store in ``folder`` with one empty experiment."""

    def __init__(self, folder: Path, experiment: str = EXPERIMENT) -> None:
        from mlflow import MlflowClient

        self.uri = fresh_store(folder)
        self.client = MlflowClient(self.uri)
        self.experiment_id = self.client.create_experiment(
            experiment, artifact_location=(folder / "artifacts").as_uri()
        )

    def log(
        self,
        run_id: str = "run",
        *,
        seed: int = 0,
        dataset: str = "mnist",
        preset: str = "mnist",
        metrics: dict[str, float] | None = None,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        status: str = "FINISHED",
        start: int = 1_000,
        samples: int | None = 10_000,
        split: str | None = "test",
        without: tuple[str, ...] = (),
    ) -> str:
        """Log a run as colddiff.tracking does; ``metrics`` are below ``eval/``."""
        from mlflow.entities import Metric, Param

        client = self.client
        all_tags = {"colddiff.run_id": run_id, "colddiff.preset": preset}
        all_tags |= {"colddiff.git_sha": "0123456789abcdef", "colddiff.git_dirty": "false"}
        if split is not None:
            all_tags["colddiff.eval_split"] = split
        run = client.create_run(self.experiment_id, start, all_tags | (tags or {}))
        values = RunConfig().flat() | {"data.name": dataset, "training.seed": seed}
        values |= params or {}
        logged = {"samples": samples} if samples is not None and metrics else {}
        client.log_batch(
            run.info.run_id,
            metrics=[
                Metric(f"eval/{key}", value, start, 0)
                for key, value in ((metrics or {}) | logged).items()
            ],
            params=[Param(key, str(value)) for key, value in values.items() if key not in without],
        )
        if status != "RUNNING":
            client.set_terminated(run.info.run_id, status, start + 500)
        return str(run.info.run_id)

    def add_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Upload an artifact."""
        self.client.log_artifact(run_id, str(path), folder)


def restorations(path: Path, index: list[int], label: list[int], channels: int = 1) -> Path:
    """Write a restorations file with random 32 x 32 images; returns ``path``."""
    random = np.random.default_rng(0)
    size = (len(index), 32, 32, channels)
    images = {
        name: random.integers(0, 256, size, dtype=np.uint8)
        for name in ("degraded", "direct", "sampled", "original")
    }
    np.savez_compressed(path, **images, index=np.array(index), label=np.array(label))
    return path


def three_seeds(store: Store) -> None:
    """0.1, 0.2, 0.6: mean 0.3, sample variance (0.04 + 0.01 + 0.09) / 2 = 0.07."""
    for seed, value in enumerate((0.1, 0.2, 0.6)):
        metrics = {"direct/rmse": value, "direct/fid_digits": 100 * value, "sampled/ssim": value}
        store.log(f"mnist-seed{seed}", seed=seed, metrics=metrics)


def table1(store: Store, *options: str) -> Path:
    """Run analysis/table1.py on the store; the folder of its results."""
    from analysis.table1 import main

    out = Path(store.uri.removeprefix("sqlite:///")).parent / "out"
    arguments = ["--experiment", EXPERIMENT, "--out", str(out), "--tracking-uri", store.uri]
    assert main([*arguments, *options]) == 0
    return out


def error_line(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The one line on stderr with which ``main`` ends with exit code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err
