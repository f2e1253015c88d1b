"""What MLflow is told about a study, as JSON values; nothing here calls MLflow."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from colddiff.uris import mask_secrets
from sweeps.objective import directions, value_names
from sweeps.space import SCHEDULES, SpaceName, configured, visited
from sweeps.terminal import linear_rmse

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from sweeps.study import StudyConfig

FEWEST_TRIALS = 4
"""Complete ones, below which importances would be of chance."""
TREES = 16
"""Of the random forest: with 64, Optuna's default, 300 trials take six seconds instead of two."""
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
FINISHED = ("complete", "pruned")


@dataclass(frozen=True)
class Value:
    """One value of a study's objective."""

    key: str
    """In MLflow, below ``objective/`` and ``best/``."""
    label: str
    direction: str
    """minimize or maximize."""

    def better(self, a: float, b: float) -> float:
        """The better one of two."""
        return min(a, b) if self.direction == "minimize" else max(a, b)


@dataclass(frozen=True)
class Point:
    """Where the study stood when a trial had finished."""

    finished: int
    time_ms: int
    best: dict[str, float]
    """By key; empty before the first complete trial."""


def values_of(config: StudyConfig) -> list[Value]:
    """What the study optimises. A run may have values of several studies, so that keys differ."""
    match config.objective:
        case "restoration":
            keys: list[str] = [config.metric]
        case "direct":
            keys = [f"direct_{config.metric}"]
        case "generation":
            keys = ["fid_digits"]
        case "pareto":
            keys = ["fid_digits", "calls"]
    labels = value_names(config.objective, config.metric)
    ways = directions(config.objective, config.metric)
    return [Value(*each) for each in zip(keys, labels, ways, strict=True)]


def params(config: StudyConfig) -> dict[str, str]:
    """The parent run's parameters; of the storage only its kind."""
    scheme = config.storage_url.partition("://")
    return {
        "space": config.space,
        **({"keep": " ".join(config.keep)} if config.keep else {}),
        "objective": config.objective,
        "metric": " ".join(value.key for value in values_of(config)),
        "sampler": config.sampler,
        "pruner": config.pruner,
        "preset": config.base.preset,
        "trials": str(config.trials),
        "seed": str(config.seed),
        "storage": scheme[0] if scheme[1] else "journal",
    }


def study_record(study: Study, config: StudyConfig) -> dict[str, Any]:
    """All that is known of the study: ``trials.json``, from which the report is made."""
    trials = study.get_trials(deepcopy=False)
    record = {
        "study": config.name,
        "wanted": config.trials,
        "values": [vars(value) for value in values_of(config)],
        "parameters": _parameters(trials),
        "reference": _reference(trials),
        "front": _front(study, trials),
        "trials": [_trial(trial, config) for trial in trials],
    }
    # An error's text may quote an address with its password.
    masked: dict[str, Any] = json.loads(mask_secrets(json.dumps(record)))
    return masked


def counts(record: Mapping[str, Any]) -> dict[str, int]:
    """Metrics: how many trials have come to which end."""
    found = Counter(trial["state"] for trial in record["trials"])
    finished = sum(found[state] for state in FINISHED)
    ends = {f"trials/{state}": found[state] for state in ("complete", "pruned", "failed")}
    return {"trials/finished": finished} | ends


def progress(record: Mapping[str, Any]) -> Iterator[Point]:
    """The best values so far, after each trial that finished; none infinite, all feasible."""
    values = [Value(**value) for value in record["values"]]
    done = [trial for trial in record["trials"] if trial["state"] in FINISHED]
    best: dict[str, float] = {}
    for finished, trial in enumerate(sorted(done, key=_ended), start=1):
        told = () if trial["leaves_more"] else trial["values"] or ()
        for value, number in zip(values, told, strict=False):
            if math.isfinite(number):
                best[value.key] = value.better(number, best.get(value.key, number))
        yield Point(finished, trial["finished_ms"], dict(best))


def importances(study: Study, config: StudyConfig) -> dict[str, dict[str, float]]:
    """By value, then by parameter: the share of the variance that fANOVA ascribes to it.

    Empty with too few trials, or where nothing varies. PED-ANOVA, Optuna's default, looks at the
    best tenth, which with tens of trials are two or three of them.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    trials = [trial for trial in trials if all(map(math.isfinite, trial.values))]
    names = {name for trial in trials for name in trial.params}
    varying = [n for n in sorted(names) if len({trial.params.get(n) for trial in trials}) > 1]
    if len(trials) < FEWEST_TRIALS or not varying:
        return {}
    found = {}
    for index, value in enumerate(values_of(config)):
        if len({trial.values[index] for trial in trials}) < 2:
            continue
        shares = get_param_importances(
            study,
            evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=0),
            params=varying,
            target=lambda trial, index=index: trial.values[index],  # type: ignore[misc]
        )
        found[value.key] = {name: float(share) for name, share in shares.items()}
    return found


def best_configs(record: Mapping[str, Any], config: StudyConfig) -> dict[str, RunConfig]:
    """``best.json``, or of several values ``pareto/<trial>.json``: what repeats the best trials.

    Taken from their run folders, never worked out again: another machine's last bits would make
    another run of it.
    """
    found = {}
    for number in record["front"]:
        own = trial_config(record["trials"][number], config)
        if own is not None:
            found["best.json" if len(record["values"]) == 1 else f"pareto/{number}.json"] = own
    return found


def trial_config(trial: Mapping[str, Any], config: StudyConfig) -> RunConfig | None:
    """A trial's configuration, None where its run folder is gone."""
    folder = RunFolder(Path(config.runs) / str(trial["run"]))
    if trial["run"] is None or not folder.config_file.exists():
        return None
    if config.space != "levels":
        return folder.config
    return configured("levels", trial["params"], folder.config)[0]  # trials share a run's folder


