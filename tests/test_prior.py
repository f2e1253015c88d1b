"""Where generation starts: the mixture's moments, real terminal states, symmetry breaking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_blur import random_images
from torch import Tensor

from colddiff.config import DegradationConfig
from colddiff.degradation import Blur, Discrete
from colddiff.prior import MeanPrior, TerminalPrior, break_symmetry, real_terminals

N = 20_000


def correlated_means(n: int = 4000) -> Tensor:
    """Three channel means with a known covariance, well inside [-1, 1]."""
    factor = torch.tensor([[0.1, 0.0, 0.0], [0.06, 0.08, 0.0], [-0.05, 0.02, 0.05]])
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return torch.tensor([-0.3, 0.0, 0.2]) + z @ factor.T


def values(sample: Tensor) -> Tensor:
    """The constant of each channel, float64 ``n c``."""
    return sample[:, :, 0, 0].double()


def test_one_component_has_the_moments_of_the_means() -> None:
    means = correlated_means().double()
    drawn = values(MeanPrior.fit(means, 1).sample(N, 1, 1, seed=2))
    mean, covariance = means.mean(0), torch.cov(means.T, correction=0)
    deviation = covariance.diagonal().sqrt()
    assert bool(((drawn.mean(0) - mean).abs() < 4 * deviation / math.sqrt(N)).all())
    # The standard error of a Gaussian's sample covariance: sqrt((s_ij² + s_ii s_jj) / n).
    products = torch.outer(covariance.diagonal(), covariance.diagonal())
    error = ((covariance**2 + products) / N).sqrt()
    # scikit-learn adds 1e-6 to the diagonal.
    assert bool(((torch.cov(drawn.T) - covariance).abs() < 4 * error + 1e-6).all())


def test_components_are_drawn_by_their_weights() -> None:
    centres, shares, deviation = (-0.4, 0.0, 0.4), (0.2, 0.5, 0.3), 0.02
    z = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    parts = torch.split(z, [int(5000 * share) for share in shares])
    means = torch.cat([c + deviation * part for c, part in zip(centres, parts, strict=True)])
    prior = MeanPrior.fit(means[:, None], 3, seed=4)
    drawn = values(prior.sample(N, 1, 1, seed=5))[:, 0]
    nearest = (drawn[:, None] - torch.tensor(centres)).abs().argmin(1)
    for k, (centre, share) in enumerate(zip(centres, shares, strict=True)):
        mine = drawn[nearest == k]
        error = math.sqrt(share * (1 - share) / N)
        assert len(mine) / N == pytest.approx(share, abs=4 * error + 1e-3)
        assert float(mine.mean()) == pytest.approx(centre, abs=0.005)
        assert float(mine.std()) == pytest.approx(deviation, rel=0.05)
    # One component cannot tell them apart, but has their overall moments.
    single = values(MeanPrior.fit(means[:, None], 1).sample(N, 1, 1))[:, 0]
    assert float(single.std()) == pytest.approx(float(means.std()), rel=0.03)
    middle = (single - 0.2).abs() < 0.1  # between the clusters
    assert float(middle.double().mean()) > 0.05
    assert not bool(((drawn - 0.2).abs() < 0.1).any())


def test_samples_are_constant_float32_images_in_range() -> None:
    bright = 0.95 + 0.1 * torch.randn(500, 3, generator=torch.Generator().manual_seed(6))
    images = MeanPrior.fit(bright, 1).sample(50, 6, 9)
    assert images.shape == (50, 3, 6, 9) and images.dtype == torch.float32
    assert torch.equal(images.amin(dim=(-2, -1)), images.amax(dim=(-2, -1)))
    assert float(images.max()) == 1.0 and float(images.min()) >= -1
    images[0, 0, 0, 0] = -1  # every pixel is its own, not a view of one
    assert images[0, 0, 0, 1] != -1


def test_samples_are_a_function_of_the_seed() -> None:
    prior = MeanPrior.fit(correlated_means(), 2, seed=7)
    again = MeanPrior.fit(correlated_means(), 2, seed=7)
    first = prior.sample(20, 2, 2, seed=8)
    np.random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(first, prior.sample(20, 2, 2, seed=8))
    assert torch.equal(first, again.sample(20, 2, 2, seed=8))
    assert not torch.equal(first, prior.sample(20, 2, 2, seed=9))


@pytest.mark.parametrize("components", [0, -1, 11])
def test_bad_numbers_of_components_are_refused(components: int) -> None:
    with pytest.raises(ValueError, match=rf"components = {components} must be in 1..10"):
        MeanPrior.fit(torch.rand(10, 1), components)


# Real terminal states.


@pytest.mark.parametrize("discrete", [False, True])
def test_real_terminals_are_those_of_the_images(discrete: bool) -> None:
    blur, x0 = Blur(DegradationConfig(T=5), 16), random_images(12, 1, 16, 16, seed=10)
    degradation = Discrete(blur) if discrete else blur
    all_terminals = degradation.terminal(x0)
    drawn = real_terminals(degradation.terminal, x0, 7, seed=11)
    distance = (drawn[:, None] - all_terminals).abs().amax(dim=(-3, -2, -1))
    nearest = distance.argmin(1)
    assert float(distance.amin(1).max()) < 1e-6
    assert len(set(nearest.tolist())) == 7  # without replacement
    assert torch.equal(drawn, real_terminals(degradation.terminal, x0, 7, seed=11))
    assert not torch.equal(drawn, real_terminals(degradation.terminal, x0, 7, seed=12))


def test_real_terminals_repeat_only_when_images_run_out() -> None:
    x0 = torch.arange(5.0).view(5, 1, 1, 1)
    drawn = real_terminals(lambda x: x, x0, 13, seed=13).flatten().tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(drawn[10:])) == 3
    assert drawn[:5] != drawn[5:10]


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        real_terminals(lambda x: x, torch.zeros(0, 1, 4, 4), 3)


# Symmetry breaking.


@pytest.mark.parametrize("std", [0.002, 0.1])
def test_symmetry_is_broken_by_noise_of_that_deviation(std: float) -> None:
    xT = torch.full((40, 1, 32, 32), 0.25)
    noise = break_symmetry(xT, std, seed=14).double() - 0.25
    count = noise.numel()
    assert float(noise.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(count))
    assert float(noise.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * count))
    assert float(noise.std(dim=0).min()) > 0.5 * std  # its own in every image
    assert torch.equal(break_symmetry(xT, std, seed=14), break_symmetry(xT, std, seed=14))
    assert not torch.equal(break_symmetry(xT, std, seed=14), break_symmetry(xT, std, seed=15))
    assert bool((xT == 0.25).all())


def test_perfect_symmetry_is_left_alone() -> None:
    xT = random_images(2, 1, 4, 4, seed=16)
    assert torch.equal(break_symmetry(xT, 0.0), xT)


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise std = -0.1 must be at least 0"):
        break_symmetry(torch.zeros(1, 1, 2, 2), -0.1)


def states(deviations: list[float], n: int = 3000) -> Tensor:
    """Float64 x_T with these deviations along orthogonal directions, about a random mean."""
    source = torch.Generator().manual_seed(6)
    basis, _ = torch.linalg.qr(torch.randn(36, len(deviations), generator=source).double())
    z = torch.randn(n, len(deviations), generator=source).double()
    mean = torch.rand(36, generator=source).double() - 0.5
    return (mean + (z * torch.tensor(deviations)) @ basis.T).view(n, 1, 6, 6)


def test_terminal_states_have_the_moments_of_the_images_at_every_scale() -> None:
    """Also along the directions a thousandth as long, which is where the digits are."""
    xT = states([0.3, 1e-2, 3e-4])
    drawn = TerminalPrior.fit(xT, 1).sample(N, seed=3)
    assert drawn.shape == (N, 1, 6, 6) and drawn.dtype == torch.float32
    flat, new = xT.flatten(1), drawn.double().flatten(1)
    covariance = torch.cov(flat.T, correction=0)
    lengths, axes = torch.linalg.eigh(covariance)
    for length, axis in zip(lengths[-3:], axes.T[-3:], strict=True):
        deviation = float(length.sqrt())
        coordinates = (new - flat.mean(0)) @ axis
        assert float(coordinates.mean()) == pytest.approx(0, abs=4 * deviation / math.sqrt(N))
        assert float(coordinates.std()) == pytest.approx(deviation, rel=0.03)
    rest = (new - flat.mean(0)) @ axes[:, :-3]
    assert float(rest.abs().max()) < 2e-7  # float32 alone


def test_what_float32_rounds_away_is_not_drawn() -> None:
    prior = TerminalPrior.fit(states([0.3, 1e-2, 1e-7, 1e-7]), 2)
    assert len(prior.axes) == 2


def test_terminal_states_keep_their_clusters() -> None:
    """Two clusters along a faint direction: of two components, nothing lies between them."""
    xT = states([0.3, 1e-5])
    direction = states([1.0], n=2)
    offset = (direction[1] - direction[0]) / (direction[1] - direction[0]).norm()
    side = torch.where(torch.arange(len(xT)) % 3 == 0, 1.0, -1.0).double()
    xT = xT + 0.01 * side[:, None, None, None] * offset
    centre = xT.flatten(1).mean(0)
    # Across the long direction, which the offset is not at right angles to.
    long = torch.linalg.eigh(torch.cov(xT.flatten(1).T))[1][:, -1]
    across = offset.flatten() - (offset.flatten() @ long) * long

    def between(components: int) -> float:
        drawn = TerminalPrior.fit(xT, components).sample(6000).double().flatten(1)
        place = (drawn - centre) @ across / (across @ across) / 0.01
        return float(((place > -0.2) & (place < 0.8)).double().mean())

    known = (xT.flatten(1) - centre) @ across / (across @ across) / 0.01
    assert float(((known > -0.2) & (known < 0.8)).double().mean()) < 0.001
    assert between(2) < 0.01
    assert between(1) > 0.2


def test_terminal_states_that_are_constant_stay_so() -> None:
    """The authors' discrete degradation leaves the mean alone."""
    images = random_images(200, 1, 8, 8)
    prior = TerminalPrior.fit(images.mean(dim=(1, 2, 3), keepdim=True).expand(200, 1, 8, 8), 1)
    drawn = prior.sample(500)
    assert len(prior.axes) == 1
    assert torch.allclose(drawn, drawn[:, :, :1, :1].expand_as(drawn), atol=1e-7)
    assert float(drawn.std()) == pytest.approx(float(images.mean(dim=(1, 2, 3)).std()), rel=0.1)


def test_terminal_states_are_a_function_of_the_seed() -> None:
    xT = states([0.3, 1e-2])
    torch.manual_seed(1)
    first = TerminalPrior.fit(xT, 3).sample(50, seed=1)
    torch.manual_seed(2)
    prior = TerminalPrior.fit(xT, 3)
    assert torch.equal(prior.sample(50, seed=1), first)
    assert not torch.equal(prior.sample(50, seed=2), first)


@pytest.mark.parametrize("components", [0, 21])
def test_terminal_states_need_images_enough(components: int) -> None:
    with pytest.raises(ValueError, match=rf"components = {components} must be in 1..20"):
        TerminalPrior.fit(states([0.3], n=20), components)
