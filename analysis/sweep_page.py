"""The page of a study's report, in Markdown: the answer first."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from analysis.report import Provenance, markdown_table, plural
from analysis.studies import FINISHED, Study, Trial, value

SHOWN = 10
ADJUSTED = (
    "a → b: the study asked for a and the run has b, since no schedule with a blurs as much as the "
    "reference does."
)
MERGED = "a → b: the study asked for a calls and the sampler makes b, since levels fall together."
LINEAR = (
    "Linear RMSE at T: how well a linear (Wiener) estimate in float32 restores training images "
    "from x_T. All schedules leave an equal residual, but nearly flat kernels leave more traces of "
    "fine detail in it. * marks schedules that leave more than the reference's: a network that "
    "restores better has then been given more, so they cannot be the best."
)
CAPTIONS = {
    "history": "Every trial's value, and the best so far. Triangles lie beyond the axis. Dots with "
    "a hole, here and below: schedules that leave more of the images than the reference's.",
    "pareto": "Quality against cost; numbers are those of the trials that none beats in both.",
    "importances": "How much of the differences between the trials each parameter accounts for.",
    "slices": "The values against each parameter, as the runs used it; darker dots came first.",
    "plane": "The value over the cost of sampling and the shape of the schedule.",
    "parallel": "A line a trial, from parameter to parameter.",
}


def answer(study: Study) -> str:
    """The study's result in a sentence or two."""
    best, reference = study.best, study.reference
    several = len(study.objectives) > 1
    front = f" {_span(study)}" if several else ""
    if more := study.better_but_leaving_more:
        front = f" {_leaving_more(study, more)}{front}"
    shown = _with_values(study, best)
    if reference is None:
        state = study.trials[0].state
        return f"The best trial is {shown}. The reference, trial 0, is {state}.{front}"
    there = _with_values(study, reference)
    if best.values == reference.values:
        cost = " and costs no more" if several else ""
        return f"No trial is better than the reference{cost}: that is {there}.{front}"
    gains = [
        f"{abs(gain):.1%} better in {objective.label}"
        for i, objective in enumerate(study.objectives)
        if (gain := objective.gain(value(best, i), value(reference, i)))
    ]
    least = " of those that cost no more than the reference" if several else ""
    better = " and ".join(gains)
    return f"The best trial{least} is {shown}: {better} than the reference, {there}.{front}"


def _leaving_more(study: Study, trial: Trial) -> str:
    """Why the trial with the best value is not the best one."""
    text = f"T{_with_values(study, trial)[1:]} is better still, but has been given more"
    reference = study.reference
    if reference is None or reference.linear_rmse is None or trial.linear_rmse is None:
        return f"{text}."
    return (
        f"{text}: from its x_T a linear estimate restores the images to RMSE "
        f"{trial.linear_rmse:.3f}, from the reference's to {reference.linear_rmse:.3f}."
    )


def _span(study: Study) -> str:
    trials = front_of(study)
    ends = " to ".join(_with_values(study, trials[i]) for i in (0, -1))
    return f"The Pareto front has {plural(len(trials), 'trial')}, from {ends}."


def best_of(study: Study) -> list[Trial]:
    """The best trials, of those that leave no more of the images than the reference."""
    allowed = [trial for trial in study.ranked if not trial.leaves_more]
    return study.distinct(allowed)[:SHOWN] or [study.best]


def better_of_those_given_more(study: Study) -> list[Trial]:
    """The trials that stand before the best one, and are not allowed to."""
    before = study.ranked[: study.ranked.index(study.best)]
    return study.distinct(trial for trial in before if trial.leaves_more)[:SHOWN]


def to_markdown(
    study: Study, summary: dict[str, Any], figures: Sequence[str], out: Path, footer: Provenance
) -> str:
    """The page: the answer, the best trials, seeds, figures, how to repeat it."""
    parts = [f"# Study {study.name}", fill(f"**{answer(study)}**", 100), fill(_basis(study), 100)]
    if len(study.objectives) > 1:
        parts += ["## Pareto front", _table(study, front_of(study))]
    allowed, given_more = best_of(study), better_of_those_given_more(study)
    whole = len(allowed) == len(study.distinct(study.measured))
    parts.append("## All trials" if whole else f"## The best {len(allowed)}")
    parts.append(_table(study, allowed))
    if given_more:
        parts += ["## Better, but given more of the images", _table(study, given_more)]
    if any(trial.adjusted for trial in study.measured):
        parts.append(MERGED if study.settings["space"] == "levels" else ADJUSTED)
    if any(trial.linear_rmse is not None for trial in study.measured):
        parts.append(fill(LINEAR, 100))
    parts += _seeds(summary)
    parts += ["## To repeat it", _commands(study, out)]
    for name in figures:
        parts += [f"![{name}]({name}.png)", CAPTIONS[name]]
    settings = study.settings
    kept = f" but {', '.join(settings['keep'])}" if settings.get("keep") else ""
    parts.append(
        f"Space {settings['space']}{kept} around preset {settings['base']['preset']}, objective "
        f"{settings['objective']}, sampler {settings['sampler']} (seed {settings['seed']}), pruner "
        f"{settings['pruner']}; MLflow run {study.run_id}."
    )
    return "\n\n".join([*parts, footer.markdown()])


