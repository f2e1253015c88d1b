"""What a launch would do, run by run: nothing is submitted twice, nothing complete is repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colddiff.config import EvaluationConfig, GenerationConfig, RunConfig
from colddiff.run_folder import RunFolder
from jobs.ledger import Work, work_of
from jobs.states import Job
from jobs.tasks import AnyTask, EvaluateTask, GenerateTask, Task, TrainTask, is_claimed

if TYPE_CHECKING:
    from jobs.cluster import Submitted


@dataclass(frozen=True)
class Planned:
    """A task, what was found of it, and whether there is something to do."""

    task: AnyTask
    found: str
    """complete, running, queued as 12_3, new, resume at step 400, trained, to evaluate."""
    wanted: bool


def plan(
    tasks: Sequence[AnyTask],
    living: Mapping[Work, Job],
    configs: Mapping[str, RunConfig] | None = None,
) -> list[Planned]:
    """What to do for each task.

    Args:
        tasks: one a run.
        living: queued and running jobs, by what they do.
        configs: the configurations of runs that have no folder yet, by run name.
    """
    return [_planned(task, living, configs or {}) for task in tasks]


def _planned(
    task: AnyTask, living: Mapping[Work, Job], configs: Mapping[str, RunConfig]
) -> Planned:
    job = living.get(work_of(task.run, task.kind, task.to_dict()))
    if job:
        return Planned(task, str(job), wanted=False)
    if not isinstance(task, Task):
        return Planned(task, "new", wanted=True)
    folder = RunFolder(Path(task.folder))
    at_work = folder.lock.exists() and is_claimed(folder)
    if isinstance(task, TrainTask):
        if at_work:
            return Planned(task, "running", wanted=False)
        return _training(task, folder, configs.get(task.run))
    if isinstance(task, EvaluateTask) and is_measured(folder, task.evaluation):
        return Planned(task, "complete", wanted=False)
    if isinstance(task, GenerateTask) and folder.is_generated(task.settings):
        return Planned(task, "complete", wanted=False)
    return Planned(task, "trained, in use: waits" if at_work else "trained", wanted=True)


def _training(task: TrainTask, folder: RunFolder, config: RunConfig | None) -> Planned:
    from colddiff.checkpoint import checkpoints

    if folder.is_trained:
        wanted = config or folder.config
        if not task.evaluate or is_measured(folder, wanted.evaluation, wanted.generation):
            return Planned(task, "complete", wanted=False)
        return Planned(task, "trained, to evaluate", wanted=True)
    saved = checkpoints(folder.checkpoints)
    if saved:
        step = int(saved[-1].stem.removeprefix("step-"))
        return Planned(task, f"resume at step {step}", wanted=True)
    return Planned(task, "new", wanted=True)


def is_measured(
    folder: RunFolder,
    evaluation: EvaluationConfig,
    generation: Sequence[GenerationConfig] | None = None,
) -> bool:
    """Whether a trained run was evaluated so, and its sets of images (its own by default) exist."""
    from colddiff.evaluation import is_evaluated

    sets = folder.config.generation if generation is None else generation
    return is_evaluated(folder, evaluation) and all(map(folder.is_generated, sets))


def table(planned: Sequence[Planned], submitted: Mapping[tuple[str, str], Submitted]) -> str:
    """What was found, and what was submitted, run by run."""
    rows = [("run", "work", "found", "job")]
    for each in planned:
        job = submitted.get((each.task.run, each.task.kind))
        rows.append((each.task.run, each.task.kind, each.found, job.job_id if job else ""))
    return aligned(rows)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    lines = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
