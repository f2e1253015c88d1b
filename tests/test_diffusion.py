"""Loss and samplers, against their definitions and what the paper proves about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from plain_blur import PAPER, random_images, sequence
from torch import Tensor

from colddiff.config import DegradationConfig
from colddiff.degradation import Blur, Degradation, Discrete, Noise
from colddiff.diffusion import (
    SAMPLERS,
    Restorer,
    Step,
    own_states,
    restoration_loss,
    restore_directly,
    sample_algorithm1,
    sample_algorithm2,
)
from colddiff.levels import check_levels, parse_levels

needs_every_schedule = pytest.mark.parametrize("name", PAPER)
both_algorithms = pytest.mark.parametrize("algorithm", SAMPLERS)


class Linear:
    """D(x, t) = x + t e: the degradation for which Algorithm 2 needs no good restorer."""

    def __init__(self, e: Tensor, T: int) -> None:
        self.e, self.T = e, T

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        return x0 + t[:, None, None, None] * self.e

    def terminal(self, x0: Tensor) -> Tensor:
        return x0 + self.T * self.e


def oracle(x0: Tensor) -> Restorer:
    return lambda xt, t: x0


def guess(xt: Tensor, t: Tensor) -> Tensor:
    """A wrong restorer that depends on everything it is given."""
    return torch.tanh(2 * xt.flip(-1)) + 0.03 * t[:, None, None, None]


def late(restorer: Restorer, from_level: int, until_then: Tensor) -> Restorer:
    """An oracle above a level, the restorer from there on."""
    return lambda xt, t: until_then if int(t[0]) > from_level else restorer(xt, t)


def level_lists(T: int) -> list[Sequence[int] | None]:
    return [None, (T, 0), (T, T - 1, T // 2, 1, 0), range(T, -1, -1)]


# Algorithm 2 with an oracle restores x0.


@needs_every_schedule
def test_algorithm2_with_an_oracle_restores_x0(name: str) -> None:
    degradation, x0 = Blur(PAPER[name][0], 14, 16), random_images(2, 1, 14, 16, seed=1)
    xT = degradation.terminal(x0)
    for levels in level_lists(degradation.T):
        restored = sample_algorithm2(oracle(x0), degradation, xT, levels)
        torch.testing.assert_close(restored, x0.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_algorithm2_with_an_oracle_from_the_discrete_start(name: str) -> None:
    degradation = Discrete(Blur(PAPER[name][0], 16))
    x0 = random_images(2, 3, 16, 16, seed=2)
    for levels in level_lists(degradation.T):
        restored = sample_algorithm2(oracle(x0), degradation, degradation.terminal(x0), levels)
        torch.testing.assert_close(restored, x0, rtol=0, atol=1e-6)


def test_algorithm2_with_an_oracle_and_held_noise() -> None:
    x0 = random_images(2, 1, 8, 8, seed=3)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    held = Noise(DegradationConfig(kind="noise", T=30)).hold(z)
    for levels in level_lists(30):
        restored = sample_algorithm2(oracle(x0), held, held.terminal(x0), levels)
        torch.testing.assert_close(restored, x0.float(), rtol=0, atol=1e-5)


# With D linear in t, Algorithm 2 is exact whatever the restorer says, and Algorithm 1 is not.


@pytest.mark.parametrize("T", [1, 7, 30])
def test_algorithm2_is_exact_for_any_restorer_where_D_is_linear(T: int) -> None:
    x0, e = random_images(3, 2, 6, 6, seed=4).double(), random_images(3, 2, 6, 6, seed=5).double()
    degradation = Linear(e / T, T)
    wrong: list[Restorer] = [guess, lambda xt, t: torch.zeros_like(xt), lambda xt, t: 5 - xt]
    levels = (T, T // 2, 0) if T > 1 else (1, 0)
    for restorer in wrong:
        for chosen in (None, levels):
            # Estimates pass through float32, which bounds what is exact.
            restored = sample_algorithm2(restorer, degradation, degradation.terminal(x0), chosen)
            torch.testing.assert_close(restored, x0.float(), rtol=0, atol=1e-5)
        naive = sample_algorithm1(restorer, degradation, degradation.terminal(x0))
        assert float((naive - x0).abs().max()) > 0.2


# Both algorithms, line by line, for one image at a time.


def slowly(
    algorithm: str, restorer: Restorer, degradation: Degradation, xT: Tensor, levels: Sequence[int]
) -> tuple[list[Step], Tensor]:
    steps, x = [], xT.double()
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        at = torch.tensor([s] * len(x))
        x0_hat = restorer(x.float(), at).double()
        steps.append(Step(s, x.float(), x0_hat.float()))
        after = degradation(x0_hat, torch.tensor([s_next] * len(x)))
        x = after if algorithm == "algorithm1" else x - degradation(x0_hat, at) + after
    return steps, x.float()


@both_algorithms
@pytest.mark.parametrize("levels", [None, (20, 10, 0), (20, 4, 3, 2, 1, 0), (20, 0)])
def test_samplers_are_their_definitions(algorithm: str, levels: tuple[int, ...] | None) -> None:
    degradation = Blur(PAPER["mnist"][0], 16)
    xT = degradation.terminal(random_images(3, 1, 16, 16, seed=6))
    seen: list[Step] = []
    result = SAMPLERS[algorithm](guess, degradation, xT, levels, seen.append)
    visited = tuple(range(20, -1, -1)) if levels is None else levels
    steps, expected = slowly(algorithm, guess, degradation, xT, visited)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert [step.t for step in seen] == list(visited[:-1])
    for ours, theirs in zip(seen, steps, strict=True):
        torch.testing.assert_close(ours.xt, theirs.xt, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.x0_hat, theirs.x0_hat, rtol=0, atol=1e-6)
    assert torch.equal(result, SAMPLERS[algorithm](guess, degradation, xT, levels))


def test_algorithm1_with_the_authors_convolutions() -> None:
    """The paper's own procedure: blur the estimate s - 1 times, by convolutions."""
    degradation, x = Blur(PAPER["cifar10"][0], 16), random_images(1, 3, 16, 16, seed=7)
    expected = xT = degradation.terminal(x)
    levels = (50, 30, 12, 3, 0)
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        expected = sequence("cifar10", guess(expected, torch.tensor([s])))[s_next]
    result = sample_algorithm1(guess, degradation, xT, levels)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@both_algorithms
