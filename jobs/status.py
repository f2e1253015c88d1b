"""Where runs stand: their folders beside what the schedulers say of their jobs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colddiff.config import RunConfig
from colddiff.files import read_json
from colddiff.run_folder import RunFolder
from jobs.diagnosis import Diagnosis
from jobs.ledger import Ledger
from jobs.planning import aligned
from jobs.standing import NO_JOBS, standing, standing_of_report
from jobs.states import Job
from jobs.survey import Survey, last_process

COLUMNS = ("run", "job", "state", "step", "images/s", "ETA", "last metrics", "attempts", "node")
SHOWN = {"loss": "train/loss", "RMSE": "validation/rmse", "SSIM": "validation/ssim"}
RATE = "speed/images_per_second"
BLOCK = 64 * 1024


@dataclass(frozen=True)
class Row:
    """One run."""

    run: str
    state: str
    step: int = 0
    steps: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    job: str = ""
    detail: str = ""
    """More about the state, such as why a job is pending."""
    attempts: int = 0
    """How often training was started."""
    node: str = ""
    diagnosis: Diagnosis | None = None

    def cells(self) -> tuple[str, ...]:
        """Texts for the table."""
        rate = "" if self.images_per_second is None else f"{self.images_per_second:.0f}"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return (
            self.run,
            self.job,
            f"{self.state} ({self.detail})" if self.detail else self.state,
            f"{self.step}/{self.steps}" if self.steps else "",
            rate,
            self.eta,
            metrics,
            str(self.attempts or ""),
            self.node,
        )

    @property
    def eta(self) -> str:
        """How long training still takes."""
        return _duration(self.seconds_left)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: a value that is not finite is null."""
        values = dataclasses.asdict(self)
        values["metrics"] = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return values

    def paragraph(self) -> str:
        """What went wrong, and what to do."""
        if self.diagnosis is None:
            return ""
        found = self.diagnosis
        lines = [f"{self.run}: {found.cause}: {found.text}", *(f"    {s}" for s in found.trace)]
        return "\n".join([*lines, *([f"  try: {found.advice}"] if found.advice else [])])


def run_folders(runs: Path) -> list[RunFolder]:
    """All runs below ``runs``, by name."""
    return [RunFolder(path.parent) for path in sorted(runs.glob("*/config.json"))]


def find_runs(runs: Path, names: Sequence[str]) -> list[RunFolder]:
    """The named runs: paths, or names (or beginnings of names) below ``runs``; all for no names.

    Raises:
        ValueError: for a name that fits no run, or several.
    """
    if not names:
        return run_folders(runs)
    found = []
    for name in names:
        if name and (Path(name) / "config.json").is_file():
            found.append(_of(runs, Path(name)))
            continue
        folders = run_folders(runs)
        fits: list[RunFolder] = [folder for folder in folders if folder.path.name == name]
        for beginning in (f"{name}-", name) if name else ():  # seed2 before seed21
            fits = fits or [f for f in folders if f.path.name.startswith(beginning)]
        if len(fits) != 1:
            which = ": " + ", ".join(folder.path.name for folder in fits) if fits else ""
            what = f"{len(fits) or 'no'} run{'s' if fits else ''}"
            raise ValueError(f"{name!r} names {what} below {runs}{which}; see launch.py status")
        found += fits
    return found


def _of(runs: Path, path: Path) -> RunFolder:
    """The run folder, which must be one of ``runs``: equal runs elsewhere have equal names."""
    if path.resolve().parent != runs.resolve():
        raise ValueError(f"{path} is not in {runs}: give --runs {path.resolve().parent}")
    return RunFolder.find(path)


def find_trained(runs: Path, names: Sequence[str]) -> list[RunFolder]:
    """The named runs that are trained; raises ``ValueError`` for a named one that is not."""
    found = find_runs(runs, names)
    if names:
        for folder in found:
            if not folder.is_trained:
                raise ValueError(
                    f"{folder.path.name} is not trained yet: see python jobs/launch.py status"
                )
    found = [folder for folder in found if folder.is_trained]
    if not found:
        raise ValueError(f"no trained run below {runs}: make one with python jobs/launch.py train")
    return found


def find_names(runs: Path, names: Sequence[str]) -> list[str]:
    """Names of runs, and of reports, which have jobs but no folder; all for no names.

    Raises:
        ValueError: as :func:`find_runs`.
    """
    submitted = {run for run, _ in Ledger(runs).latest()}
    if not names:
        return sorted(submitted | {folder.path.name for folder in run_folders(runs)})
    found = []
    for name in names:
        known = name in submitted and not (runs / name).exists()
        found.append(name if known else find_runs(runs, [name])[0].path.name)
    return list(dict.fromkeys(found))


