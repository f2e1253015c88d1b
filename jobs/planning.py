"""What a launch would do, run by run: nothing is submitted twice, nothing complete is repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from jobs.states import Job
from jobs.tasks import AnyTask, EvaluateTask, Task, TrainTask, is_claimed


@dataclass(frozen=True)
class Planned:
    """A task, what was found of it, and whether there is something to do."""

    task: AnyTask
    found: str
    """complete, running, queued as 12_3, new, resume at step 400, trained, to evaluate."""
    wanted: bool


def plan(
    tasks: Sequence[AnyTask],
    living: Mapping[tuple[str, str], Job],
    configs: Mapping[str, RunConfig] | None = None,
) -> list[Planned]:
    """What to do for each task.

    Args:
        tasks: one a run.
        living: queued and running jobs, by run and kind.
        configs: the configurations of runs that have no folder yet, by run name.
    """
    return [_planned(task, living, configs or {}) for task in tasks]


def _planned(
    task: AnyTask, living: Mapping[tuple[str, str], Job], configs: Mapping[str, RunConfig]
) -> Planned:
    job = living.get((task.run, task.kind))
    # A queued evaluation with other settings is other work; two trainings of a run are the same.
    if job and (task.kind == "train" or job.entry.task == _as_json(task)):
        return Planned(task, str(job), wanted=False)
    if not isinstance(task, Task):
        return Planned(task, "new", wanted=True)
    folder = RunFolder(Path(task.folder))
    if folder.lock.exists() and is_claimed(folder):
        return Planned(task, "running", wanted=False)
    if isinstance(task, TrainTask):
        return _training(task, folder, configs.get(task.run))
    if isinstance(task, EvaluateTask) and _is_evaluated(folder, task):
        return Planned(task, "complete", wanted=False)
    return Planned(task, "trained", wanted=True)


def _training(task: TrainTask, folder: RunFolder, config: RunConfig | None) -> Planned:
    from colddiff.checkpoint import checkpoints
    from colddiff.evaluation import is_evaluated

    if folder.is_trained:
        settings = (config or folder.config).evaluation
        if not task.evaluate or is_evaluated(folder, settings):
            return Planned(task, "complete", wanted=False)
        return Planned(task, "trained, to evaluate", wanted=True)
    saved = checkpoints(folder.checkpoints)
    if saved:
        step = int(saved[-1].stem.removeprefix("step-"))
        return Planned(task, f"resume at step {step}", wanted=True)
    return Planned(task, "new", wanted=True)


def _is_evaluated(folder: RunFolder, task: EvaluateTask) -> bool:
    from colddiff.evaluation import is_evaluated

    return is_evaluated(folder, task.evaluation)


def _as_json(task: AnyTask) -> dict[str, object]:
    """As the ledger gives a task back: lists inside it are lists."""
    import json

    values: dict[str, object] = json.loads(json.dumps(task.to_dict()))
    return values


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    lines = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
