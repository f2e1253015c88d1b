"""What the figures share: size, style, colours, and their files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

DPI = 200
WIDTH = 6.5  # inches, of a page's text
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: publishers refuse type 3
}
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072b2", "#d55e00", "#009e73", "#888888", "#000000"
"""Okabe and Ito's, which colour-blind readers tell apart."""
COLORS = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00")


def render(draw: Callable[[], Figure], caption: str) -> dict[str, bytes]:
    """The figure's png and pdf, with ``caption`` in their metadata."""
    import matplotlib as mpl

    files = {}
    with mpl.rc_context(STYLE):
        figure = draw()
        for form, key in (("png", "Description"), ("pdf", "Subject")):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=DPI, metadata={key: caption})
            files[form] = buffer.getvalue()
    return files


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def image_rows(rows: Mapping[str, NDArray[np.uint8] | None]) -> Figure:
    """A row of grey images ``n h w 1`` a name, which stands on its left; None is left out."""
    import textwrap

    import numpy as np

    shown = {name: images for name, images in rows.items() if images is not None}
    figure = new_figure(WIDTH, 0.42 * len(shown), layout=None)
    for row, (name, images) in enumerate(shown.items(), start=1):
        axes = figure.add_axes((0.31, 1 - row / len(shown), 0.68, 0.9 / len(shown)), anchor="W")
        strip = np.concatenate(list(images), axis=1)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        text = textwrap.fill(name, 38)
        axes.text(-0.02, 0.5, text, fontsize=6, ha="right", va="center", transform=axes.transAxes)
    return figure