def rows(folders: Iterable[RunFolder], survey: Survey, *, reports: bool = False) -> list[Row]:
    """Where the runs stand, and with ``reports`` also the jobs that belong to no single run."""
    found = [row(folder, survey) for folder in folders]
    others = [job for job in survey.jobs if reports and job.entry.kind == "report"]
    return found + [report_row(job, survey) for job in others]


def row(folder: RunFolder, survey: Survey = NO_JOBS) -> Row:
    """Where one run stands."""
    try:
        config, status = folder.config, folder.status()
    except (ValueError, TypeError):
        return Row(folder.path.name, "unreadable")
    job = survey.main_job(folder)
    found = standing(folder, status, job, survey)
    step = 0 if status is None else status.step
    latest = last_values(folder.journal, _expected(config, step))
    rate, left = latest.get(RATE), None
    if rate and found.state == "running":
        settings = config.training
        left = (settings.steps - step) * settings.batch_size * settings.accumulation / rate
    metrics = {name: latest[key] for name, key in SHOWN.items() if key in latest}
    return Row(
        run=folder.path.name,
        state=found.state,
        step=step,
        steps=config.training.steps,
        images_per_second=rate,
        seconds_left=left,
        metrics=_evaluated(folder) if found.state == "evaluated" else metrics,
        job=job.entry.job_id if job else "",
        detail=found.detail,
        attempts=_attempts(folder),
        node=_node(folder, job, found.state),
        diagnosis=found.diagnosis,
    )


def report_row(job: Job, survey: Survey) -> Row:
    """Where a job stands that belongs to no single run."""
    found, nodes = standing_of_report(job, survey), job.slurm.nodes if job.slurm else ""
    return Row(
        job.entry.run,
        found.state,
        job=job.entry.job_id,
        detail=found.detail,
        node=nodes,
        diagnosis=found.diagnosis,
    )


def table(found: Sequence[Row]) -> str:
    """Aligned columns under a header, and below what went wrong."""
    paragraphs = filter(None, (row.paragraph() for row in found))
    return "\n\n".join([aligned([COLUMNS, *(row.cells() for row in found)]), *paragraphs])


def last_values(journal: Path, keys: set[str]) -> dict[str, float]:
    """The last value of each key, read from the end: a journal can have 100,000 lines."""
    found: dict[str, float] = {}
    try:
        with journal.open("rb") as file:
            start, rest = file.seek(0, 2), b""
            while start and keys - found.keys():
                length = min(BLOCK, start)
                start -= length
                file.seek(start)
                block = file.read(length) + rest
                first = block.find(b"\n") + 1 if start else 0  # before it, half a line
                rest = block[:first]
                for key in keys - found.keys():
                    value = _last_value(block[first:], key)
                    if value is not None:
                        found[key] = value
    except FileNotFoundError:
        pass
    return found


def _last_value(lines: bytes, key: str) -> float | None:
    """The value of a key in the last whole line that has it."""
    end = lines.rfind(b"\n") + 1  # the last line may be torn
    at = lines.rfind(f'"{key}":'.encode(), 0, end)
    if at < 0:
        return None
    line = lines[lines.rfind(b"\n", 0, at) + 1 : lines.find(b"\n", at)]
    try:
        return float(json.loads(line)["metrics"][key])
    except (ValueError, KeyError, TypeError):
        return None  # of a damaged journal, which resuming the run will report


def _expected(config: RunConfig, step: int) -> set[str]:
    """The metrics that the journal must have by now."""
    settings = config.training
    if step < settings.log_every:
        return set()
    measured = bool(settings.validate_every) and step >= settings.validate_every
    return {RATE, "train/loss", *({"validation/rmse", "validation/ssim"} if measured else ())}


def _attempts(folder: RunFolder) -> int:
    try:
        return len(read_json(folder.environment)["attempts"])
    except FileNotFoundError:
        return 0


def _node(folder: RunFolder, job: Job | None, state: str) -> str:
    if job and job.slurm:
        return job.slurm.nodes
    working = state in ("running", "evaluating", "generating")
    return str(last_process(folder).get("host", "")) if working else ""


def _evaluated(folder: RunFolder) -> dict[str, float]:
    kinds = read_json(folder.evaluation)["kinds"]
    return {
        f"{kind} {name.upper()}": kinds[kind][name]
        for kind in ("direct", "sampled")
        if kind in kinds  # what restores directly and no more is not sampled
        for name in ("rmse", "ssim")
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}min"
