"""What a mean intensity alone tells: classes, best restorations, and what they are predicted to be.

The oracle is a slow loop: the neighbours of each start by a full sort, medians by sorting pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.intensity import (
    ClassTable,
    Loss,
    Prediction,
    bayes_restorations,
    class_given_intensity,
    digit_classes,
    draw,
    intensities,
    mean_starts,
    predict,
    sampled_shares,
    without_stroke,
)
from analysis.pictures import render
from colddiff.batches import to_batch
from colddiff.config import DataConfig
from colddiff.data import load_images

LOSSES: tuple[Loss, ...] = ("l1", "l2")


def images_of_means(means: Tensor, side: int = 6, seed: int = 0) -> Tensor:
    """Grey noise in [-1, 1] whose intensities are ``means`` in [0, 1], float64."""
    noise = torch.rand(len(means), 1, side, side, generator=torch.Generator().manual_seed(seed))
    noise = noise.double() - noise.double().mean(dim=(1, 2, 3), keepdim=True)
    return (means.double()[:, None, None, None] + 0.1 * noise) * 2 - 1


def sparse_images(n: int, seed: int) -> Tensor:
    """Like digits: mostly black, of different brightness; float32 ``n 1 5 7``."""
    source = torch.Generator().manual_seed(seed)
    density = torch.rand(n, 1, 1, 1, generator=source)
    pixels = torch.rand(n, 1, 5, 7, generator=source)
    strokes = torch.rand(n, 1, 5, 7, generator=source) < density
    return torch.where(strokes, pixels, 0.0) * 2 - 1


def slow_restorations(x0: Tensor, starts: Tensor, loss: Loss, neighbours: int) -> Tensor:
    images = x0.double().numpy()
    # As intensities(), up to its rounding: no two of these images have one mean.
    means = [float(image.mean() + 1) / 2 for image in images]
    made = []
    for start in starts.tolist():
        near = sorted(range(len(images)), key=lambda i, m=start: abs(means[i] - m))[:neighbours]
        image = np.zeros(images.shape[1:])
        for place in np.ndindex(image.shape):
            pixels = sorted(float(images[(i, *place)]) for i in near)
            middle = pixels[math.ceil(neighbours / 2) - 1]
            image[place] = middle if loss == "l1" else math.fsum(pixels) / neighbours
        made.append(image)
    return torch.from_numpy(np.stack(made)).float()


# P(class | intensity).


def test_intensities_are_those_of_the_unit_range() -> None:
    x0 = torch.tensor([-1.0, 1.0, 0.5, 0.0]).view(2, 1, 1, 2)
    assert intensities(x0).tolist() == [0.5, 0.625]
    assert intensities(x0).dtype == torch.float64


def test_bright_and_dark_classes_are_told_apart() -> None:
    means, labels = torch.tensor([0.9, 0.1, 0.8, 0.2]), torch.tensor([0, 1, 0, 1])
    table = class_given_intensity(means, labels, 2)
    assert table.edges == pytest.approx((0.1, 0.5, 0.9))
    assert table.counts == ((0, 2, *[0] * 8), (2, *[0] * 9))
    assert table.leading == (1, 0)
    assert table.shares.tolist() == [[0, 1, *[0] * 8], [1, *[0] * 9]]


def test_counts_by_edges() -> None:
    means = torch.tensor([-0.5, 0.2, 0.4, 0.4, 0.49, 0.5, 3.0])
    labels = torch.tensor([7, 7, 2, 3, 3, 5, 9])
    table = class_given_intensity(means, labels, [0.0, 0.4, 0.41, 0.5, 0.6, 1.0])
    rows = [{c: n for c, n in enumerate(row) if n} for row in table.counts]
    # A bin has its lower edge; the outer bins have what lies beyond.
    assert rows == [{7: 2}, {2: 1, 3: 1}, {3: 1}, {5: 1}, {9: 1}]
    assert table.leading == (7, 2, 3, 5, 9)


def test_an_empty_bin_has_no_shares_and_no_largest_class() -> None:
    table = class_given_intensity(torch.tensor([0.1, 0.9]), torch.tensor([4, 6]), [0, 0.3, 0.6, 1])
    assert table.leading == (4, None, 6)
    assert table.shares.sum(1).tolist() == [1, 0, 1]


def test_quantile_bins_have_equally_many_images() -> None:
    means = torch.rand(1000, generator=torch.Generator().manual_seed(1)) ** 3
    table = class_given_intensity(means, torch.zeros(1000, dtype=torch.int64), 8)
    assert [row[0] for row in table.counts] == [125] * 8
    equal = torch.cat((torch.full((900,), 0.5), means[:100]))
    merged = class_given_intensity(equal, torch.zeros(1000, dtype=torch.int64), 8)
    assert len(merged.counts) < 8 and sum(row[0] for row in merged.counts) == 1000


@pytest.mark.parametrize(
    ("means", "labels", "bins", "message"),
    [
        ([0.1, 0.2], [0, 1], 0, r"bins = 0 must be in 1\.\.2"),
        ([0.1, 0.2], [0, 1], 3, r"bins = 3 must be in 1\.\.2"),
        ([0.1, 0.2], [0, 1], [0.5], r"edges = \[0.5\] must be two or more"),
        ([0.1, 0.2], [0, 1], [0.0, 0.5, 0.5], r"edges = \[0.0, 0.5, 0.5\] must be .* above"),
        ([0.1, 0.1], [0, 1], 2, r"edges = \[0.1\d*\] must be two or more"),
        ([0.1, 0.2], [0, 10], 2, r"label 10 must be in 0\.\.9"),
        ([0.1, 0.2], [-1, 3], 2, r"label -1 must be in 0\.\.9"),
        ([0.1, 0.2], [0], 2, r"of shape \(n,\), got \(2,\) and \(1,\)"),
    ],
)
def test_bad_tables_are_refused(
    means: list[float], labels: list[int], bins: int | list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        class_given_intensity(torch.tensor(means), torch.tensor(labels), bins)


# The best restorations.


@pytest.mark.parametrize("neighbours", [1, 2, 7, 40, 60])
@pytest.mark.parametrize("loss", LOSSES)
def test_restorations_agree_with_a_slow_loop(loss: Loss, neighbours: int) -> None:
    x0 = sparse_images(60, seed=2)
    random = torch.rand(25, generator=torch.Generator().manual_seed(3))
    starts = torch.cat((random, torch.tensor([-1.0, 0.0, 1.0, 2.0]), intensities(x0)[:5]))
    made = bayes_restorations(x0, starts, loss, neighbours)
    assert made.shape == (34, 1, 5, 7) and made.dtype == torch.float32
    expected = slow_restorations(x0, starts, loss, neighbours)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6 if loss == "l2" else 0)


def test_the_nearest_image_is_found_whatever_the_order() -> None:
    means = torch.tensor([0.7, 0.2, 0.5, 0.3])
    x0 = images_of_means(means)
    made = bayes_restorations(x0, torch.tensor([0.29, 0.21, 0.99, 0.0, 0.45]), "l1", 1)
    assert torch.equal(made, x0[[3, 1, 0, 1, 2]].float())


def test_of_two_equally_near_the_darker_is_taken() -> None:
    x0 = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1) * 2 - 1
    assert bayes_restorations(x0, torch.tensor([0.5]), "l2", 1).item() == -0.5


def test_known_pixels_have_their_known_median_and_mean() -> None:
    # Three dark images of means near 0.1, two bright ones that no dark start may see.
    dark = [[0.0, 0.3], [0.2, 0.0], [0.05, 0.1]]
    x0 = torch.tensor([*dark, [0.9, 0.9], [1.0, 0.7]], dtype=torch.float64).view(5, 1, 1, 2) * 2 - 1
    starts = torch.tensor([0.1])
    median = (bayes_restorations(x0, starts, "l1", 3).flatten() + 1) / 2
    mean = (bayes_restorations(x0, starts, "l2", 3).flatten() + 1) / 2
    assert median.tolist() == pytest.approx([0.05, 0.1], abs=1e-6)
    assert mean.tolist() == pytest.approx([0.25 / 3, 0.4 / 3], abs=1e-6)


def test_of_evenly_many_the_median_is_the_lower_of_the_middle() -> None:
    x0 = torch.tensor([-1.0, -0.5, 0.5, 1.0]).view(4, 1, 1, 1)
    assert bayes_restorations(x0, torch.tensor([0.5]), "l1", 4).item() == -0.5


def test_a_window_over_everything_is_the_global_median_and_mean() -> None:
    x0 = sparse_images(41, seed=4)
    starts = torch.linspace(0, 1, 9)
    median = bayes_restorations(x0, starts, "l1", 41)
    mean = bayes_restorations(x0, starts, "l2", 41)
    for i in range(9):
        assert np.array_equal(median[i].numpy(), np.median(x0.numpy(), axis=0))
        np.testing.assert_allclose(mean[i].numpy(), x0.numpy().mean(axis=0), atol=1e-6)


def test_each_restoration_is_the_best_in_its_own_loss() -> None:
    x0, starts = sparse_images(50, seed=5), torch.tensor([0.2])
    near = x0[(intensities(x0) - 0.2).abs().argsort()[:15]]
    median, mean = (bayes_restorations(x0, starts, loss, 15) for loss in LOSSES)
    assert float((near - median).abs().mean()) < float((near - mean).abs().mean())
    assert float((near - mean).square().mean()) < float((near - median).square().mean())
    for shift in (-0.05, 0.05):
        assert float((near - median).abs().mean()) < float((near - median - shift).abs().mean())
        assert float((near - mean).square().mean()) < float((near - mean - shift).square().mean())


@pytest.mark.parametrize("neighbours", [0, -1, 11])
def test_bad_numbers_of_neighbours_are_refused(neighbours: int) -> None:
    message = rf"neighbours = {neighbours} must be in 1\.\.10"
    with pytest.raises(ValueError, match=message):
        bayes_restorations(sparse_images(10, seed=6), torch.tensor([0.5]), "l1", neighbours)
    with pytest.raises(ValueError, match=message):
        zeros = torch.zeros(10, dtype=torch.int64)
        sampled_shares(torch.rand(10), zeros, torch.tensor([0.5]), neighbours)


def test_bad_losses_and_images_are_refused() -> None:
    x0 = sparse_images(10, seed=6)
    with pytest.raises(ValueError, match="loss = 'l3' must be one of l1, l2"):
        bayes_restorations(x0, torch.tensor([0.5]), "l3", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be of shape \(n, 1, h, w\), got \(10, 3, 5, 7\)"):
        bayes_restorations(x0.expand(-1, 3, -1, -1), torch.tensor([0.5]), "l1", 2)


# A perfect sampler's classes.


def test_a_perfect_sampler_gives_the_classes_of_the_neighbours() -> None:
    means = torch.tensor([0.5, 0.1, 0.6, 0.12, 0.14, 0.55])
    labels = torch.tensor([0, 1, 0, 1, 2, 3])
    dark = sampled_shares(means, labels, torch.tensor([0.1]), 3)
    assert dark == pytest.approx([0, 2 / 3, 1 / 3, *[0] * 7])
    both = sampled_shares(means, labels, torch.tensor([0.1, 0.1, 0.1, 0.9]), 3)
    assert both == pytest.approx([1 / 6, 1 / 2, 1 / 4, 1 / 12, *[0] * 6])
    # The window of all images does not see the start.
    everything = sampled_shares(means, labels, torch.tensor([0.9]), 6)
    assert everything == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6, *[0] * 6])


def test_one_gaussian_loses_a_rare_bright_class() -> None:
    z = torch.randn(1000, generator=torch.Generator().manual_seed(7)).double()
    means = torch.cat((0.2 + 0.01 * z[:980], 0.6 + 0.01 * z[980:]))
    labels = torch.cat((torch.ones(980), torch.zeros(20))).long()
    starts = mean_starts(means, 1000, seed=8)
    assert set(starts) == {"real means", "mixture of 1", "mixture of 10"}
    shares = {name: sampled_shares(means, labels, starts[name], 9)[0] for name in starts}
    assert shares["real means"] == pytest.approx(0.02)
    assert shares["mixture of 10"] == pytest.approx(0.02, abs=4 * math.sqrt(0.02 / 1000))
    # Its mean is 0.208, its deviation 0.056: halfway to the bright ones is at 3.4 deviations.
    assert shares["mixture of 1"] < 0.003


def test_starts_are_intensities_and_a_function_of_the_seed() -> None:
    means = torch.rand(200, generator=torch.Generator().manual_seed(9)).double() * 0.3
    first, again, other = (mean_starts(means, 50, seed) for seed in (1, 1, 2))
    for name, values in first.items():
        assert values.shape == (50,) and values.dtype == torch.float64
        assert 0 <= float(values.min()) and float(values.max()) < 0.6
        assert torch.equal(values, again[name]) and not torch.equal(values, other[name])
    assert set(first["real means"].tolist()) <= set(means.tolist())


# Predictions.


def by_brightness(images: Tensor) -> Tensor:
    """Class 0 of bright images, 1 of others."""
    return (intensities(images) < 0.5).long()


def test_prediction_of_two_classes_is_exact() -> None:
    x0 = images_of_means(torch.cat((torch.full((30,), 0.1), torch.full((10,), 0.9))))
    x0 = x0 + torch.linspace(0, 0.01, 40)[:, None, None, None]  # so that there are quantiles
    labels = torch.tensor([1] * 30 + [0] * 10)
    starts = {"some": torch.tensor([0.12, 0.0, 0.95, 0.88, 0.11])}
    made = predict(x0, labels, starts, 10, by_brightness, lambda images: images.mean((1, 2, 3)) > 0)
    assert [(p.start, p.loss) for p in made] == [("some", "l1"), ("some", "l2")]
    for prediction in made:
        assert prediction.n == 5
        assert prediction.beyond == pytest.approx(2 / 5)  # 0.0 and 0.95
        assert prediction.counts == (2, 3, *[0] * 8)
        assert prediction.sampled == pytest.approx([0.4, 0.6, *[0] * 8])
        assert prediction.blank_rate == 0.4  # the bright ones, by the definition given
        edges = prediction.table.edges
        assert edges == class_given_intensity(intensities(x0), labels, 10).edges
        assert np.array(prediction.table.counts).sum(0).tolist() == list(prediction.counts)
        assert prediction.table.counts[-1][0] + prediction.table.counts[-2][0] >= 1


def test_losses_are_told_apart() -> None:
    """A pixel that is white in 40 of 100 images: black in L1, grey in L2."""
    x0 = torch.full((100, 1, 4, 4), -1.0)
    x0[:40, :, 1, 1] = 1.0
    x0[40:, :, 2, 2] = 0.999  # 60 of 100
    x0[40:, :, 3] = -1 + 1e-3 * torch.rand(60, 1, 4, generator=torch.Generator().manual_seed(10))
    labels = torch.zeros(100, dtype=torch.int64)
    starts = {"all": intensities(x0)[:1]}
    l1, l2 = predict(x0, labels, starts, 100, lambda x: (x[:, 0, 1, 1] > -0.9).long())
    assert l1.counts[0] == 1 and l2.counts[1] == 1
    assert l1.blank_rate == 0 and l2.blank_rate == 0


def test_a_stroke_is_half_the_range() -> None:
    images = torch.full((4, 1, 8, 8), -1.0)
    images[1, 0, 3, 3] = -0.02  # contrast 0.49
    images[2, 0, 3, 3] = 0.02
    images[3] = 1.0
    assert without_stroke(images).tolist() == [True, True, False, True]


def test_predictions_are_json() -> None:
    x0 = sparse_images(60, seed=11)
    labels = torch.arange(60) % 10
    starts = mean_starts(intensities(x0), 20)
    made = predict(x0, labels, starts, 15, by_brightness)
    assert len(made) == 6
    read = json.loads(json.dumps([dataclasses.asdict(p) for p in made]))
    for values, p in zip(read, made, strict=True):
        counts = tuple(tuple(row) for row in values["table"].pop("counts"))
        table = ClassTable(tuple(values.pop("table")["edges"]), counts)
        lists = {name: tuple(values.pop(name)) for name in ("sampled", "counts")}
        assert Prediction(table=table, **lists, **values) == p


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 4,000 embedded training digits."""
    config = DataConfig(name="digits")
    images = load_images(config, "train")
    assert images.labels is not None
    return to_batch(images.take(torch.arange(len(images))), config), images.labels


