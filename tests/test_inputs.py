"""What the network is trained on: levels, exact states, and states of its own making."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_blur import random_images
from tiny import changed, tiny
from torch import Tensor

from colddiff.batches import Order
from colddiff.config import RunConfig
from colddiff.degradation import Blur, Noise, build_degradation
from colddiff.inputs import Inputs
from colddiff.randomness import generator

CPU = torch.device("cpu")
BATCH, T = 60, 4


def guess(xt: Tensor, t: Tensor) -> Tensor:
    """A wrong restorer that depends on everything it is given."""
    return torch.tanh(3 * xt.flip(-1)) + 0.5 * t[:, None, None, None]


def made(config: RunConfig, restorer: Any = guess, rank: int = 0, world_size: int = 1) -> Inputs:
    degradation = build_degradation(config.degradation, 16)
    order = Order(1000, BATCH, config.training.seed, rank, world_size)
    return Inputs(config, order, degradation, restorer, CPU)


def config_of(kind: str = "blur", bounded: bool = False, **training: Any) -> RunConfig:
    config = tiny(batch_size=BATCH, **training)
    return changed(config, {"degradation": {"kind": kind}, "model": {"bounded": bounded}})


X0 = random_images(BATCH, 1, 16, 16, seed=21)


def test_states_are_exact_and_levels_uniform() -> None:
    inputs = made(config_of())
    counts = torch.zeros(T + 1)
    for k in range(50):
        xt, t = inputs(k, X0)
        assert torch.equal(xt, inputs.degradation(X0, t))  # type: ignore[operator]
        counts += torch.bincount(t, minlength=T + 1)
    # 3,000 draws: 750 each, deviation 24.
    assert counts[0] == 0
    assert bool(((counts[1:] - 750).abs() < 100).all())


def test_levels_last() -> None:
    xt, t = made(config_of(levels="last"))(3, X0)
    assert t.tolist() == [T] * BATCH
    assert torch.equal(xt, Blur(config_of().degradation, 16).terminal(X0))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("bounded", [False, True])
def test_own_states_by_hand(share: float, bounded: bool) -> None:
    """Image by image: where Algorithm 2 arrives from a level above, all of which are drawn."""
    config = config_of(own_states=share, bounded=bounded)
    inputs, blur = made(config), Blur(config.degradation, 16)
    assert int(inputs.own.sum()) == round(share * BATCH)
    jumps = set()
    for k in range(4):
        xt, t = inputs(k, X0)
        own = torch.zeros(BATCH, dtype=torch.bool)
        for i in range(BATCH):
            x0, level = X0[i : i + 1].double(), t[i : i + 1]
            if torch.allclose(xt[i : i + 1].double(), blur(x0, level), atol=1e-6):
                continue
            own[i] = True
            arrivals = {}
            for u in range(int(level) + 1, T + 1):
                above = torch.tensor([u])
                xu = blur(x0, above)
                x0_hat = guess(xu.float(), above).double()
                x0_hat = x0_hat.clamp(-1, 1) if bounded else x0_hat
                arrived = xu - blur(x0_hat, above) + blur(x0_hat, level)
                arrivals[u] = float((xt[i : i + 1] - arrived).abs().max())
            nearest = min(arrivals, key=lambda u: arrivals[u])
            assert arrivals[nearest] < 2e-6
            jumps.add((nearest, int(level)))
        assert torch.equal(own, inputs.own)
        assert int(t[own].max()) < T
    assert jumps == {(u, t) for t in range(1, T) for u in range(t + 1, T + 1)}


def test_a_perfect_restorers_own_states_are_exact() -> None:
    for kind in ("blur", "noise"):
        config = config_of(kind, own_states=1.0)
        truth = made(config, restorer=lambda xt, t: X0)
        plain = made(config_of(kind))
        k = 2
        xt, t = truth(k, X0)
        held: Any = plain.degradation
        if isinstance(held, Noise):
            z = torch.randn(BATCH, 1, 16, 16, generator=generator(0, "noise", k))
            held = held.hold(z)
        torch.testing.assert_close(xt, held(X0, t), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_ranks_share_what_one_process_has(kind: str) -> None:
    config = config_of(kind, own_states=0.5)
    xt, t = made(config)(7, X0)
    shares = [made(config, rank=rank, world_size=4)(7, X0[15 * rank :][:15]) for rank in range(4)]
    torch.testing.assert_close(torch.cat([part for part, _ in shares]), xt, atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([levels for _, levels in shares]), t)


def test_no_gradient_flows_through_own_states() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    xt, _ = made(config_of(own_states=1.0), restorer=lambda xt, t: scale * xt)(0, X0)
    assert not xt.requires_grad
