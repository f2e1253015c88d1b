"""The paper's Table 1 beside ours: degraded, direct and sampled restorations of finished runs.

Ours is the mean over seeds, with the sample standard deviation from two seeds on. Writes
table1.md, table1.csv and table1.tex, and shows the table.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from analysis.report import (
    Options,
    Provenance,
    escape_latex,
    markdown_table,
    plural,
    provenance,
    run_script,
    scope,
)
from analysis.runs import recipe_columns, select_runs

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("degraded", "direct", "sampled")
METRICS = {"rmse": "RMSE", "ssim": "SSIM", "fid_inception": "FID", "fid_digits": "FID(digits)"}
DIGITS = {"rmse": 3, "ssim": 3, "fid_inception": 2, "fid_digits": 2}
PAPER = Path(__file__).with_name("paper_table1.csv")
SUSPECT = ("mnist", "degraded", "ssim")
SAMPLERS = {
    "sampled_algorithm1": "Algorithm 1, all levels",
    "sampled_ddim": "estimated noise (DDIM), all levels",
    "sampled_ddpm": "fresh noise (DDPM), all levels",
}
NOT_IN_PAPER = ("fid_digits", "paper")
SOURCE = "Paper: arXiv:2208.09392, Table 1, as printed."
CONVENTIONS = (
    "Ours: mean over seeds, from two seeds on ± the sample standard deviation; n stands where a "
    "value is not from all of them. Direct is R(x_T, T); sampled is Algorithm 2 over all levels. "
    "FID is on Inception features, and empty where a run had no Inception weights; FID(digits) is "
    "on features of colddiff's digit classifier. Both compare the images a heading names with "
    "their own originals."
)
SUSPECT_NOTE = (
    "† MNIST's degraded SSIM of 0.287 is as printed; it does not come out under any convention "
    "that was tried."
)
DIGITS_NOTE = (
    "The embedded digits set is 5,000 MNIST digits with a split of its own, so the paper's MNIST "
    "row, which is of the full set, is not shown beside it."
)


@dataclass(frozen=True)
class Cell:
    """One number of the table; ``mean`` is None where no run has it, ``std`` below two runs."""

    kind: str
    metric: str
    paper: str
    mean: float | None
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Block:
    """Runs that differ in their seed alone; ``cells`` are by kind, then by metric."""

    dataset: str
    preset: str
    T: str
    samples: int | None
    split: str | None
    seeds: int
    cells: tuple[Cell, ...]
    others: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """What all cells share."""
        return f"{self.dataset}, preset {self.preset}, T = {self.T}"

    @property
    def basis(self) -> str:
        """What the numbers rest on."""
        return f"{plural(self.seeds, 'seed')}, {scope(self.samples, self.split)}"


def paper_values() -> dict[tuple[str, str, str], str]:
    """(dataset, kind, metric) -> the printed number, FID under ``fid_inception``."""
    names = {"fid": "fid_inception"}
    with PAPER.open(newline="") as file:
        return {
            (row["dataset"], row["kind"], names.get(row["metric"], row["metric"])): row["value"]
            for row in csv.DictReader(file)
        }


def build(runs: pd.DataFrame) -> tuple[Block, ...]:
    """Blocks of runs of the same dataset, preset and T, as :func:`select_runs` gives them.

    Runs of one preset with different overrides, or evaluated on different images, are different
    blocks: their mean would be of nothing. What they differ in is added to the preset's name.
    """
    blocks = []
    for (dataset, preset, T), group in runs.groupby(["dataset", "preset", "T"], dropna=False):
        columns = [*recipe_columns(group), "samples", "split"]
        differing = [name for name in columns if group[name].nunique(dropna=False) > 1]
        parts = group.groupby(differing, dropna=False) if differing else [((), group)]
        for values, part in parts:
            pairs = zip(differing, values, strict=True)
            text = ", ".join(f"{name.removeprefix('params.')}={value}" for name, value in pairs)
            label = f"{preset}[{text}]" if text else str(preset)
            blocks.append(_block(str(dataset), label, str(T), part))
    return tuple(blocks)


def to_csv(blocks: Iterable[Block]) -> str:
    """One row a cell; a field without a value is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("dataset preset T kind metric paper mean std seeds samples".split())
    for block in blocks:
        for cell in block.cells:
            head = (block.dataset, block.preset, block.T, cell.kind, cell.metric, cell.paper)
            samples = "" if block.samples is None else block.samples
            writer.writerow((*head, _exact(cell.mean), _exact(cell.std), cell.seeds, samples))
    return text.getvalue()


def to_markdown(blocks: Sequence[Block], footer: Provenance) -> str:
    """A table a block, the other samplers, notes and provenance."""
    parts = ["# Restoration: the paper's Table 1 and ours", fill(f"{SOURCE} {CONVENTIONS}", 100)]
    for block in blocks:
        parts += [f"## {block.title}", f"{block.basis[0].upper()}{block.basis[1:]}."]
        rows = [[kind, *_values(block, kind, "±")] for kind in KINDS]
        header = ["", *(f"{METRICS[metric]} {whose}" for metric, whose in _columns())]
        parts.append(markdown_table(header, rows))
    others = [
        [block.title, name, *(_shown(cell, block.seeds, "±") for cell in cells)]
        for block in blocks
        for name, cells in _others(block)
    ]
    if others:
        header = ["", "sampler", *METRICS.values()]
        parts += ["## Other samplers", markdown_table(header, others, words=2)]
    parts += [fill(note, 100) for note in _notes(blocks)]
    return "\n\n".join([*parts, footer.markdown()])


