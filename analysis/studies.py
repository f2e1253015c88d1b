"""A study as MLflow has it: its parent run's artifacts and the runs of its trials."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.runs import AnalysisError, download, load_runs, reading, recipe_columns

if TYPE_CHECKING:
    import pandas as pd

RECORDED = "colddiff.recorded"
FINISHED = ("complete", "pruned")
SAMPLED = ("rmse", "ssim", "fid_digits")


@dataclass(frozen=True)
class Objective:
    """One value that the study optimises."""

    key: str
    label: str
    direction: str
    """minimize or maximize."""

    @property
    def sign(self) -> int:
        """By which values are multiplied so that less is better."""
        return 1 if self.direction == "minimize" else -1

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return f"{self.label}\n{'lower' if self.sign == 1 else 'higher'} is better"

    def gain(self, value: float, reference: float) -> float:
        """How much better the value is than the reference's, relative to that."""
        return self.sign * (reference - value) / abs(reference) if reference else 0.0


@dataclass(frozen=True)
class Trial:
    """One trial; ``values`` are None unless it is complete."""

    number: int
    state: str
    run: str | None
    params: Mapping[str, Any]
    """As they were asked for."""
    adjusted: Mapping[str, Any]
    """Those of them that the run could not keep, as they are in it."""
    levels: str
    """That its sampler visits, ``20-10-0``; empty for all."""
    values: tuple[float, ...] | None
    linear_rmse: float | None = None
    """Of a linear estimate from x_T: how much the schedule leaves. None where all leave alike."""
    leaves_more: bool = False
    """Whether that is more than the reference's leaves: then it cannot be the best."""

    @property
    def used(self) -> dict[str, Any]:
        """The parameters of the run."""
        return {**self.params, **self.adjusted}

    @property
    def is_measured(self) -> bool:
        """Whether it is complete, with finite values."""
        return self.values is not None and all(map(math.isfinite, self.values))


@dataclass(frozen=True)
class Study:
    """A study, as far as it was recorded."""

    name: str
    run_id: str
    """MLflow's."""
    settings: Mapping[str, Any]
    """study.json."""
    wanted: int
    objectives: tuple[Objective, ...]
    parameters: Mapping[str, Mapping[str, Any]]
    """Their ranges: choices, or low, high and log."""
    trials: tuple[Trial, ...]
    reference_number: int | None
    front: tuple[int, ...]
    """The best trial, or those of the Pareto front."""
    importances: Mapping[str, Mapping[str, float]]
    """By value, then by parameter."""
    runs: pd.DataFrame = field(compare=False)
    """The experiment's finished runs, the newest of every run id."""

    @property
    def measured(self) -> list[Trial]:
        """The complete trials."""
        return [trial for trial in self.trials if trial.is_measured]

    @property
    def reference(self) -> Trial | None:
        """The complete trial of the base's own values."""
        number = self.reference_number
        return None if number is None else self.trials[number]

    @property
    def ranked(self) -> list[Trial]:
        """The complete trials, the best by the first value first, then by the second."""
        signs = [objective.sign for objective in self.objectives]
        return sorted(
            self.measured,
            key=lambda t: (*(sign * value(t, i) for i, sign in enumerate(signs)), t.number),
        )

    @property
    def best(self) -> Trial:
        """The best trial among those whose schedules leave no more than the reference's.

        Of several values, by the first, among those that are no worse than the reference in the
        others: quality alone would take the most expensive trial.
        """
        allowed = [trial for trial in self.ranked if not trial.leaves_more] or self.ranked
        reference = self.reference
        if len(self.objectives) == 1 or reference is None:
            return allowed[0]
        return next(trial for trial in allowed if self._is_as_cheap(trial, reference))

    @property
    def better_but_leaving_more(self) -> Trial | None:
        """The best of those that would beat the best trial, but blur less."""
        first = self.ranked[0]
        return first if first.leaves_more and first.number != self.best.number else None

    def _is_as_cheap(self, trial: Trial, reference: Trial) -> bool:
        return all(
            objective.sign * value(trial, i) <= objective.sign * value(reference, i)
            for i, objective in enumerate(self.objectives)
            if i
        )

    def distinct(self, trials: Iterable[Trial]) -> list[Trial]:
        """Of trials that came to the same configuration only the first."""
        found: dict[str, Trial] = {}
        for trial in trials:
            found.setdefault(f"{trial.run} {trial.levels}", trial)
        return list(found.values())

    def count(self, *states: str) -> int:
        """How many trials are in one of these states."""
        return sum(trial.state in states for trial in self.trials)