def test_of_real_digits(digits: tuple[Tensor, Tensor]) -> None:
    x0, labels = digits
    means = intensities(x0)
    table = class_given_intensity(means, labels, 10)
    np.testing.assert_allclose(table.shares.sum(1), 1)
    assert table.leading[0] == 1 and table.leading[-1] == 0
    starts = {"real means": mean_starts(means, 400)["real means"]}
    for prediction in predict(x0, labels, starts, 200):
        assert sum(prediction.counts) == 400
        assert sum(prediction.sampled) == pytest.approx(1)
        # 400 of each class; the windows are smooth, and 400 starts are not all.
        assert prediction.sampled == pytest.approx([0.1] * 10, abs=0.03)
        # The best restorations of all means are of few classes: what is to be explained.
        assert np.count_nonzero(prediction.counts) < 7


def test_the_classifier_reads_batches_in_their_order(digits: tuple[Tensor, Tensor]) -> None:
    x0, labels = digits
    # The classes stand in turn, which a shift by a batch would not show.
    chosen = torch.randperm(len(x0), generator=torch.Generator().manual_seed(14))[:600]
    assert float((digit_classes(x0[chosen]) == labels[chosen]).double().mean()) > 0.98


# The figure.


def test_figure_shows_the_labels_and_every_restoration() -> None:
    means = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.5, 0.4])
    table = class_given_intensity(means, torch.tensor([0, 1, 0, 1, 7, 7]), 3)
    starts, x0 = torch.tensor([0.125, 0.25, 0.5, 0.75, 0.875]), sparse_images(5, seed=12)
    figure = draw(table, starts, {"l1": x0, "l2": -x0})
    axes = [axes for part in figure.subfigs for axes in part.axes]
    shown = [each.get_images()[0].get_array() for each in axes if each.get_images()]
    assert len(shown) == 10
    found = sorted(np.asarray(image).tobytes() for image in shown)
    assert found == sorted(image[0].numpy().tobytes() for image in (*x0, *-x0))
    titles = [each.get_title() for each in axes if each.get_images() and each.get_title()]
    assert titles == ["0.125", "0.250", "0.500", "0.750", "0.875"]
    written = [text.get_text() for text in axes[0].texts]
    assert written == [
        "1",
        "7",
        "0",
        "1",
        "7",
        "0",
    ]  # in the areas, by brightness; then the largest
    heights = [bar.get_height() for bar in axes[0].patches]
    assert sum(heights) == pytest.approx(3)


def test_figure_is_written() -> None:
    table = class_given_intensity(torch.rand(50), torch.arange(50) % 10, 5)
    x0 = sparse_images(8, seed=13)
    files = render(lambda: draw(table, torch.rand(8), {"l1": x0, "l2": x0}), "caption")
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF")
