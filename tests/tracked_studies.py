"""Small real studies without training: what they optimise is a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.trial import TrialState
from tiny import tiny

from colddiff.files import write_json
from colddiff.run_folder import RunFolder
from sweeps.space import suggest
from sweeps.study import StudyConfig, create_study, open_study

Formula = Callable[[dict[str, Any]], tuple[float, ...]]


def small_config(folder: Path, **settings: Any) -> StudyConfig:
    """Of the space recipe around the tiny base, with random trials."""
    defaults: dict[str, Any] = {
        "name": "small",
        "space": "recipe",
        "sampler": "random",
        "trials": 6,
        "base": tiny(),
        "runs": str(folder / "runs"),
    }
    return StudyConfig(**(defaults | settings))


def valley(params: dict[str, Any]) -> tuple[float, ...]:
    """Lowest at a learning rate of 0.003; the width matters a little, the rest not at all."""
    return (0.1 + 0.01 * (math.log10(params["lr"]) + 2.5) ** 2 + 0.0001 * params["dim"],)


def hill(params: dict[str, Any]) -> tuple[float, ...]:
    """The valley upside down."""
    return (1 - valley(params)[0],)


def quality_and_calls(params: dict[str, Any]) -> tuple[float, ...]:
    """Of the space levels: the more calls the better, but the reference is none too good."""
    return (10 / params["calls"] + abs(params["exponent"] - 2), float(params["calls"]))


def run_trials(
    config: StudyConfig,
    formula: Formula,
    count: int,
    *,
    pruned: Collection[int] = (),
    failed: Collection[int] = (),
) -> Study:
    """Create the study and tell it so many trials; their run folders look trained."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    create_study(config)
    study = open_study(config, 0)
    for _ in range(count):
        trial = study.ask()
        begin(trial, config)
        if trial.number in failed:
            trial.set_user_attr("error", "RuntimeError: at http://ann:hunter2@host")
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.number in pruned:
            trial.report(9.0, 10)
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study.tell(trial.number, list(formula(trial.params)))
    return study


def begin(trial: Trial, config: StudyConfig) -> RunFolder:
    """Give the trial its run, as a worker does."""
    wanted = suggest(config.space, trial, config.base, config.keep)
    own = config.base if config.space == "levels" else wanted
    folder = RunFolder.create(Path(config.runs), own)
    attempt = {"started_ms": 1_700_000_000_000 + trial.number, "git_sha": "a" * 40}
    if not folder.environment.exists():
        write_json(folder.environment, {"attempts": [attempt]})
    folder.write_status("finished", 30, 30)
    trial.set_user_attr("run", folder.path.name)
    return folder


def values(study: Study) -> list[float | None]:
    """The first value of each trial."""
    return [
        trial.values[0] if trial.state == TrialState.COMPLETE else None for trial in study.trials
    ]
