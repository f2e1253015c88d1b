"""The paper's Figure 3: the same images degraded, restored directly, sampled and original.

Takes the newest run of every data set, preset and T, or the runs that are named. Writes
figure3.png, figure3.pdf and figure3.md.
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

from analysis.report import Options, Provenance, provenance, run_script
from analysis.runs import AnalysisError, download, sampling, select_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ROWS = ("degraded", "direct", "sampled", "original")
IMAGES = 10
DPI = 300
CELL = 170  # dots an image should take: ten of them and the labels fit a page's width
GAP = 8  # dots between images
LABEL = 190  # dots left of the images
TITLE = 50  # dots above the images of one of several runs
SPACE = 24  # dots between runs
FONT = 8  # points
LETTER = 19  # dots a letter of a title takes at most, on average
ARTIFACT = "samples/restorations.npz"


@dataclass(frozen=True)
class FigureOptions(Options):
    """Options of this script."""

    runs: tuple[str, ...] = ()
    """Run ids, colddiff's or MLflow's; by default the newest of every data set, preset and T."""
    indices: tuple[int, ...] = ()
    """Test images, by their index; by default one of every class, ten in all."""


@dataclass(frozen=True)
class Panel:
    """The images of one run: ``images[row]`` is uint8 ``n h w c``, of the images ``index``."""

    title: str
    images: dict[str, NDArray[np.uint8]]
    index: tuple[int, ...]

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of an image in dots: whole dots a pixel, so that none is blurred."""
        height, width = self.images["original"].shape[1:3]
        scale = max(1, CELL // max(height, width))
        return height * scale, width * scale


def choose(runs: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The named runs, or the newest of every data set, preset and T; ``runs`` is newest first.

    Raises:
        AnalysisError: naming a run that is not there, and those that are.
    """
    if not names:
        newest = sampling(runs).drop_duplicates(["dataset", "preset", "T"])
        return newest.sort_values(["dataset", "preset", "T"])
    rows = []
    for name in names:
        found = runs[(runs["colddiff_run_id"] == name) | (runs["run_id"] == name)]
        if found.empty:
            known = ", ".join(runs["colddiff_run_id"])
            raise AnalysisError(f"no finished and evaluated run {name!r}; there are: {known}")
        rows.append(found.index[0])
    return runs.loc[rows]


def load_panel(path: Path, title: str, indices: Sequence[int]) -> Panel:
    """Read the restorations of the images ``indices``, or of :func:`default_rows`.

    Raises:
        AnalysisError: for an image that is not stored, naming those that are.
    """
    with np.load(path) as stored:
        index = [int(i) for i in stored["index"]]
        if indices:
            absent = [i for i in indices if i not in index]
            if absent:
                raise AnalysisError(
                    f"{title}: image {absent[0]} is not stored; there are {ranges(index)}"
                )
            rows = [index.index(i) for i in indices]
        else:
            rows = default_rows(stored["label"] if "label" in stored else np.zeros(len(index)))
        images = {name: stored[name][rows] for name in ROWS}
    return Panel(title, images, tuple(index[row] for row in rows))


def default_rows(labels: NDArray[Any], count: int = IMAGES) -> list[int]:
    """The first image of every class, in the order of the classes, then further ones: ``count``."""
    _, first = np.unique(labels, return_index=True)
    rows = [int(row) for row in first[:count]]
    return rows + [row for row in range(len(labels)) if row not in rows][: count - len(rows)]


def ranges(numbers: Sequence[int]) -> str:
    """``0..3, 7``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)


def draw(panels: Sequence[Panel]) -> Figure:
    """The panels below each other; titles only where there are several.

    Every image lies on whole dots of 1/300 inch, so print and screen show its pixels as squares.
    """
    from matplotlib.figure import Figure

    title = TITLE if len(panels) > 1 else 0
    widths = [LABEL + len(p.index) * (p.cell[1] + GAP) - GAP for p in panels]
    heights = [title + len(ROWS) * (p.cell[0] + GAP) - GAP for p in panels]
    if title:
        widths += [LETTER * len(p.title) for p in panels]
    width, height = max(widths), sum(heights) + SPACE * (len(panels) - 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    top = 0  # dots from the upper edge
    for panel, panel_height in zip(panels, heights, strict=True):
        if title:
            y = 1 - (top + title / 2) / height
            figure.text(0, y, panel.title, fontsize=FONT, ha="left", va="center")
        _draw_panel(figure, panel, top + title, (width, height))
        top += panel_height + SPACE
    return figure


def _draw_panel(figure: Figure, panel: Panel, top: int, size: tuple[int, int]) -> None:
    width, height = size
    cell_height, cell_width = panel.cell
    for row, name in enumerate(ROWS):
        bottom = height - top - row * (cell_height + GAP) - cell_height
        middle = (bottom + cell_height / 2) / height
        figure.text(0, middle, name.capitalize(), fontsize=FONT, ha="left", va="center")
        for column, image in enumerate(panel.images[name]):
            left = LABEL + column * (cell_width + GAP)
            axes = figure.add_axes(
                (left / width, bottom / height, cell_width / width, cell_height / height),
                label=f"{name} {panel.index[column]}",
            )
            axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
            axes.set_axis_off()


def render(
    figure: Figure, form: str, caption: str, title: str = "Degraded, direct, sampled, original"
) -> bytes:
    """The file's bytes, ``form`` png or pdf, with ``caption`` in its metadata."""
    import matplotlib as mpl

    key = "Description" if form == "png" else "Subject"
    metadata = {"Title": title, key: caption}
    buffer = io.BytesIO()
    with mpl.rc_context({"pdf.fonttype": 42}):  # TrueType: publishers refuse type 3
        figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def to_markdown(panels: Sequence[Panel], footer: Provenance) -> str:
    """The figure with its legend and provenance."""
    legend = (
        "Rows: degraded D(x_0, T); direct R(x_T, T); sampled by Algorithm 2 over all levels; "
        "original. After Figure 3 of arXiv:2208.09392."
    )
    shown = [f"- {p.title}: images {', '.join(map(str, p.index))}" for p in panels]
    picture = "![Degraded, direct, sampled and original images](figure3.png)"
    return "\n\n".join([picture, legend, "\n".join(shown), footer.markdown()])


def make(options: FigureOptions) -> None:
    """Read, draw and write; see the module's description."""
    from colddiff.files import write_atomic

    runs = select_runs(options.experiment, options.tracking_uri, options.preset)
    runs = choose(runs, options.runs)
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        for run in runs.to_dict("records"):
            title = f"{run['dataset']}, preset {run['preset']}, T = {run['T']}, seed {run['seed']}"
            local = Path(folder, run["run_id"])
            path = download(run["run_id"], ARTIFACT, options.tracking_uri, local)
            panels.append(load_panel(path, title, options.indices))
    footer = provenance(runs, options)
    figure, caption = draw(panels), "; ".join(footer.lines())
    for form in ("png", "pdf"):
        write_atomic(options.out / f"figure3.{form}", render(figure, form, caption))
    write_atomic(options.out / "figure3.md", to_markdown(panels, footer))
    sys.stdout.write(f"{options.out / 'figure3.png'}\n{options.out / 'figure3.pdf'}\n")


def main(args: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_script(make, FigureOptions, __doc__, args)


if __name__ == "__main__":
    sys.exit(main())
