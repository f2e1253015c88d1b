"""Samplers of hot diffusion, against Bayes' rule and closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from colddiff.config import DegradationConfig
from colddiff.degradation import Noise
from colddiff.diffusion import Restorer, Step, sample_algorithm2
from colddiff.hot_samplers import posterior, sample_ddim, sample_ddpm

T = 12
Schedule = Literal["cosine", "linear"]
schedules = pytest.mark.parametrize("schedule", ["cosine", "linear"])
lists = pytest.mark.parametrize("levels", [None, (T, 7, 3, 1, 0), (T, 0)])


def noise_of(schedule: Schedule) -> Noise:
    return Noise(DegradationConfig(kind="noise", T=T, noise_schedule=schedule)).double()


def images(count: int = 3, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 12, 12, generator=source, dtype=torch.float64) * 2 - 1


def fresh(x: Tensor, seed: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=source, dtype=torch.float64)


def oracle(x0: Tensor) -> Restorer:
    return lambda xt, t: x0


@schedules
@lists
def test_with_an_oracle_all_end_at_x0(schedule: Schedule, levels: Sequence[int] | None) -> None:
    noise, x0 = noise_of(schedule), images().float()
    xT = noise.hold(fresh(x0).float()).terminal(x0)
    assert torch.equal(sample_ddim(oracle(x0), noise, xT, levels), x0)
    ancestral = sample_ddpm(oracle(x0), noise, xT, lambda s: fresh(x0, s), levels)
    assert torch.allclose(ancestral.double(), x0.double(), atol=1e-6)


@schedules
def test_estimated_noise_is_the_held_one_where_the_restorer_is_right(schedule: Schedule) -> None:
    """Then every state on the way is that of Algorithm 2 with fixed noise."""
    noise, x0 = noise_of(schedule), images()
    z = fresh(x0)
    held = noise.hold(z)
    estimated: list[Step] = []
    fixed: list[Step] = []
    sample_ddim(oracle(x0), noise, held.terminal(x0), observe=estimated.append)
    sample_algorithm2(oracle(x0), held, held.terminal(x0), observe=fixed.append)
    assert [step.t for step in estimated] == [step.t for step in fixed] == list(range(T, 0, -1))
    for one, other in zip(estimated, fixed, strict=True):
        assert torch.allclose(one.xt.float(), other.xt, atol=1e-6)  # x0_hat is float32


@schedules
def test_estimated_noise_is_the_integral_of_a_known_flow(schedule: Schedule) -> None:
    """For data N(0, v), E[x0 | x_t] is linear, and DDIM scales x by a known factor a step."""
    noise, v = noise_of(schedule), 0.3

    def ideal(xt: Tensor, t: Tensor) -> Tensor:
        power = noise.signal_power[t][:, None, None, None]
        return power.sqrt() * v / (power * v + 1 - power) * xt

    xT = fresh(images())
    result = sample_ddim(ideal, noise, xT)
    factor = 1.0
    power = noise.signal_power.numpy()
    for s in range(T, 0, -1):
        shrink = np.sqrt(power[s]) * v / (power[s] * v + 1 - power[s])
        z = (1 - np.sqrt(power[s]) * shrink) / np.sqrt(1 - power[s])
        factor *= np.sqrt(power[s - 1]) * shrink + np.sqrt(1 - power[s - 1]) * z
    assert torch.allclose(result, factor * xT, rtol=1e-5, atol=1e-6)


@schedules
@pytest.mark.parametrize(("s", "s_next"), [(T, T - 1), (T, 4), (5, 2), (1, 0)])
def test_the_posterior_is_bayes_rule_on_a_grid(schedule: Schedule, s: int, s_next: int) -> None:
    """q(x_s' | x_s, x0) is proportional to q(x_s | x_s') q(x_s' | x0)."""
    noise = noise_of(schedule)
    power, power_next = (noise.signal_power[t].item() for t in (s, s_next))
    x0, xs = 0.4, -0.7
    mean, std = posterior(noise, torch.tensor(x0), torch.tensor(xs), s, s_next)
    if s_next == 0:
        assert float(mean) == pytest.approx(x0)
        assert float(std) == 0
        return
    x = np.linspace(-8, 8, 200_001)
    kept = power / power_next
    log = -((xs - np.sqrt(kept) * x) ** 2) / (2 * (1 - kept))
    log -= (x - np.sqrt(power_next) * x0) ** 2 / (2 * (1 - power_next))
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    expected = (weights * x).sum()
    assert float(mean) == pytest.approx(expected, abs=1e-5)
    assert float(std) == pytest.approx(np.sqrt((weights * (x - expected) ** 2).sum()), rel=1e-4)


def test_ancestral_samples_have_the_variance_that_follows() -> None:
    """With the ideal restorer of N(0, v) each step is linear: variances follow by hand."""
    v, many = 0.3, 200
    noise = Noise(DegradationConfig(kind="noise", T=many, noise_schedule="linear")).double()
    power = noise.signal_power.numpy()

    def ideal(xt: Tensor, t: Tensor) -> Tensor:
        a = noise.signal_power[t][:, None, None, None]
        return a.sqrt() * v / (a * v + 1 - a) * xt

    xT = fresh(torch.empty(40, 1, 24, 24))
    made = sample_ddpm(ideal, noise, xT, lambda s: fresh(xT, 10 + s))
    variance = 1.0
    for s in range(many, 0, -1):
        a, b, beta = power[s], power[s - 1], 1 - power[s] / power[s - 1]
        x0 = np.sqrt(a) * v / (a * v + 1 - a)
        factor = (np.sqrt(b) * beta * x0 + np.sqrt(1 - beta) * (1 - b)) / (1 - a)
        variance = factor**2 * variance + (1 - b) / (1 - a) * beta * (s > 1)
    assert made.var().item() == pytest.approx(variance, rel=0.03)
    assert variance == pytest.approx(v, rel=0.15)  # nearer with more steps
    assert made.mean().item() == pytest.approx(0, abs=0.02)


def test_levels_are_refused_before_anything_runs() -> None:
    noise, xT = noise_of("cosine"), images()

    def never(xt: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    for levels in ((T - 1, 0), (T, 3), (T, 5, 5, 0)):
        with pytest.raises(ValueError, match="levels"):
            sample_ddim(never, noise, xT, levels)
        with pytest.raises(ValueError, match="levels"):
            sample_ddpm(never, noise, xT, lambda s: xT, levels)
