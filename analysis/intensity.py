"""What a perfect restorer would make of a mean intensity alone, from the training images.

Generation starts from a constant image: all that a restorer is told is a mean m. The best answer
in L1 is the pixelwise conditional median of x_0 given m, in L2 the conditional mean; a perfect
sampler draws from P(x_0 | m). Each is estimated from the training images whose means are nearest
to m, without a network. Intensities are in [0, 1], images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from analysis.pictures import WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

Loss = Literal["l1", "l2"]
Shares = tuple[float, ...]
LOSSES: tuple[Loss, ...] = get_args(Loss)
CLASSES = 10
BINS = 10  # of a prediction's tables: quantiles of the training images
STRIP = 4  # restorations of the figure side by side


@dataclass(frozen=True)
class ClassTable:
    """Images by bin of intensity and by class."""

    edges: tuple[float, ...]
    """Of the bins, rising; the outer bins also have what lies beyond."""
    counts: tuple[tuple[int, ...], ...]
    """Bins x classes."""

    @property
    def shares(self) -> NDArray[Any]:
        """P(class | bin), bins x classes: rows sum to 1, but an empty bin's is all 0."""
        counts = np.array(self.counts)
        shares: NDArray[Any] = counts / counts.sum(1, keepdims=True).clip(min=1)
        return shares

    @property
    def leading(self) -> tuple[int | None, ...]:
        """The largest class of each bin, the first of equals; None of an empty bin."""
        return tuple(row.index(max(row)) if any(row) else None for row in self.counts)


@dataclass(frozen=True)
class Prediction:
    """What becomes of a set of starts; :func:`dataclasses.asdict` makes JSON values of it."""

    start: str
    loss: Loss
    n: int
    beyond: float
    """The share of starts that are darker or brighter than any training image."""
    sampled: Shares
    """The shares of classes to expect of a perfect sampler of P(x_0 | m), whatever the loss."""
    counts: tuple[int, ...]
    """Best restorations, by the class that they are taken for; of blank ones too."""
    blank_rate: float
    """The share of best restorations that are blank."""
    table: ClassTable
    """The same as ``counts``, by the intensity of the start."""


def intensities(x0: Tensor) -> Tensor:
    """The mean of each image ``n c h w`` in [-1, 1]: float64 ``n`` in [0, 1]."""
    return (x0.double().mean(dim=(1, 2, 3)) + 1) / 2


def class_given_intensity(means: Tensor, labels: Tensor, bins: int | Sequence[float]) -> ClassTable:
    """How many images, ``means n`` and ``labels n`` in 0..9, of each class there are in each bin.

    ``bins`` are edges, or the number of quantile bins, which are fewer where many means are equal.

    Raises ``ValueError`` for means and labels that do not fit each other, a label that is no class,
    no bin, more bins than images, and edges that do not rise.
    """
    if means.ndim != 1 or means.shape != labels.shape:
        shapes = f"{tuple(means.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"means and labels must both be of shape (n,), got {shapes}")
    values, classes = means.double().numpy(), labels.numpy()
    if isinstance(bins, int):
        if not 1 <= bins <= len(values):
            raise ValueError(f"bins = {bins} must be in 1..{len(values)} (the number of images)")
        edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    else:
        edges = np.array(bins, dtype=np.float64)
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges = {edges.tolist()} must be two or more, each above the last")
    if bad := sorted(set(classes.tolist()) - set(range(CLASSES))):
        raise ValueError(f"label {bad[0]} must be in 0..{CLASSES - 1}")
    counts = np.zeros((len(edges) - 1, CLASSES), dtype=np.int64)
    np.add.at(counts, (np.searchsorted(edges[1:-1], values, side="right"), classes), 1)
    return ClassTable(tuple(edges.tolist()), tuple(map(tuple, counts.tolist())))


def bayes_restorations(x0: Tensor, starts: Tensor, loss: Loss, neighbours: int) -> Tensor:
    """The best restorations in ``loss`` of constant images of intensity ``starts m``.

    Of the ``neighbours`` training images, ``x0 n 1 h w``, whose means are nearest to a start (the
    darker of two equally near), l1 takes the pixelwise median (the lower of the two in the middle)
    and l2 the mean. Returns float32 ``m 1 h w``. Raises ``ValueError`` for another loss, neighbours
    outside 1..n, and images that are not grey.
    """
    import torch

    if loss not in LOSSES:
        raise ValueError(f"loss = {loss!r} must be one of {', '.join(LOSSES)}")
    if x0.ndim != 4 or x0.shape[1] != 1:
        raise ValueError(f"images must be of shape (n, 1, h, w), got {tuple(x0.shape)}")
    order, first = _windows(intensities(x0), starts, neighbours)
    # Many starts have the same neighbours; their restoration is computed once.
    firsts, which = np.unique(first, return_inverse=True)
    pixels, middle = x0.flatten(1).numpy(), (neighbours - 1) // 2
    made = np.empty((len(firsts), pixels.shape[1]), dtype=np.float32)
    for image, begin in zip(made, firsts, strict=True):
        near = pixels[order[begin : begin + neighbours]]
        match loss:
            case "l1":  # rows next to each other in memory: NumPy's partition is far quicker
                image[:] = np.partition(np.ascontiguousarray(near.T), middle)[:, middle]
            case "l2":
                image[:] = near.mean(0, dtype=np.float64)
    return torch.from_numpy(made[which]).view(-1, *x0.shape[1:])


