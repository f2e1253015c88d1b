"""What surrounds the U-Net: the linear estimate, folded pixels, precision."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from plain_blur import random_images
from torch import Tensor, nn

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from colddiff.degradation import Blur, cumulative_matrices
from colddiff.restorer import (
    DISCRETE_FLOOR,
    FLOORS,
    Restorer,
    WienerEstimate,
    build_restorer,
)
from colddiff.unet import UNet

SMALL = RunConfig(
    data=DataConfig(name="digits", image_size=16),
    degradation=DegradationConfig(T=20),
    model=ModelConfig(dim=4, mults=(1, 2)),
)


class Spy(nn.Module):
    """In place of the U-Net: keeps its input, returns a function of its first channels."""

    def __init__(self, out_channels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_channels, self.dtype = out_channels, dtype
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x)
        scale = (1 + t / 100)[:, None, None, None]
        return (x[:, : self.out_channels] * scale).to(self.dtype)


# The Wiener estimate.


def ridge_regression(A: Tensor, xt: Tensor, floor: float) -> Tensor:
    """argmin |A x Aᵀ - (xt - m)|² + floor² |x|², plus m, as one dense system a channel."""
    K = torch.kron(A, A)
    mean = xt.mean(dim=(-2, -1), keepdim=True)
    right = K.T @ (xt - mean).flatten(2)[..., None]
    solution: Tensor = torch.linalg.solve(
        K.T @ K + floor**2 * torch.eye(len(K), dtype=A.dtype), right
    )
    x0_hat: Tensor = mean + solution.view_as(xt)
    return x0_hat


@pytest.mark.parametrize("padding", ["circular", "reflect"])
@pytest.mark.parametrize("floor", [1e-3, 1e-2, 0.3])
def test_wiener_estimate_is_ridge_regression(
    padding: Literal["circular", "reflect"], floor: float
) -> None:
    config = DegradationConfig(T=4, kernel_size=5, sigma=1.0, padding=padding)
    matrices = cumulative_matrices(config, 6)
    estimate = WienerEstimate(matrices, floor)
    t = torch.tensor([0, 1, 2, 3, 4, 2])
    # Any image, not only a blurred one: whatever arrives is treated as a measurement.
    xt = random_images(6, 2, 6, 6, seed=1)
    ours = estimate(xt, t)
    assert ours.dtype == torch.float32
    for i, level in enumerate(t.tolist()):
        expected = ridge_regression(matrices[level], xt[i : i + 1].double(), floor)
        tolerance = 1e-6 / floor  # a rounding of x_t is amplified by up to 1 / (2 floor)
        torch.testing.assert_close(ours[i : i + 1].double(), expected, rtol=0, atol=tolerance)


def test_wiener_estimate_keeps_the_mean() -> None:
    estimate = WienerEstimate(cumulative_matrices(DegradationConfig(T=20), 16), FLOORS["float32"])
    grey = torch.full((3, 1, 16, 16), -0.37)
    t = torch.tensor([1, 10, 20])
    torch.testing.assert_close(estimate(grey, t), grey, rtol=0, atol=1e-5)
    blur, x0 = Blur(DegradationConfig(T=20), 16), random_images(3, 1, 16, 16, seed=2)
    means = x0.mean(dim=(-2, -1))
    estimated = estimate(blur(x0, t), t).mean(dim=(-2, -1))
    torch.testing.assert_close(estimated, means, rtol=0, atol=1e-4)


def test_wiener_estimate_inverts_little_blur_and_shrinks_much() -> None:
    config = DegradationConfig(T=20)
    blur, estimate = Blur(config, 32), WienerEstimate(cumulative_matrices(config, 32), 1e-6)
    x0 = random_images(1, 1, 32, 32, seed=3)
    errors = []
    for level in range(21):
        t = torch.tensor([level])
        errors.append(float((estimate(blur(x0, t), t) - x0).square().mean().sqrt()))
    assert errors[0] < 1e-5 and errors[1] < 0.02
    spread = float((x0 - x0.mean()).square().mean().sqrt())
    assert max(errors) < 1.05 * spread  # never worse than the mean alone
    assert errors[20] > 0.5 * spread  # what the blur destroyed is not invented


# Folding, conditioning, residual.


def fold(x: Tensor, patch: int) -> Tensor:
    """Channel c, row i, column j of each block become channel (c, i, j), by an explicit loop."""
    b, c, h, w = x.shape
    folded = torch.empty(b, c * patch**2, h // patch, w // patch)
    for channel in range(c):
        for i in range(patch):
            for j in range(patch):
                target = (channel * patch + i) * patch + j
                folded[:, target] = x[:, channel, i::patch, j::patch]
    return folded


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_folded_into_channels_and_back(patch: int, channels: int) -> None:
    spy = Spy(channels * patch**2)
    restorer = Restorer(spy, patch=patch)  # type: ignore[arg-type]
    xt, t = random_images(2, channels, 8, 16, seed=4), torch.tensor([5, 20])
    x0_hat = restorer(xt, t)
    torch.testing.assert_close(spy.seen[0], fold(xt, patch), rtol=0, atol=0)
    torch.testing.assert_close(x0_hat, xt * (1 + t / 100)[:, None, None, None])


@pytest.mark.parametrize("patch", [1, 2])
def test_the_network_sees_the_estimate_first_and_x_t_after_it(patch: int) -> None:
    config = DegradationConfig(T=20)
    estimate = WienerEstimate(cumulative_matrices(config, 16), FLOORS["float32"])
    spy = Spy(3 * patch**2)
    restorer = Restorer(spy, patch=patch, estimate=estimate)  # type: ignore[arg-type]
    xt, t = random_images(2, 3, 16, 16, seed=5), torch.tensor([2, 20])
    x0_hat = restorer(xt, t)
    both = torch.cat((fold(estimate(xt, t), patch), fold(xt, patch)), dim=1)
    assert torch.equal(spy.seen[0], both)
    assert spy.seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x0_hat, estimate(xt, t) * (1 + t / 100)[:, None, None, None])


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("conditioning", ["raw", "wiener"])
def test_residual_adds_the_first_input(patch: int, conditioning: Literal["raw", "wiener"]) -> None:
    model = dataclasses.replace(SMALL.model, patch=patch, conditioning=conditioning)
    plain = build_restorer(dataclasses.replace(SMALL, model=model))
    added = build_restorer(
        dataclasses.replace(SMALL, model=dataclasses.replace(model, residual=True))
    )
    t = torch.tensor([1, 9])
    xt = Blur(SMALL.degradation, 16)(random_images(2, 1, 16, 16), t)
    expected = xt if plain.estimate is None else plain.estimate(xt, t)
    with torch.no_grad():
        difference = added(xt, t) - plain(xt, t)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


# Precision.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_in_and_out(precision: Literal["float32", "bfloat16"], autocast: bool) -> None:
    """Whatever surrounds it: x_t reaches the network, and leaves it, in float32."""
    config = DegradationConfig(T=20)
    estimate = WienerEstimate(cumulative_matrices(config, 16), FLOORS["float32"])
    xt, t = Blur(config, 16).terminal(random_images(2, 1, 16, 16, seed=6)), torch.tensor([20, 20])
    reference = Spy(1)
    Restorer(reference, estimate=estimate)(xt, t)  # type: ignore[arg-type]
    spy = Spy(1, dtype=torch.bfloat16)
    restorer = Restorer(spy, estimate=estimate, precision=precision)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x0_hat = restorer(xt, t)
    assert x0_hat.dtype == spy.seen[0].dtype == torch.float32
    assert torch.equal(spy.seen[0], reference.seen[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_networks_operations(
    precision: Literal["float32", "bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colddiff.restorer.computes_bfloat16", lambda device: True)
    config = dataclasses.replace(SMALL, training=TrainingConfig(precision=precision))
    restorer, exact = build_restorer(config), build_restorer(SMALL)
    inside: list[torch.dtype] = []
    restorer.unet.final.register_forward_hook(lambda _m, _x, out: inside.append(out.dtype))
    xt, t = random_images(2, 1, 16, 16, seed=7), torch.tensor([1, 20])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x0_hat = restorer(xt, t)
    with torch.no_grad():
        expected = exact(xt, t)
    assert inside == [getattr(torch, precision)]
    tolerance = 1e-6 if precision == "float32" else 0.03
    torch.testing.assert_close(x0_hat, expected, rtol=0, atol=tolerance)
    assert (precision == "float32") or not torch.equal(x0_hat, expected)


def test_without_units_for_bfloat16_the_network_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit: converting back and forth would only cost time."""
    monkeypatch.setattr("colddiff.restorer.computes_bfloat16", lambda device: device == "cuda")
    restorer = build_restorer(
        dataclasses.replace(SMALL, training=TrainingConfig(precision="bfloat16"))
    )
    assert (restorer.arithmetic("cpu"), restorer.arithmetic("cuda")) == ("float32", "bfloat16")
    xt, t = random_images(2, 1, 16, 16, seed=7), torch.tensor([1, 20])
    with torch.no_grad():
        assert torch.equal(restorer(xt, t), build_restorer(SMALL)(xt, t))


