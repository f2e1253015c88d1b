"""Hot beside cold: blur and Gaussian noise with one network, one training and equal sampling cost.

Compares the runs of an experiment by what they restore from each level (evaluation.by_level) and by
the digits that `launch.py generate` made of them. Writes hot_cold.md, .csv, .png, .pdf, and
generated.png, .pdf.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.pictures import COLORS, GREY, WIDTH, image_rows, new_figure, render
from analysis.report import Options, Provenance, markdown_table, plural, provenance, run_script
from analysis.runs import (
    AnalysisError,
    artifacts,
    download,
    generated_sets,
    sampling,
    select_runs,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SHOWN = 12
"""Images of each set in the figure."""
SAMPLERS = {
    ("blur", "algorithm1"): "Algorithm 1",
    ("blur", "algorithm2"): "Algorithm 2",
    ("noise", "algorithm1"): "Algorithm 1, fixed noise",
    ("noise", "algorithm2"): "Algorithm 2, fixed noise",
    ("noise", "ddim"): "estimated noise (DDIM)",
    ("noise", "ddpm"): "fresh noise (DDPM)",
}


@dataclass(frozen=True)
class Generated:
    """One set of generated images of a run."""

    run: Run
    record: dict[str, Any]
    images: NDArray[np.uint8] | None
    """The first of them, ``n h w c``; None where MLflow does not have them."""

    @property
    def sampler(self) -> str:
        """Which sampler, from which start, over which levels."""
        settings = self.record["settings"]
        name = SAMPLERS[self.run.kind, settings["algorithm"]]
        if settings.get("weights") == "raw":
            name += ", raw weights"
        if settings.get("step"):
            name += f", step {settings['step']}"
        if self.run.kind == "blur":
            components = settings["components"]
            start = {
                "real": "x_T of training images",
                "means": f"means, {plural(components, 'component')}",
                "terminals": f"a model of x_T, {plural(components, 'component')}",
            }[settings["start"]]
            name += f", from {start}, noise {settings['symmetry_noise']:g}"
        return f"{name}, levels {settings['levels']}" if settings["levels"] else name

    @property
    def seconds_per_image(self) -> float:
        """Time of sampling alone."""
        return float(self.record["sampling_seconds"]) / int(self.record["settings"]["n"])


@dataclass(frozen=True)
class Run:
    """One run, with what was restored and generated of it."""

    run_id: str
    dataset: str
    preset: str
    T: int
    kind: str
    seed: int
    by_level: tuple[dict[str, float], ...]

    @property
    def title(self) -> str:
        """How tables call it and the other seeds, which they average over."""
        word = "hot" if self.kind == "noise" else "cold"
        return f"{word}: {self.preset}, T = {self.T}"


def read(runs: pd.DataFrame, uri: str | None) -> tuple[list[Run], list[Generated]]:
    """The runs and their generated sets, from MLflow's artifacts.

    Raises:
        AnalysisError: where nothing was restored level by level and nothing generated.
    """
    found, sets = [], []
    with tempfile.TemporaryDirectory() as folder:
        for row in runs.to_dict("records"):
            local = Path(folder, row["run_id"])
            evaluation = json.loads(
                download(row["run_id"], "evaluation.json", uri, local).read_text()
            )
            run = Run(
                run_id=row["colddiff_run_id"],
                dataset=row["dataset"],
                preset=row["preset"],
                T=int(row["T"]),
                kind=row["params.degradation.kind"],
                seed=int(row["seed"]),
                by_level=tuple(evaluation.get("by_level", ())),
            )
            found.append(run)
            for path, record in generated_sets(row["run_id"], uri, local):
                sets.append(Generated(run, record, _first_images(row["run_id"], path, uri, local)))
    if not sets and not any(run.by_level for run in found):
        raise AnalysisError(
            "no run was restored level by level, and none has generated images: "
            "python jobs/launch.py evaluate --evaluation.by-level 2000, "
            "python jobs/launch.py generate --n 2000"
        )
    found.sort(key=lambda run: (run.dataset, run.kind, run.T, run.preset, run.seed))
    sets.sort(key=lambda each: (found.index(each.run), each.sampler, each.record["settings"]["n"]))
    return found, sets


def _first_images(
    run_id: str, record: str, uri: str | None, folder: Path
) -> NDArray[np.uint8] | None:
    name = str(Path(record).with_suffix(".npz"))
    if name not in artifacts(run_id, "samples", uri):
        return None
    with np.load(download(run_id, name, uri, folder)) as arrays:
        images: NDArray[np.uint8] = arrays["images"][:SHOWN]
    return images


def to_csv(runs: Iterable[Run]) -> str:
    """One row a level."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("run kind T seed t degraded_rmse rmse ssim".split())
    for run in runs:
        for level in run.by_level:
            values = (level["degraded_rmse"], level["rmse"], level["ssim"])
            exact = (f"{value:.10g}" for value in values)
            writer.writerow([run.run_id, run.kind, run.T, run.seed, level["t"], *exact])
    return text.getvalue()