def to_latex(blocks: Sequence[Block], footer: Provenance) -> str:
    """A plain tabular for an input command; it needs no package."""
    columns = _columns()
    width = len(columns) + 1
    tops = (
        rf"\multicolumn{{{sum(name == metric for name, _ in columns)}}}{{c}}{{{title}}}"
        for metric, title in METRICS.items()
    )
    lines = [
        *(f"% {line}" for line in (SOURCE, CONVENTIONS, *footer.lines())),
        r"{\small\setlength{\tabcolsep}{3pt}%",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\hline",
        " & ".join(["", *tops]) + r" \\",
        " & ".join(["", *(whose for _, whose in columns)]) + r" \\",
    ]
    for block in blocks:
        heading = escape_latex(f"{block.title} ({block.basis})")
        lines += [r"\hline", rf"\multicolumn{{{width}}}{{l}}{{{heading}}} \\"]
        for kind in KINDS:
            lines.append(" & ".join([kind, *map(_math, _values(block, kind, r"\pm"))]) + r" \\")
    lines.append(r"\hline")
    for note in _notes(blocks):
        text = rf"\footnotesize {escape_latex(note)}"
        lines.append(rf"\multicolumn{{{width}}}{{p{{0.95\linewidth}}}}{{{text}}} \\")
    return "\n".join([*lines, r"\end{tabular}}", ""])


def _block(dataset: str, preset: str, T: str, runs: pd.DataFrame) -> Block:
    paper = paper_values()
    found = (re.fullmatch(r"metrics\.eval/([^/]+)/\w+", str(column)) for column in runs)
    kinds = {match[1] for match in found if match}

    def cell(kind: str, metric: str) -> Cell:
        name = f"metrics.eval/{kind}/{metric}"
        values = [float(v) for v in runs[name] if _number(v)] if name in runs else []
        return Cell(
            kind,
            metric,
            paper.get((dataset, kind, metric), ""),
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    others = [cell(kind, metric) for kind in sorted(kinds - {*KINDS}) for metric in METRICS]
    first = runs.iloc[0]
    return Block(
        dataset=dataset,
        preset=preset,
        T=T,
        samples=None if first.isna()["samples"] else int(first["samples"]),
        split=None if first.isna()["split"] else str(first["split"]),
        seeds=len(runs),
        cells=tuple(cell(kind, metric) for kind in KINDS for metric in METRICS),
        others=tuple(others),
    )


def _columns() -> list[tuple[str, str]]:
    """(metric, whose) of the columns of numbers: the paper has no FID(digits)."""
    whose = ("paper", "ours")
    return [(name, who) for name in METRICS for who in whose if (name, who) != NOT_IN_PAPER]


def _values(block: Block, kind: str, plus_minus: str) -> list[str]:
    """The texts of a row, under :func:`_columns`."""
    texts = []
    cells = {cell.metric: cell for cell in block.cells if cell.kind == kind}
    for metric, whose in _columns():
        cell = cells[metric]
        mark = " †" if (block.dataset, kind, metric) == SUSPECT else ""
        ours = whose == "ours"
        texts.append(_shown(cell, block.seeds, plus_minus) if ours else cell.paper + mark)
    return texts


def _shown(cell: Cell, seeds: int, plus_minus: str) -> str:
    if cell.mean is None:
        return ""
    digits = DIGITS[cell.metric]
    text = f"{cell.mean:.{digits}f}"
    if cell.std is not None:
        text += f" {plus_minus} {cell.std:.{digits}f}"
    return text if cell.seeds == seeds else f"{text} (n = {cell.seeds})"


def _others(block: Block) -> Iterator[tuple[str, list[Cell]]]:
    for kind in dict.fromkeys(cell.kind for cell in block.others):
        cells = [cell for cell in block.others if cell.kind == kind]
        if any(cell.mean is not None for cell in cells):
            yield _sampler(kind), cells


def _sampler(kind: str) -> str:
    """A readable name of an evaluation's further kinds."""
    if kind in SAMPLERS:
        return SAMPLERS[kind]
    levels = re.search(r"\d+(?:-\d+)+", kind)
    return f"Algorithm 2, levels {levels[0]}" if levels else kind


def _notes(blocks: Sequence[Block]) -> list[str]:
    datasets = {block.dataset for block in blocks}
    notes = {"mnist": SUSPECT_NOTE, "digits": DIGITS_NOTE}
    return [note for dataset, note in notes.items() if dataset in datasets]


def _math(text: str) -> str:
    number, _, rest = text.partition(" (")
    number = number.replace(" †", r"^\dagger")
    return " (".join([f"${number}$", *([rest] if rest else [])]) if number else ""


def _number(value: float) -> bool:
    """Whether a run has this metric: not NaN, and not infinity, which SQL stores as the maximum."""
    return abs(value) < sys.float_info.max


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def make(options: Options) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    runs = select_runs(options.experiment, options.tracking_uri, options.preset)
    blocks, footer = build(runs), provenance(runs, options)
    markdown = to_markdown(blocks, footer)
    write_atomic(options.out / "table1.md", markdown)
    write_atomic(options.out / "table1.csv", to_csv(blocks))
    write_atomic(options.out / "table1.tex", to_latex(blocks, footer))
    sys.stdout.write(markdown)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, Options, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