def sampled_shares(means: Tensor, labels: Tensor, starts: Tensor, neighbours: int) -> Shares:
    """The share of each class to expect of a perfect sampler from ``starts m``.

    P(class | m) is that of the neighbours that :func:`bayes_restorations` takes, of ``means n`` and
    ``labels n``; ``ValueError`` as there.
    """
    order, first = _windows(means, starts, neighbours)
    below = np.zeros((len(order) + 1, CLASSES))
    below[1:] = np.eye(CLASSES)[labels.numpy()[order]].cumsum(0)
    return tuple(((below[first + neighbours] - below[first]).mean(0) / neighbours).tolist())


def _windows(means: Tensor, starts: Tensor, neighbours: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The images sorted by their mean, and for each start where its neighbours begin there."""
    if not 1 <= neighbours <= len(means):
        raise ValueError(f"neighbours = {neighbours} must be in 1..{len(means)}, of the images")
    order = np.argsort(means.numpy(), kind="stable")
    ordered = means.double().numpy()[order]
    # The window moves up by one where its next image is nearer than its first.
    halfway = (ordered[:-neighbours] + ordered[neighbours:]) / 2
    return order, np.searchsorted(halfway, starts.double().numpy())


def mean_starts(means: Tensor, n: int, seed: int = 0) -> dict[str, Tensor]:
    """``n`` intensities of each kind of start: from mixtures fitted to ``means``, and of these."""
    from colddiff.prior import MeanPrior, real_terminals

    starts = {"real means": real_terminals(lambda x: x, means, n, seed)}
    for components in (1, 10):
        drawn = MeanPrior.fit(means[:, None] * 2 - 1, components, seed).sample(n, 1, 1, seed)
        starts[f"mixture of {components}"] = (drawn.flatten().double() + 1) / 2
    return starts


def without_stroke(images: Tensor) -> Tensor:
    """Images ``n c h w`` in [-1, 1] with a contrast below half the range: bool ``n``."""
    flat = images.flatten(1)
    return (flat.amax(1) - flat.amin(1)) / 2 < 0.5


def digit_classes(images: Tensor) -> Tensor:
    """What the digit classifier takes images ``n 1 h w`` in [-1, 1] for: int64 ``n``."""
    import torch

    from colddiff.classifier import load_digit_classifier

    classifier = load_digit_classifier()
    return torch.cat([classifier(part).argmax(1) for part in images.split(500)])


def predict(
    x0: Tensor,
    labels: Tensor,
    starts: Mapping[str, Tensor],
    neighbours: int,
    classify: Callable[[Tensor], Tensor] = digit_classes,
    is_blank: Callable[[Tensor], Tensor] = without_stroke,
) -> list[Prediction]:
    """Of each of ``starts`` and loss, from ``x0 n 1 h w`` and ``labels n``; errors as above."""
    means, made = intensities(x0), []
    edges = class_given_intensity(means, labels, BINS).edges
    for start, values in starts.items():
        beyond = float(((values < means.min()) | (values > means.max())).double().mean())
        sampled = sampled_shares(means, labels, values, neighbours)
        for loss in LOSSES:
            images = bayes_restorations(x0, values, loss, neighbours)
            classes, blank = classify(images), is_blank(images)
            table = class_given_intensity(values, classes, edges)
            counts = tuple(np.sum(table.counts, axis=0).tolist())
            found = (counts, float(blank.double().mean()), table)
            made.append(Prediction(start, loss, len(values), beyond, sampled, *found))
    return made


def draw(table: ClassTable, starts: Tensor, restored: Mapping[Loss, Tensor]) -> Figure:
    """Left: P(class | intensity); right: by loss, restorations ``m 1 h w`` of ``starts m``."""
    figure = new_figure(WIDTH, 3.0)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    _draw_shares(parts[0].add_subplot(), table)
    shape = (-(-len(starts) // STRIP), len(restored), STRIP)
    grid = parts[1].subplots(shape[0] * shape[1], STRIP, squeeze=False).reshape(shape)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (loss, images) in enumerate(restored.items()):
        for i, image in enumerate(images):
            axes = grid[i // STRIP, row, i % STRIP]
            axes.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            if row == 0:
                axes.set_title(f"{float(starts[i]):.3f}", fontsize=8, pad=3)
        for axes in grid[:, row, 0]:
            axes.text(-0.1, 0.5, loss.upper(), ha="right", va="center", transform=axes.transAxes)
    return figure


def _draw_shares(axes: Axes, table: ClassTable) -> None:
    import matplotlib as mpl

    shares = table.shares
    bins, bottom = np.arange(len(shares)), np.zeros(len(shares))
    # From the class of dark images to that of bright ones, so that colour has a meaning.
    order = np.argsort(bins @ shares / shares.sum(0).clip(min=1e-9))
    for label, shade in zip(order, np.linspace(0, 1, len(order)), strict=True):
        share = shares[:, label]
        axes.bar(bins, share, 1, bottom, color=mpl.colormaps["viridis"](shade))
        if share.any():
            at, ink = int(share.argmax()), "white" if shade < 0.6 else "black"
            middle = bottom[at] + share[at] / 2
            axes.text(at, middle, str(label), color=ink, ha="center", va="center")
        bottom += share
    for place, largest in enumerate(table.leading):
        axes.text(place, 1.02, "" if largest is None else str(largest), fontsize=7, ha="center")
    axes.set_title("largest class of each bin", fontsize=8, pad=12)
    ticks = np.unique(np.linspace(0, len(bins), 6).round().astype(int))
    axes.set_xticks(ticks - 0.5, [f"{table.edges[tick]:.2f}" for tick in ticks])
    axes.set(xlabel="mean intensity", ylabel="P(class | mean intensity)", xmargin=0, ymargin=0)
    axes.grid(visible=False)
