"""What the data themselves say, for the mode-collapse study: floors, predictions, classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.collapse_design import N
from analysis.collapse_table import MEASURES

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from analysis.intensity import Prediction
    from colddiff.config import DataConfig

NEIGHBOURS = 500


@dataclass(frozen=True)
class DataClasses:
    """The training images' classes by intensity."""

    shares: NDArray[Any]
    """P(class | bin)."""
    total: tuple[float, ...]
    """P(class)."""
    edges: tuple[float, ...]


def data_of(runs: pd.DataFrame, data_root: Path | None) -> DataConfig:
    """The data set of the runs, where it is now."""
    from colddiff.config import DataConfig

    first = runs.iloc[0]
    root = data_root or Path(str(first["params.data.root"]))
    return DataConfig(
        name=first["params.data.name"],
        root=str(root),
        image_size=int(first["params.data.image_size"]),
    )


def of_the_data(
    data: DataConfig,
) -> tuple[dict[str, dict[str, float]], list[Prediction], DataClasses]:
    """What real digits score, what perfect restorers make of a mean, and the classes by mean."""
    import torch

    from analysis.intensity import (
        BINS,
        class_given_intensity,
        intensities,
        mean_starts,
        predict,
    )
    from colddiff.batches import to_batch
    from colddiff.classifier import load_digit_classifier
    from colddiff.collapse import blank, measure, reference_of
    from colddiff.data import load_images
    from colddiff.randomness import generator

    train, test = load_images(data, "train"), load_images(data, "test")
    every = to_batch(train.take(torch.arange(len(train))), data)
    real = to_batch(test.take(torch.arange(len(test))), data)
    labels = train.labels
    assert labels is not None, "digits have labels"
    n = min(N, len(test))
    classifier = load_digit_classifier()
    reference = reference_of(every, labels, real, classifier)
    # At random, because MNIST's first test digits are the neater ones.
    some = torch.randperm(len(real), generator=generator(0, "test digits"))[:n]
    measured = measure(real[some], reference, classifier)
    floors = {f"{n:,} test digits": _floor(dataclasses.asdict(measured))}
    drawn = labels[torch.randint(len(labels), (n,), generator=generator(0, "labels"))]
    shares = torch.bincount(labels, minlength=10).double() / len(labels)
    found = torch.bincount(drawn, minlength=10).double() / n
    floors["labels drawn at random"] = {
        "n": n,
        "zero_ratio": float(found[0] / shares[0]),
        "tv_distance": float((found - shares).abs().sum() / 2),
    }
    means = intensities(every)
    starts = mean_starts(means, n)
    predicted = predict(every, labels, starts, min(NEIGHBOURS, len(every)), is_blank=blank)
    table = class_given_intensity(means, labels, BINS)
    return floors, predicted, DataClasses(table.shares, tuple(shares.tolist()), table.edges)


def _floor(quality: Mapping[str, Any]) -> dict[str, float]:
    measures = {"zero_ratio": quality["ratios"][0], "tv_distance": quality["total_variation"]}
    return {"n": quality["n"], **measures} | {
        name: quality[name] for name in MEASURES if name not in measures
    }
