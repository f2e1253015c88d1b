"""What Table 1 is made of: runs that differ in their seed alone, beside the printed values."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.report import plural, scope
from analysis.runs import recipe_columns

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("degraded", "direct", "sampled")
METRICS = {"rmse": "RMSE", "ssim": "SSIM", "fid_inception": "FID", "fid_digits": "FID(digits)"}
NO_RUN = "no finished run"
PAPER = Path(__file__).with_name("paper_table1.csv")


@dataclass(frozen=True)
class Cell:
    """One number of the table; ``mean`` is None where no run has it, ``std`` below two runs."""

    kind: str
    metric: str
    paper: str
    mean: float | None
    std: float | None
    seeds: int

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where there are both."""
        return self.mean - float(self.paper) if self.paper and self.mean is not None else None


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
        preset = f", preset {self.preset}, T = {self.T}" if self.seeds else ""
        return f"{self.dataset}{preset}"

    @property
    def basis(self) -> str:
        """What the numbers rest on."""
        if not self.seeds:
            return NO_RUN
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
    """Blocks of runs of the same dataset, preset and T, as :func:`select_runs` gives them."""
    return tuple(_block(*group) for group in recipes(runs))


def recipes(runs: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Dataset, name, T and runs of each recipe; its runs differ in their seed alone.

    Runs of one preset with different overrides, or evaluated on different images, are different
    recipes: their mean would be of nothing. What they differ in is added to the preset's name.
    """
    for (dataset, preset, T), group in runs.groupby(["dataset", "preset", "T"], dropna=False):
        columns = [*recipe_columns(group), "samples", "split"]
        differing = [name for name in columns if group[name].nunique(dropna=False) > 1]
        parts = group.groupby(differing, dropna=False) if differing else [((), group)]
        for values, part in parts:
            pairs = zip(differing, values, strict=True)
            text = ", ".join(f"{name.removeprefix('params.')}={value}" for name, value in pairs)
            label = f"{preset}[{text}]" if text else str(preset)
            yield str(dataset), label, str(T), part


def without_runs(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The paper's data sets that none of ``blocks`` is of, with its values alone."""
    paper, there = paper_values(), {block.dataset for block in blocks}
    return tuple(
        Block(
            dataset=dataset,
            preset="",
            T="",
            samples=None,
            split=None,
            seeds=0,
            cells=tuple(
                Cell(kind, metric, paper.get((dataset, kind, metric), ""), None, None, 0)
                for kind in KINDS
                for metric in METRICS
            ),
            others=(),
        )
        for dataset in dict.fromkeys(dataset for dataset, _, _ in paper)
        if dataset not in there
    )


def _block(dataset: str, preset: str, T: str, runs: pd.DataFrame) -> Block:
    degradations = runs["params.degradation.kind"] if "params.degradation.kind" in runs else ()
    paper = {} if "noise" in [*degradations] else paper_values()  # which are of blur
    found = (re.fullmatch(r"metrics\.eval/([^/]+)/\w+", str(column)) for column in runs)
    kinds = {match[1] for match in found if match}

    def cell(kind: str, metric: str) -> Cell:
        name = f"metrics.eval/{kind}/{metric}"
        values = [float(v) for v in runs[name] if is_number(v)] if name in runs else []
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


def is_number(value: float) -> bool:
    """Whether a run has this metric: not NaN, and not infinity, which SQL stores as the maximum."""
    return abs(value) < sys.float_info.max
