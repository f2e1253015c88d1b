"""What the scripts share: command-line options, one-line errors, the provenance of a result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from analysis.runs import AnalysisError, resolve_uri
from colddiff.uris import mask_secrets, sqlite_path

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Options:
    """Options of every script."""

    experiment: str
    """MLflow experiment to read."""
    out: Path
    """Folder for the results; made where it does not exist."""
    tracking_uri: str | None = None
    """MLflow store; by default MLFLOW_TRACKING_URI, else ./mlflow.db."""
    preset: str | None = None
    """Only runs of this preset."""


AnyOptions = TypeVar("AnyOptions", bound=Options)


def run_script(
    work: Callable[[AnyOptions], None],
    options: type[AnyOptions],
    description: str | None,
    args: Sequence[str] | None,
) -> int:
    """Parse ``args`` and do ``work``; the exit code: 0, or 2 after one line about a mistake."""
    import tyro

    parsed = tyro.cli(options, args=args, description=description)
    try:
        work(parsed)
    except (AnalysisError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


@dataclass(frozen=True)
class Provenance:
    """Where a table or figure comes from."""

    experiment: str
    uri: str
    date: str
    runs: tuple[str, ...]
    """One line a run: its id, seed, commit, what it was evaluated on and MLflow's id."""
    seeds: tuple[int, ...]

    def summary(self) -> str:
        """One line without the list of runs."""
        seeds = f"{plural(len(self.seeds), 'seed')} ({', '.join(map(str, self.seeds))})"
        return (
            f"Experiment {self.experiment} at {self.uri}; {self.date}; "
            f"{plural(len(self.runs), 'run')}, {seeds}."
        )

    def lines(self) -> list[str]:
        """The summary and every run."""
        return [self.summary(), *self.runs]

    def markdown(self) -> str:
        """A footer for a Markdown file."""
        return "\n".join(["---", "", self.summary(), "", *(f"- {run}" for run in self.runs)]) + "\n"


def provenance(runs: pd.DataFrame, options: Options) -> Provenance:
    """The provenance of a result made from ``runs``, as they come from :func:`select_runs`."""
    return Provenance(
        experiment=options.experiment,
        uri=_shown(resolve_uri(options.tracking_uri)),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=tuple(_line(run) for run in runs.sort_values("colddiff_run_id").to_dict("records")),
        seeds=tuple(sorted({int(seed) for seed in runs["seed"].dropna()})),
    )


def _shown(uri: str) -> str:
    """Without secrets; of a local database the name alone, as its folder tells nobody else much."""
    path = sqlite_path(uri)
    return f"sqlite:///{path.name}" if path else mask_secrets(uri)


def scope(samples: int | None, split: str | None) -> str:
    """``1,000 test images``."""
    return f"{samples:,} {split or ''} images".replace("  ", " ") if samples else "not evaluated"


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def markdown_table(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are text; padded, to read well on a terminal too."""
    columns = zip(header, *rows, strict=True)
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for row in (header, rule, *rows):
        fields = [
            text.ljust(width) if i < words else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines)


def escape_latex(text: str) -> str:
    """``text`` as LaTeX shows it literally."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "†": r"$^\dagger$"} | {c: "\\" + c for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)


def _line(run: dict[Any, Any]) -> str:
    # Several commits where an interrupted run was continued with other code.
    commits = " and ".join(sha[:12] for sha in run["git_sha"].split(",")) or "unknown"
    dirty = " with uncommitted changes" if run["git_dirty"] else ""
    evaluated = f", evaluated at {run['eval_git_sha']}" if run["eval_git_sha"] else ""
    return (
        f"{run['colddiff_run_id']}: seed {run['seed']}, commit {commits}{dirty}{evaluated}, "
        f"{scope(run['samples'], run['split'])}, MLflow run {run['run_id']}"
    )
