"""How Algorithm 2 goes from x_T to x_0: x_t and the estimates at each level, as strip and film.

Takes the newest run of every data set, preset and T, or the runs that are named. Writes, for each,
trajectory-RUN.png, .pdf and .gif, and trajectory.md.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figure3 import CELL, DPI, FONT, GAP, LABEL, choose, ranges
from analysis.figure3 import render as render_exactly
from analysis.report import Options, Provenance, provenance, run_script
from analysis.runs import AnalysisError, artifacts, download, select_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ARTIFACT = "samples/trajectory.npz"
COLUMNS = 9
ROWS = {"xt": "x_t", "stretched": "stretched", "x0_hat": "x0_hat"}
HEAD = 60  # dots above the images of the strip
FRAME_MS, LAST_MS = 150, 2000
FILM = 100  # pixels an image of the film takes at most, unless it is larger
BAR = 14  # pixels above the film's images


@dataclass(frozen=True)
class TrajectoryOptions(Options):
    """Options of this script."""

    runs: tuple[str, ...] = ()
    """Run ids, colddiff's or MLflow's; by default the newest of every data set, preset and T."""
    indices: tuple[int, ...] = ()
    """Test images in the strip, by their index; by default the first two that are stored."""


@dataclass(frozen=True)
class Trajectory:
    """One run's: arrays as :func:`colddiff.trajectory.record_trajectory` has them."""

    run_id: str
    title: str
    arrays: dict[str, NDArray[Any]]

    def places(self, indices: Sequence[int]) -> list[int]:
        """Where the images ``indices`` stand; the first two by default.

        Raises:
            AnalysisError: for an image that is not stored, naming those that are.
        """
        stored = [int(i) for i in self.arrays["index"]]
        for index in indices:
            if index not in stored:
                raise AnalysisError(
                    f"{self.title}: image {index} is not stored; there are {ranges(stored)}"
                )
        return [stored.index(i) for i in indices] or list(range(min(2, len(stored))))


def strip(trajectory: Trajectory, indices: Sequence[int]) -> Figure:
    """Rows x_t, x_t stretched and x0_hat of each image; columns are levels; then x_0, original."""
    from matplotlib.figure import Figure

    arrays, places = trajectory.arrays, trajectory.places(indices)
    levels = arrays["level"]
    count = min(COLUMNS, len(levels))
    chosen = np.unique(np.linspace(0, len(levels) - 1, count).round().astype(int))
    scale = max(1, CELL // max(arrays["original"].shape[1:3]))
    height, width = (side * scale for side in arrays["original"].shape[1:3])
    size = (
        LABEL + (len(chosen) + 2) * (width + GAP) - GAP,
        HEAD + len(places) * len(ROWS) * (height + GAP) - GAP,
    )
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, facecolor="white")

    def place(image: NDArray[Any], row: int, column: int, label: str) -> None:
        left, top = LABEL + column * (width + GAP), HEAD + row * (height + GAP)
        box = (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
        axes = figure.add_axes(box, label=label)
        axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
        axes.set_axis_off()

    heads = [*(f"t = {levels[i]}" for i in chosen), "x_0", "original"]
    for column, text in enumerate(heads):
        x = (LABEL + column * (width + GAP) + width / 2) / size[0]
        figure.text(x, 1 - HEAD / 2 / size[1], text, fontsize=FONT, ha="center", va="center")
    for number, image in enumerate(places):
        for offset, (name, label) in enumerate(ROWS.items()):
            row = number * len(ROWS) + offset
            y = 1 - (HEAD + row * (height + GAP) + height / 2) / size[1]
            figure.text(0, y, label, fontsize=FONT, ha="left", va="center")
            for column, level in enumerate(chosen):
                place(arrays[name][level, image], row, column, f"{name} {image} {column}")
        last = number * len(ROWS) + len(ROWS) - 1
        place(arrays["restored"][image], last, len(chosen), f"restored {image}")
        place(arrays["original"][image], last, len(chosen) + 1, f"original {image}")
    return figure


def film(trajectory: Trajectory) -> bytes:
    """An animated GIF: x_t, x0_hat and the originals below each other, a frame a level.

    Grey images are exact; of coloured ones a GIF shows the nearest of 256 colours a frame.
    """
    from PIL import Image, ImageDraw

    arrays = trajectory.arrays
    scale = max(1, FILM // max(arrays["original"].shape[1:3]))
    levels = [*arrays["level"].tolist(), 0]
    states = [*arrays["xt"], arrays["restored"]]
    estimates = [*arrays["x0_hat"], arrays["restored"]]
    frames = []
    for level, xt, x0_hat in zip(levels, states, estimates, strict=True):
        rows = [np.concatenate(list(row), axis=1) for row in (xt, x0_hat, arrays["original"])]
        picture = np.concatenate(rows, axis=0).repeat(scale, axis=0).repeat(scale, axis=1)
        picture = np.broadcast_to(picture, (*picture.shape[:2], 3))
        frame = np.full((picture.shape[0] + BAR, *picture.shape[1:]), 255, np.uint8)
        frame[BAR:] = picture
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).text((2, 1), f"t = {level}: x_t, x0_hat, original", fill="black")
        frames.append(image.quantize(256))
    buffer = io.BytesIO()
    durations = [*([FRAME_MS] * (len(frames) - 1)), LAST_MS]
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
        disposal=1,
    )
    return buffer.getvalue()