def _basis(study: Study) -> str:
    total = len(study.trials)
    finished, failed = study.count(*FINISHED), study.count("failed")
    so_far = "" if finished >= study.wanted else f" (of {study.wanted} wanted: it is not over)"
    ends = [f"{plural(finished, 'trial')} finished{so_far}"]
    ends += [f"{study.count('pruned')} of them pruned"] if study.count("pruned") else []
    ends += [f"{failed} of {total} failed"] if failed else []
    restored = study.settings["objective"] in ("restoration", "direct")
    measured = "validation images" if restored else "generated digits"
    return (
        f"{', '.join(ends)}. The values are of {measured}, one run a trial. The best of many looks "
        "better there than it is: runs with other seeds, and the test split, say by how much."
    )


def _with_values(study: Study, trial: Trial) -> str:
    values = [f"{o.label} {value(trial, i):.4g}" for i, o in enumerate(study.objectives)]
    return f"trial {trial.number} with {', '.join(values)}"


def front_of(study: Study) -> list[Trial]:
    """The trials of the Pareto front, the cheapest first."""
    trials = [trial for trial in study.measured if trial.number in study.front]
    return study.distinct(sorted(trials, key=lambda trial: (value(trial, 1), trial.number)))


def _table(study: Study, trials: Sequence[Trial]) -> str:
    reference = study.reference
    shown = list(trials)
    if reference and reference.number not in [trial.number for trial in trials]:
        shown.append(reference)
    what = f"{study.objectives[0].label}: " if len(study.objectives) > 1 else ""
    gain = [f"{what}better by"] if reference else []
    left = any(trial.linear_rmse is not None for trial in shown)
    header = ["trial", "run", *(o.label for o in study.objectives), *gain, *study.parameters]
    header += ["linear RMSE at T"] if left else []
    header += ["levels"] if study.settings["space"] == "levels" else []
    rows = []
    for trial in shown:
        name = str(trial.number)
        row = [f"{name} (reference)" if trial is reference else name, f"`{trial.run}`"]
        row += [f"{value(trial, i):.5g}" for i in range(len(study.objectives))]
        if reference:
            by = study.objectives[0].gain(value(trial), value(reference))
            row.append("" if trial is reference else f"{by:+.1%}".replace("-0.0", "0.0"))
        row += [_setting(trial, each) for each in study.parameters]
        row += [_left(trial)] if left else []
        rows.append([*row, trial.levels or "all"][: len(header)])
    return markdown_table(header, rows, words=2)


def _left(trial: Trial) -> str:
    star = " *" if trial.leaves_more else ""
    return "" if trial.linear_rmse is None else f"{trial.linear_rmse:.4f}{star}"


def _setting(trial: Trial, name: str) -> str:
    def shown(setting: Any) -> str:
        return f"{setting:.4g}" if isinstance(setting, float) else str(setting)

    asked = shown(trial.params.get(name, ""))
    return f"{asked} → {shown(trial.adjusted[name])}" if name in trial.adjusted else asked


def _seeds(summary: dict[str, Any]) -> Iterator[str]:
    """The table of runs of equal configuration, where there is more to say than the trial did."""
    told = {name: summary[name] for name in ("best", "reference") if summary[name]}
    keys = list(
        dict.fromkeys(
            key
            for each in told.values()
            for run in each["seeds"]
            for key in run
            if key not in ("run", "seed")
        )
    )
    if not any(key.startswith("eval/") for key in keys):
        return
    rows = []
    for name, each in told.items():
        for run in each["seeds"]:
            values = [_number(run.get(key)) for key in keys]
            rows.append([name, f"{run['seed']}", *values])
        if len(each["seeds"]) > 1:
            means = [_mean([run[key] for run in each["seeds"] if key in run]) for key in keys]
            rows.append([name, "mean ± std (n)", *means])
    yield "## Runs of these configurations"
    yield markdown_table(["", "seed", *keys], rows, words=2)
    yield "eval/ is on the split that the run was evaluated on, which training did not see."


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.5g}"


def _mean(numbers: Sequence[float]) -> str:
    if len(numbers) < 2:  # the study's own value, which was chosen for being good
        return ""
    mean, spread = statistics.fmean(numbers), statistics.stdev(numbers)
    return f"{mean:.5g} ± {spread:.2g} ({len(numbers)})"


def _commands(study: Study, out: Path) -> str:
    seed = study.settings["base"]["training"]["seed"]
    file = shlex.quote(str(out / "best.json"))
    lines = [f"python jobs/launch.py train --config {file} --seeds {seed} {seed + 1} {seed + 2}"]
    if study.reference and study.reference.run:
        lines.append(f"# and, to compare it with, the reference: run {study.reference.run}")
    return "\n".join(["```sh", *lines, "```"])
