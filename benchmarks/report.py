"""All benchmarks in turn: REPORT.md and report.json beside this file, rewritten after each result.

``make bench`` runs it: half an hour on two cores with nothing else to do. A benchmark that fails is
named in the report, and the exit code is 1; a ratio that misses what is wanted is no failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import degradation
import overheads
import packing
import sampling
import table1_runs
import training_step
import tyro
from timing import Result, machine, row

from colddiff.files import write_atomic, write_json
from colddiff.machine import git_dirty, git_sha

BENCHMARKS: dict[str, Callable[[], Iterator[Result]]] = {
    "degradation": degradation.measure,
    "training_step": training_step.measure,
    "sampling": sampling.measure,
    "packing": packing.measure,
    "overheads": overheads.measure,
    "table1_runs": table1_runs.measure,
}


@dataclass
class Report:
    """What was measured so far."""

    where: str
    folder: Path
    results: dict[str, list[Result]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def write(self, seconds: float) -> None:
        """Both files."""
        ratios = {
            each.name: each.ratio for part in self.results.values() for each in part if each.ratio
        }
        value = {
            "commit": git_sha(),
            "dirty": git_dirty(),
            "machine": self.where,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(seconds),
            "ratios": ratios,
            "measured": {e.name: e.text for part in self.results.values() for e in part},
            "failures": self.failures,
        }
        write_json(self.folder / "report.json", value)
        write_atomic(self.folder / "REPORT.md", self._page(seconds))

    def _page(self, seconds: float) -> str:
        lines = [
            "# Benchmarks",
            "",
            "Ratios: the reference's time over ours, or what is allowed over what was measured; "
            "larger is better. Ways are run in turn in one process, medians.",
            "",
            f"- Command: `make bench`, {seconds / 60:.0f} minutes, {time.strftime('%Y-%m-%d')}",
            f"- Machine: {self.where}",
        ]
        for name, results in self.results.items():
            lines += ["", f"## {name}.py", "", "| what | ratio | wanted | measured |"]
            lines += ["|---|---|---|---|", *map(row, results)]
            if name in self.failures:
                lines += ["", f"**Stopped: {self.failures[name]}**"]
        return "\n".join(lines) + "\n"


def main(only: str = "", folder: Path | None = None) -> None:
    """Run the benchmarks.

    Args:
        only: names of some, with commas between; all by default. Their report is of them alone.
        folder: of REPORT.md and report.json; with --only it must be told.
    """
    if folder is None:
        if only:
            print("error: --only would overwrite the whole report: add --folder", file=sys.stderr)
            sys.exit(2)
        folder = Path(__file__).parent
    wanted = only.split(",") if only else list(BENCHMARKS)
    for name in wanted:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            print(f"error: --only {name!r} is no benchmark: there are {known}", file=sys.stderr)
            sys.exit(2)
    report, start = Report(machine(), folder), time.perf_counter()
    print(report.where, flush=True)
    for name in wanted:
        report.results[name] = []
        try:
            for result in BENCHMARKS[name]():
                report.results[name].append(result)
                print(row(result), flush=True)
                report.write(time.perf_counter() - start)
        except Exception as error:  # noqa: BLE001  the others are worth measuring
            report.failures[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {report.failures[name]}", file=sys.stderr)
    report.write(time.perf_counter() - start)
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    tyro.cli(main)