# Building.


def test_build_restorer_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_restorer(SMALL).state_dict()
    state = torch.get_rng_state()
    second = build_restorer(SMALL).state_dict()
    assert torch.equal(state, torch.get_rng_state())  # nobody else's numbers are used up
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_restorer(dataclasses.replace(SMALL, training=TrainingConfig(seed=1)))
    assert not torch.equal(first["unet.final.weight"], other.unet.final.weight)


def test_only_the_networks_weights_are_saved() -> None:
    model = dataclasses.replace(SMALL.model, conditioning="wiener")
    restorer = build_restorer(dataclasses.replace(SMALL, model=model))
    assert {name.split(".")[0] for name in restorer.state_dict()} == {"unet"}
    assert isinstance(restorer.unet, UNet)


@pytest.mark.parametrize(
    ("discrete", "floor"), [(False, FLOORS["float32"]), (True, DISCRETE_FLOOR)]
)
def test_the_estimates_floor_is_that_of_the_degradation(discrete: bool, floor: float) -> None:
    config = dataclasses.replace(
        SMALL,
        degradation=DegradationConfig(T=5, discrete=discrete),
        model=dataclasses.replace(SMALL.model, conditioning="wiener"),
    )
    built = build_restorer(config).estimate
    assert built is not None
    expected = WienerEstimate(cumulative_matrices(config.degradation, 16), floor)
    torch.testing.assert_close(built.inverse, expected.inverse)
    assert float(built.inverse.max()) <= 1 / (2 * floor) * 1.001


def test_rgb_channels() -> None:
    config = RunConfig(
        data=DataConfig(name="cifar10", image_size=16),
        model=ModelConfig(dim=4, mults=(1, 2), patch=2, conditioning="wiener", residual=True),
    )
    xt, t = random_images(2, 3, 16, 16, seed=8), torch.tensor([1, 20])
    assert build_restorer(config)(xt, t).shape == xt.shape
