"""Where runs stand, read from their folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from colddiff.files import read_json
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder
from jobs.tasks import is_claimed

COLUMNS = ("run", "state", "step", "images/s", "ETA", "last metrics")


@dataclass(frozen=True)
class Row:
    """One run."""

    run: str
    state: str
    step: int
    steps: int
    images_per_second: float | None
    seconds_left: float | None
    metrics: dict[str, float]

    def cells(self) -> tuple[str, ...]:
        """Texts for the table."""
        rate = "" if self.images_per_second is None else f"{self.images_per_second:.0f}"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return (
            self.run,
            self.state,
            f"{self.step}/{self.steps}",
            rate,
            _duration(self.seconds_left),
            metrics,
        )


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
            found.append(RunFolder.find(Path(name)))
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


def settle(folder: RunFolder) -> None:
    """Record that a run whose process is gone was interrupted."""
    status = folder.status()
    if status and status.state == "running" and not is_claimed(folder):
        message = "its process is gone"
        folder.write_status("interrupted", status.step, status.steps, message)


def row(folder: RunFolder) -> Row:
    """Where one run stands; a run that says it is running but has no process was interrupted."""
    try:
        config = folder.config
    except ValueError:
        return Row(folder.path.name, "unreadable", 0, 0, None, None, {})
    status = folder.status()
    state: str = "new" if status is None else status.state
    if state == "running" and not is_claimed(folder):
        state = "interrupted"
    elif state == "finished" and is_claimed(folder):
        state = "at work"
    elif state == "finished":
        state = "evaluated" if folder.evaluation.exists() else "trained"
    step = 0 if status is None else status.step
    latest: dict[str, float] = {}
    if folder.journal.exists():
        for record in read_records(folder.journal)[0]:
            latest |= record.metrics
    rate = latest.get("speed/images_per_second")
    left = None
    if rate and state == "running":
        settings = config.training
        left = (settings.steps - step) * settings.batch_size * settings.accumulation / rate
    shown = {"loss": "train/loss", "RMSE": "validation/rmse", "SSIM": "validation/ssim"}
    metrics = {name: latest[key] for name, key in shown.items() if key in latest}
    if state == "evaluated":
        metrics = _evaluated(folder)
    return Row(folder.path.name, state, step, config.training.steps, rate, left, metrics)


def table(rows: Iterable[Row]) -> str:
    """Aligned columns under a header."""
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _evaluated(folder: RunFolder) -> dict[str, float]:
    kinds = read_json(folder.evaluation)["kinds"]
    return {
        f"{kind} {name.upper()}": kinds[kind][name]
        for kind in ("direct", "sampled")
        for name in ("rmse", "ssim")
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}min"