def to_markdown(trajectories: Sequence[Trajectory], footer: Provenance) -> str:
    """The pictures with their legend and provenance."""
    legend = (
        "Algorithm 2 over all levels. x_t as it is; stretched: what differs from its mean, spread "
        "over the whole range of grey; x0_hat: the network's estimate from it. The film has "
        "at most 256 colours a frame."
    )
    parts = ["# Trajectories", legend]
    for each in trajectories:
        name = f"trajectory-{each.run_id}"
        parts += [
            f"## {each.title}",
            f"![x_t and x0_hat by level]({name}.png)",
            f"![film]({name}.gif)",
        ]
    return "\n\n".join([*parts, footer.markdown()])


def _fetch(run: dict[Any, Any], uri: str | None, folder: Path) -> Path:
    name = run["colddiff_run_id"]
    if run.get("params.training.levels") == "last":
        raise AnalysisError(f"{name} only restores directly: training.levels = last")
    if ARTIFACT not in artifacts(run["run_id"], "samples", uri):
        raise AnalysisError(
            f"{name} has no {ARTIFACT} in MLflow: it was evaluated before trajectories were kept, "
            "or without images. Make it with "
            f"`python jobs/launch.py evaluate {name} --evaluation.images 100`"
        )
    return download(run["run_id"], ARTIFACT, uri, folder)


def make(options: TrajectoryOptions) -> None:
    """Read, draw and write; see the module's description."""
    from colddiff.files import write_atomic

    runs = select_runs(options.experiment, options.tracking_uri, options.preset)
    runs = choose(runs, options.runs)
    footer = provenance(runs, options)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for run in runs.to_dict("records"):
            path = _fetch(run, options.tracking_uri, Path(folder, run["run_id"]))
            title = f"{run['dataset']}, preset {run['preset']}, T = {run['T']}, seed {run['seed']}"
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored}
            found.append(Trajectory(run["colddiff_run_id"], title, arrays))
    strips = [strip(each, options.indices) for each in found]  # before anything is written
    for each, figure in zip(found, strips, strict=True):
        name = f"trajectory-{each.run_id}"
        for form in ("png", "pdf"):
            content = render_exactly(
                figure, form, footer.summary(), title="x_t and x0_hat by level"
            )
            write_atomic(options.out / f"{name}.{form}", content)
        write_atomic(options.out / f"{name}.gif", film(each))
        sys.stdout.write(f"{options.out / name}.gif\n")
    write_atomic(options.out / "trajectory.md", to_markdown(found, footer))


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, TrajectoryOptions, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
