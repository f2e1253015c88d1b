"""Small studies for tests, and what became of their trials."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from tiny import tiny

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from sweeps.study import StudyConfig, create_study
from sweeps.worker import WorkerTask


def small_study(runs: Path, trials: int = 3, base: RunConfig | None = None, **values: Any) -> Any:
    """A study of the recipe around ``tiny``, with random parameters."""
    settings = {"name": "small", "space": "recipe", "sampler": "random"} | values
    base = tiny() if base is None else base
    return StudyConfig(base=base, runs=str(runs), trials=trials, **settings)


def recipe(index: int, dim: int = 4) -> dict[str, Any]:
    """Parameters of a trial of :func:`small_study`, another one for every index."""
    return {
        "lr": 1e-3 * (1 + index / 7),
        "dim": dim,
        "loss": ("l1", "l2")[index % 2],
        "lr_schedule": "constant",
        "ema_decay": 0.9,
    }


def created(config: StudyConfig, *enqueued: dict[str, Any]) -> optuna.Study:
    """The study, with these trials after the reference."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = create_study(config)
    for params in enqueued:
        study.enqueue_trial(params)
    return study


def worker(config: StudyConfig, number: int = 0, **values: Any) -> WorkerTask:
    return WorkerTask(str(config.folder), number=number, **values)


def raised(config: StudyConfig, trials: int) -> StudyConfig:
    """The study with another number of trials, in its file too."""
    config = dataclasses.replace(config, trials=trials)
    create_study(config)
    return config


def states(study: optuna.Study) -> list[str]:
    """Of the trials, in order."""
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def run_of(config: StudyConfig, trial: FrozenTrial) -> RunFolder:
    return RunFolder(Path(config.runs) / trial.user_attrs["run"])