def value(trial: Trial, index: int = 0) -> float:
    """One value of a complete trial."""
    assert trial.values is not None, "only complete trials are measured"
    return trial.values[index]


def read_study(experiment: str, name: str, uri: str | None, folder: Path) -> Study:
    """The newest study of that name; its artifacts are copied into ``folder``.

    Raises:
        AnalysisError: if there is none, naming those there are, and if no trial is complete.
    """
    runs = load_runs(experiment, uri).drop_duplicates("colddiff_run_id")
    run_id = _find(experiment, name, uri)
    settings, record, importances = (
        json.loads(download(run_id, f"{file}.json", uri, folder).read_text())
        for file in ("study", "trials", "importances")
    )
    study = Study(
        name=name,
        run_id=run_id,
        settings=settings,
        wanted=record["wanted"],
        objectives=tuple(Objective(**each) for each in record["values"]),
        parameters=record["parameters"],
        trials=tuple(_trial(each) for each in record["trials"]),
        reference_number=record["reference"],
        front=tuple(record["front"]),
        importances=importances,
        runs=runs,
    )
    if not study.measured:
        raise AnalysisError(
            f"study {name!r} has no complete trial yet: {study.count('running')} running, "
            f"{study.count('failed')} failed, {study.count('pruned')} pruned"
        )
    return study


def seeds_of(study: Study, trial: Trial) -> list[dict[str, Any]]:
    """The tracked runs that differ from the trial's in nothing but the seed, with their results."""
    runs = study.runs
    own = runs[runs["colddiff_run_id"] == trial.run]
    if own.empty:
        return []
    columns = recipe_columns(runs)
    same = runs[(runs[columns] == own.iloc[0][columns]).all(axis=1)]
    kind = f"sampled_{trial.levels}" if trial.levels else "sampled"
    kind = "direct" if study.settings["objective"] == "direct" else kind
    wanted = {f"eval/{kind}/{metric}": f"metrics.eval/{kind}/{metric}" for metric in SAMPLED}
    if study.settings["space"] != "levels":  # whose trials have their values on one run
        wanted |= {f"objective/{o.key}": f"metrics.objective/{o.key}" for o in study.objectives}
    found = []
    for run in same.sort_values("seed").to_dict("records"):
        results = {key: run[column] for key, column in wanted.items() if column in run}
        numbers = {key: float(each) for key, each in results.items() if each == each}
        found.append({"run": run["colddiff_run_id"], "seed": int(run["seed"]), **numbers})
    return found


def _trial(values: Mapping[str, Any]) -> Trial:
    numbers = values["values"]
    return Trial(
        number=values["number"],
        state=values["state"],
        run=values["run"],
        params=values["params"],
        adjusted=values["user_attrs"].get("adjusted", {}),
        levels=values["levels"],
        values=None if numbers is None else tuple(numbers),
        linear_rmse=values.get("linear_rmse"),
        leaves_more=values.get("leaves_more", False),
    )


def _find(experiment: str, name: str, uri: str | None) -> str:
    with reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        assert found is not None, "its runs were read before"
        runs = client.search_runs(
            [found.experiment_id], "tags.`colddiff.kind` = 'study'", order_by=["start_time ASC"]
        )
    names = {run.data.tags["colddiff.study"]: run for run in runs}  # the newest of a name
    if name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise AnalysisError(f"no study {name!r} in experiment {experiment!r}, which has: {known}")
    run = names[name]
    if RECORDED not in run.data.tags:
        raise AnalysisError(
            f"study {name!r} has no complete trial in MLflow yet; if it has some on disk, "
            "`python sweeps/launch.py sync` sends them"
        )
    return str(run.info.run_id)