def test_from_T_straight_to_0_is_direct_restoration(algorithm: str) -> None:
    degradation = Blur(PAPER["mnist"][0], 16)
    xT = degradation.terminal(random_images(2, 1, 16, 16, seed=8))
    result = SAMPLERS[algorithm](guess, degradation, xT, (20, 0))
    direct = restore_directly(guess, xT, 20)
    # Algorithm 2 adds what D(x0_hat, T) leaves unexplained of x_T.
    unexplained = xT - degradation.terminal(direct) if algorithm == "algorithm2" else 0
    torch.testing.assert_close(result, direct + unexplained, rtol=0, atol=1e-6)


def test_samplers_do_not_round_where_training_does() -> None:
    blur = Blur(PAPER["mnist"][0], 16)
    discrete = Discrete(blur)
    xT = discrete.terminal(random_images(2, 1, 16, 16, seed=9))
    below_T = (20, 9, 4, 0)
    ours = sample_algorithm1(guess, discrete, xT, below_T)
    assert torch.equal(ours, sample_algorithm1(guess, blur, xT, below_T))


@both_algorithms
def test_samplers_change_nothing_they_are_given(algorithm: str) -> None:
    degradation = Blur(PAPER["mnist"][0], 16)
    xT = degradation.terminal(random_images(2, 1, 16, 16, seed=10))
    before = xT.clone()
    SAMPLERS[algorithm](guess, degradation, xT)
    assert torch.equal(xT, before)


@both_algorithms
def test_bfloat16_estimates_are_degraded_in_float32(algorithm: str) -> None:
    degradation = Blur(PAPER["mnist"][0], 16)
    xT = degradation.terminal(random_images(2, 1, 16, 16, seed=11))

    def low(xt: Tensor, t: Tensor) -> Tensor:
        assert xt.dtype == torch.float32
        return guess(xt, t).bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        result = SAMPLERS[algorithm](low, degradation, xT)
    assert result.dtype == torch.float32
    _, expected = slowly(
        algorithm, lambda xt, t: low(xt, t).float(), degradation, xT, range(20, -1, -1)
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


# Levels.

BAD_LEVELS: list[Sequence[int]] = [
    (),
    (20,),
    (20, 20, 0),
    (20, 10, 15, 0),
    (19, 10, 0),
    (21, 0),
    (20, 10, 1),
    (20, 0, -1),
    (0, 20),
]


@both_algorithms
@pytest.mark.parametrize("levels", BAD_LEVELS)
def test_bad_levels_are_refused_before_anything_runs(algorithm: str, levels: Sequence[int]) -> None:
    def never(xt: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("restored something")

    degradation = Blur(PAPER["mnist"][0], 16)
    listed = "-".join(map(str, levels))
    with pytest.raises(ValueError, match=f"levels = '{listed}'.*strictly falling from T = 20 to 0"):
        SAMPLERS[algorithm](never, degradation, torch.zeros(1, 1, 16, 16), levels)


def test_parsed_levels() -> None:
    assert parse_levels("20-10-0") == (20, 10, 0)
    check_levels(parse_levels("20-4-3-2-1-0"), 20)
    for text in ("", "20-", "20--0", "20,10,0", "a-0", "20-1.5-0", "-20-0"):
        with pytest.raises(ValueError, match="levels"):
            parse_levels(text)


# The loss.


def test_loss_by_hand() -> None:
    x0 = torch.tensor([[[[0.5, -1.0]]], [[[1.0, 0.25]]]])
    e = torch.tensor([[[[0.1, 0.2]]]])
    t = torch.tensor([1, 3])

    def restorer(xt: Tensor, t: Tensor) -> Tensor:
        return xt / 2 + t[:, None, None, None]

    # x_t: 0.6, -0.8 and 1.3, 0.85; R: 1.3, 0.6 and 3.65, 3.425; minus x0:
    errors = [0.8, 1.6, 2.65, 3.175]
    l1 = restoration_loss(restorer, Linear(e, 3)(x0, t), t, x0)
    l2 = restoration_loss(restorer, Linear(e, 3)(x0, t), t, x0, "l2")
    assert float(l1) == pytest.approx(sum(errors) / 4, rel=1e-6)
    assert float(l2) == pytest.approx(sum(error**2 for error in errors) / 4, rel=1e-6)
    assert l1.shape == l2.shape == ()


def test_loss_is_zero_for_the_oracle_and_float32_for_bfloat16_estimates() -> None:
    degradation, x0 = Blur(PAPER["mnist"][0], 16), random_images(4, 1, 16, 16, seed=12)
    t = torch.tensor([1, 5, 13, 20])
    kinds: tuple[Literal["l1", "l2"], ...] = ("l1", "l2")
    for kind in kinds:
        assert restoration_loss(oracle(x0), degradation(x0, t), t, x0, kind) == 0
        low = restoration_loss(lambda xt, t: xt.bfloat16(), degradation(x0, t), t, x0, kind)
        difference = degradation(x0, t).bfloat16().float() - x0
        power = difference.abs() if kind == "l1" else difference**2
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, power.mean())


def test_loss_trains_the_restorer_alone() -> None:
    degradation, x0 = Blur(PAPER["mnist"][0], 16), random_images(2, 1, 16, 16, seed=13)
    scale = torch.tensor(0.5, requires_grad=True)
    t = torch.tensor([2, 20])
    loss = restoration_loss(lambda xt, t: scale * xt, degradation(x0, t), t, x0, "l2")
    loss.backward()
    xt = degradation(x0, t)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (2 * (0.5 * xt - x0) * xt).mean())