def to_markdown(runs: Sequence[Run], sets: Sequence[Generated], footer: Provenance) -> str:
    """The figure, the two tables and provenance."""
    parts = ["# Hot and cold diffusion"]
    if any(run.by_level for run in runs):
        parts += [
            "![RMSE of direct restoration against the level](hot_cold.png)",
            "## Restoration\n\nDirectly from D(x0, t), the same images for all; of noise, one draw "
            "an image.",
            _restoration([run for run in runs if run.by_level]),
        ]
    if sets:
        header = ["", "sampler", "seeds", "images each", "network calls", "FID(digits)"]
        header += ["class distance", "zeros", "blank", "unreadable", "ms an image"]
        drawn = any(each.images is not None for each in sets)
        parts += [
            "## Generation\n\nMeans over seeds. FID(digits) and total variation of the classes "
            "from the training digits'; compare FID for equal numbers of images. "
            "Of real test digits 1 % are unreadable.",
            markdown_table(header, [_generation(group) for group in _grouped(sets)], words=2),
            *(["![The first images of each](generated.png)"] if drawn else []),
        ]
    return "\n\n".join([*parts, footer.markdown()])


def _restoration(runs: Sequence[Run]) -> str:
    rows = []
    for title in dict.fromkeys(run.title for run in runs):
        group = [run for run in runs if run.title == title]
        T = group[0].T
        for t in sorted({max(1, round(T * q / 4)) for q in (1, 2, 3, 4)}):
            means = [
                f"{statistics.fmean(run.by_level[t - 1][name] for run in group):.3f}"
                for name in ("degraded_rmse", "rmse", "ssim")
            ]
            rows.append([title, f"{t} of {T}", str(len(group)), *means])
    header = ["", "level t", "seeds", "RMSE of x_t", "RMSE restored", "SSIM"]
    return markdown_table(header, rows, words=2)


def _grouped(sets: Sequence[Generated]) -> list[list[Generated]]:
    """Sets that differ in nothing but the seed of their run."""
    groups: dict[tuple[str, str, int], list[Generated]] = {}
    for each in sets:
        key = (each.run.title, each.sampler, int(each.record["settings"]["n"]))
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _row_title(each: Generated) -> str:
    word = "hot" if each.run.kind == "noise" else "cold"
    return f"{word}, T = {each.run.T}: {each.sampler}"


def _generation(group: Sequence[Generated]) -> list[str]:
    first = group[0]
    n = int(first.record["settings"]["n"])
    qualities = [each.record["quality"] or {} for each in group]

    def mean(name: str, form: str) -> str:
        values = [quality[name] for quality in qualities if name in quality]
        return format(statistics.fmean(values), form) if values else ""

    zeros = [quality["counts"][0] / n for quality in qualities if "counts" in quality]
    time = statistics.fmean(each.seconds_per_image for each in group) * 1000
    return [
        first.run.title,
        first.sampler,
        str(len(group)),
        f"{n:,}",
        str(first.record["network_calls"]),
        mean("fid_digits", ".2f"),
        mean("total_variation", ".3f"),
        f"{statistics.fmean(zeros):.1%}" if zeros else "",
        mean("blank_rate", ".1%"),
        mean("unreadable_rate", ".1%"),
        f"{time:.1f}",
    ]


def draw(runs: Sequence[Run]) -> Figure:
    """Restored against level, and restored against degraded: at equal loss, which is easier?"""
    figure = new_figure(WIDTH, 3.2)
    left, right = figure.subplots(1, 2, sharey=True)
    axes: Sequence[Axes] = (left, right)
    for color, run in zip(COLORS * 10, runs, strict=False):
        dashed = "--" if run.kind == "noise" else "-"
        style: dict[str, Any] = {"color": color, "linestyle": dashed, "marker": "o"}
        style |= {"markersize": 3, "label": f"{run.title}, seed {run.seed}"}
        restored = [level["rmse"] for level in run.by_level]
        axes[0].plot([level["t"] / run.T for level in run.by_level], restored, **style)
        axes[1].plot([level["degraded_rmse"] for level in run.by_level], restored, **style)
    largest = max(level["degraded_rmse"] for run in runs for level in run.by_level)
    axes[1].plot([0, largest], [0, largest], color=GREY, linestyle=":", label="nothing restored")
    axes[0].set_xlabel("level, t / T")
    axes[0].set_ylabel("RMSE of direct restoration")
    axes[1].set_xlabel("RMSE of x_t")
    axes[0].set_ylim(bottom=0)
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure


def make(options: Options) -> None:
    """Read, compute and write; see the module's description."""
    from colddiff.files import write_atomic

    rows = sampling(select_runs(options.experiment, options.tracking_uri, options.preset))
    runs, sets = read(rows, options.tracking_uri)
    footer = provenance(rows, options)
    drawn = [run for run in runs if run.by_level]
    if drawn:
        for form, content in render(lambda: draw(drawn), "; ".join(footer.lines())).items():
            write_atomic(options.out / f"hot_cold.{form}", content)
    pictured = [group for group in _grouped(sets) if group[0].images is not None]
    if pictured:
        first = {_row_title(group[0]): group[0].images for group in pictured}
        for form, content in render(lambda: image_rows(first), footer.summary()).items():
            write_atomic(options.out / f"generated.{form}", content)
    write_atomic(options.out / "hot_cold.csv", to_csv(runs))
    markdown = to_markdown(runs, sets, footer)
    write_atomic(options.out / "hot_cold.md", markdown)
    sys.stdout.write(markdown)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, Options, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