def note(record: Mapping[str, Any]) -> str:
    """What MLflow's page of the study says first."""
    total = counts(record)
    said = [
        f"{total['trials/finished']} of {record['wanted']} trials are finished "
        f"({total['trials/pruned']} of them pruned); {total['trials/failed']} failed."
    ]
    if len(record["values"]) > 1:
        said.append(f"Pareto front: trials {', '.join(map(str, record['front']))}.")
        return "\n\n".join(said)
    named = {"Best": record["front"], "Reference": [record["reference"]]}
    for name, numbers in named.items():
        trials = [record["trials"][number] for number in numbers if number is not None]
        for trial in trials:
            label, value = record["values"][0]["label"], trial["values"][0]
            said.append(f"{name}: {label} {value:.5g}, trial {trial['number']} ({trial['run']}).")
    return "\n\n".join(said)


def _trial(trial: FrozenTrial, config: StudyConfig) -> dict[str, Any]:
    values = trial.values if trial.state.name == "COMPLETE" else None
    return {
        "number": trial.number,
        "state": STATES.get(trial.state.name, trial.state.name.lower()),
        "run": trial.user_attrs.get("run"),
        "params": trial.params,
        "levels": _levels(trial, config),
        "values": values,
        "linear_rmse": _linear_rmse(config.runs, trial.user_attrs.get("run"), config.space),
        "leaves_more": any(value > 0 for value in trial.constraints.values()),
        "intermediate": {str(k): v for k, v in sorted(trial.intermediate_values.items())},
        "user_attrs": trial.user_attrs,
        "started_ms": milliseconds(trial.datetime_start),
        "finished_ms": milliseconds(trial.datetime_complete),
    }


def _levels(trial: FrozenTrial, config: StudyConfig) -> str:
    """The levels that the objective's sampler visits, ``20-10-0``; empty for all of them."""
    match config.space:
        case "levels" if len(trial.params) == 2:
            T = config.base.degradation.T
            levels = visited(T, **trial.params)
            return "" if len(levels) == T + 1 else "-".join(map(str, levels))
        case "recipe" if config.objective != "direct":
            return next(iter(config.base.evaluation.levels), "")
        case _:
            return ""


@functools.lru_cache(maxsize=4096)
def _linear_rmse(runs: str, run: str | None, space: SpaceName) -> float | None:
    """How much the schedule of a trial's run leaves, see :func:`sweeps.terminal.linear_rmse`.

    None where all trials blur alike, or where the run or the data are not here.
    """
    if space not in SCHEDULES or run is None:
        return None
    try:
        config = RunFolder(Path(runs) / run).config
        return linear_rmse(config.degradation, config.data)
    except (FileNotFoundError, ValueError):
        return None


def milliseconds(time: datetime | None) -> int | None:
    """Unix time; Optuna's times are local and do not say so."""
    return None if time is None else round(time.timestamp() * 1000)


def _ended(trial: Mapping[str, Any]) -> tuple[int, int]:
    return trial["finished_ms"], trial["number"]


def _front(study: Study, trials: Sequence[FrozenTrial]) -> list[int]:
    """The best feasible trial, the first of equals; of several values all that none beats."""
    complete = [
        trial
        for trial in trials
        if trial.state.name == "COMPLETE" and not any(v > 0 for v in trial.constraints.values())
    ]
    if len(study.directions) > 1 or not complete:
        return sorted(trial.number for trial in study.best_trials) if complete else []
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return [min(complete, key=lambda trial: (sign * trial.values[0], trial.number)).number]


def _reference(trials: Sequence[FrozenTrial]) -> int | None:
    """The complete trial of the base's own values, with which trial 0 was enqueued."""
    if not trials:
        return None
    wanted = trials[0].params or trials[0].system_attrs.get("fixed_params")
    same = (t.number for t in trials if t.state.name == "COMPLETE" and t.params == wanted)
    return next(same, None)


def _parameters(trials: Sequence[FrozenTrial]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            found.setdefault(name, _range(distribution))
    return found


def _range(distribution: BaseDistribution) -> dict[str, Any]:
    """``choices``, or ``low``, ``high`` and whether the scale is logarithmic."""
    attributes = vars(distribution)
    if "choices" in attributes:
        return {"choices": list(attributes["choices"])}
    return {name: attributes[name] for name in ("low", "high", "log")}