def test_a_bounded_restorer_may_go_beyond_black_and_white_there_alone() -> None:
    x0 = torch.tensor([[[[-1.0, -1.0, 1.0, 1.0, 0.5, 0.5]]]])
    x0_hat = torch.tensor([[[[-1.5, -0.5, 1.5, 0.5, 1.5, -1.5]]]], requires_grad=True)
    t = torch.tensor([1])
    loss = restoration_loss(lambda xt, t: xt, x0_hat, t, x0, bounded=True)
    assert float(loss.detach()) == pytest.approx((0 + 0.5 + 0 + 0.5 + 1 + 2) / 6)
    loss.backward()
    # No slope where nothing is wrong; beyond the range it still leads back.
    assert x0_hat.grad is not None
    assert (x0_hat.grad * 6).flatten().tolist() == pytest.approx([0, 1, 0, -1, 1, -1])


@needs_every_schedule
def test_own_states_are_where_algorithm2_arrives(name: str) -> None:
    degradation, x0 = Blur(PAPER[name][0], 16), random_images(3, 1, 16, 16, seed=15)
    T = degradation.T
    u, t = torch.tensor([T, T, T - 1]), torch.tensor([T - 1, 1, T // 2])
    xt = own_states(guess, degradation, x0, (u, t))
    for image, start, end, state in zip(x0.split(1), u.tolist(), t.tolist(), xt, strict=True):
        steps: list[Step] = []
        # The sampler starts at T; a perfect first step takes it to level u.
        restorer = late(guess, from_level=start, until_then=image)
        levels = sorted({T, start, end, 0}, reverse=True)
        sample_algorithm2(restorer, degradation, degradation.terminal(image), levels, steps.append)
        arrived = next(step.xt for step in steps if step.t == end)
        torch.testing.assert_close(state[None], arrived, atol=2e-6, rtol=0)
    exact = own_states(oracle(x0), degradation, x0, (u, t))
    torch.testing.assert_close(exact, degradation(x0, t), atol=1e-6, rtol=0)


def test_algorithm2_adds_nothing_to_the_rounding_of_its_start() -> None:
    """Its states differ from exact ones by float32's rounding of x_T, and not by twenty more."""
    degradation, x0 = Blur(PAPER["mnist"][0], 32), random_images(4, 1, 32, 32, seed=16)
    steps: list[Step] = []
    sample_algorithm2(oracle(x0), degradation, degradation.terminal(x0), observe=steps.append)
    worst = 0.0
    for step in steps:
        exact = degradation(x0.double(), torch.full((4,), step.t))
        worst = max(worst, float((step.xt - exact).abs().max()))
    # Half a unit in the last place of values below 1, once for x_T and once for x_s.
    assert worst <= 2 * 2.0**-25


def test_direct_restoration_is_one_call_at_T() -> None:
    calls: list[Tensor] = []

    def restorer(xt: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return xt + 1

    xT = random_images(3, 1, 8, 8, seed=14)
    assert torch.equal(restore_directly(restorer, xT, 17), xT + 1)
    assert len(calls) == 1 and calls[0].tolist() == [17, 17, 17]
    assert calls[0].dtype == torch.int64
