"""Schedules of equal strength, against plain convolutions of the digits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from tiny import changed, replaced, tiny

from colddiff.batches import to_batch
from colddiff.config import DataConfig, DegradationConfig, RunConfig
from colddiff.data import load_images
from colddiff.degradation import cumulative_matrices, taps_of_step
from colddiff.presets import preset
from sweeps.terminal import (
    Outline,
    Padding,
    equalised,
    individual_steps,
    linear_rmse,
    require_equal_terminal,
    terminal_residual,
    widest_kernel,
)


def plain_residual(blur: DegradationConfig, data: DataConfig) -> float:
    """RMS around each image's mean after T convolutions, by SciPy."""
    pixels = load_images(data, "train").take(torch.arange(256))
    x = (to_batch(pixels, data).double().numpy() + 1) / 2
    mode = {"circular": "wrap", "reflect": "mirror"}[blur.padding]
    for i in range(blur.T - 1 if blur.schedule == "individual" else 0, blur.T):
        for axis in (-2, -1):
            x = scipy.ndimage.correlate1d(x, taps_of_step(blur, i).numpy(), axis=axis, mode=mode)
    return float(np.sqrt(np.mean((x - x.mean(axis=(-2, -1), keepdims=True)) ** 2)))


def test_the_residual_of_the_papers_schedule() -> None:
    """0.0036 of the range on MNIST, as docs/decisions.md has it."""
    config = preset("demo")
    residual = terminal_residual(config.degradation, config.data)
    assert residual == pytest.approx(plain_residual(config.degradation, config.data), rel=1e-9)
    assert residual == pytest.approx(0.0036, abs=0.0001)


@pytest.mark.parametrize("T", [3, 6])
def test_the_linear_estimate_is_ridge_regression(T: int) -> None:
    """On the whole images' 256 x 256 system, whose penalty is the floor squared."""
    config = changed(tiny(), {"degradation": {"T": T, "sigma": 2.0, "kernel_size": 5}})
    blur, data = config.degradation, config.data
    pixels = load_images(data, "train").take(torch.arange(256))
    x0 = to_batch(pixels, data).numpy().astype(np.float64).reshape(256, -1)
    step = np.eye(data.image_size**2).reshape(-1, data.image_size, data.image_size)
    for i in range(T):
        for axis in (-2, -1):
            taps = taps_of_step(blur, i).numpy()
            step = scipy.ndimage.correlate1d(step, taps, axis=axis, mode="wrap")
    system = step.reshape(data.image_size**2, -1).T
    mean = x0.mean(axis=1, keepdims=True)
    xT = (system @ (x0 - mean).T).astype(np.float32).astype(np.float64)
    penalised = system.T @ system + 1e-12 * np.eye(len(system))
    found = np.linalg.solve(penalised, system.T @ xT).T + mean
    errors = (np.clip(found, -1, 1) - x0) / 2
    assert linear_rmse(blur, data) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-2)


def test_what_is_blurred_to_its_mean_tells_its_mean() -> None:
    config = changed(tiny(), {"degradation": {"discrete": True}})
    pixels = load_images(config.data, "train").take(torch.arange(256))
    x0 = (to_batch(pixels, config.data) + 1) / 2
    spread = float((x0 - x0.mean(dim=(-2, -1), keepdim=True)).square().mean().sqrt())
    strong = changed(config, {"degradation": {"T": 40, "sigma": 7.0, "kernel_size": 11}})
    assert linear_rmse(strong.degradation, config.data) == pytest.approx(spread, rel=2e-3)


def test_noise_has_no_residual() -> None:
    with pytest.raises(ValueError, match=r"degradation.kind = 'noise' leaves no residual"):
        terminal_residual(DegradationConfig(kind="noise"), tiny().data)


OUTLINES = [
    Outline("shape", 6, 7, "circular", 0.5),
    Outline("shape", 5, 3, "reflect", 3.0),
    Outline("shape", 30, 3, "reflect", 1.0),
    Outline("constant", 12, 5, "circular"),
    Outline("linear", 6, 9, "circular", 6.0),
    Outline("exponential", 8, 5, "reflect", 10.0),
    Outline("linear", 40, 15, "circular", 16.0),
    Outline("incremental", 5, 9, "circular"),
    Outline("incremental", 40, 15, "reflect"),
]


@pytest.mark.parametrize("asked", OUTLINES, ids=str)
def test_schedules_are_as_strong_as_the_base(asked: Outline) -> None:
    base = tiny()
    blur, used = equalised(asked, base)
    target = plain_residual(base.degradation, base.data)
    assert plain_residual(blur, base.data) == pytest.approx(target, rel=1e-3)
    assert (blur.schedule, blur.padding) == (asked.schedule, asked.padding)
    assert (blur.T, blur.kernel_size) == (used.T, used.kernel_size)
    config = dataclasses.replace(base, degradation=blur)
    require_equal_terminal(config, base)
    assert RunConfig.from_json(config.to_json()) == config


def test_slopes_are_kept() -> None:
    shape, _ = equalised(OUTLINES[0], tiny())
    assert shape.exponent == 0.5
    linear, _ = equalised(OUTLINES[4], tiny())
    assert (linear.sigma + 5 * linear.growth) / linear.sigma == pytest.approx(6, rel=1e-4)
    exponential, _ = equalised(OUTLINES[5], tiny())
    assert math.exp(7 * exponential.growth) == pytest.approx(10, rel=1e-4)


def test_the_papers_schedule_comes_out_of_both_families() -> None:
    base = preset("demo")
    papers = cumulative_matrices(base.degradation, 32)
    for family in ("shape", "constant"):
        blur, _ = equalised(Outline(family, 20, 11, "circular"), base)  # type: ignore[arg-type]
        assert blur.schedule == family
        torch.testing.assert_close(cumulative_matrices(blur, 32), papers, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("padding", "size"), [("circular", 32), ("circular", 15), ("reflect", 16)])
def test_kernels_are_no_wider_than_the_longest_wave(padding: Padding, size: int) -> None:
    """The gain of flat kernels for the longest wave: falling and positive up to the widest."""
    turn = 2 * math.pi / size if padding == "circular" else math.pi / (size - 1)

    def gain(kernel: int) -> float:
        return float(np.mean([math.cos(turn * (j - kernel // 2)) for j in range(kernel)]))

    widest = widest_kernel(padding, size)
    gains = [gain(kernel) for kernel in range(1, widest + 1, 2)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 1e-9
    assert gain(widest + 2) < 1e-9


def test_a_kernel_is_widened_no_further_than_it_must() -> None:
    base = tiny()
    target = plain_residual(base.degradation, base.data)
    blur, used = equalised(Outline("constant", 3, 3, "circular"), base)
    assert used.kernel_size > 3
    flat = {"schedule": "constant", "T": 3, "sigma": 1e4}
    narrower, this = (
        dataclasses.replace(blur, **flat, kernel_size=size)  # type: ignore[arg-type]
        for size in (used.kernel_size - 2, used.kernel_size)
    )
    assert plain_residual(narrower, base.data) > target >= plain_residual(this, base.data)
    assert equalised(Outline("constant", 30, 5, "circular"), base)[1].kernel_size == 5


def test_steps_become_more_even_and_then_more() -> None:
    """Where 13 taps, the widest of 14 pixels, are not enough in the steps that were asked for."""
    base = changed(tiny(), {"data": {"image_size": 14}, "degradation": {"kernel_size": 9}})
    base = replaced(base, "degradation", sigma=9.0, T=6)
    uneven, used = equalised(Outline("shape", 3, 3, "circular", 4.0), base)
    assert (used.kernel_size, used.T) == (13, 3)
    assert 1 <= used.slope < 4
    assert uneven.exponent == used.slope
    few, used = equalised(Outline("shape", 1, 3, "circular", 4.0), base)
    assert (used.kernel_size, used.slope) == (13, 1.0)
    assert few.T == used.T > 1
    for blur in (uneven, few):
        target = plain_residual(base.degradation, base.data)
        assert plain_residual(blur, base.data) == pytest.approx(target, rel=1e-3)


def test_kernels_wider_than_the_image_are_narrowed() -> None:
    _, used = equalised(Outline("shape", 4, 31, "circular"), tiny())
    assert used.kernel_size == 15


def test_individual_is_the_first_that_is_not_weaker() -> None:
    base = tiny()
    target = plain_residual(base.degradation, base.data)
    T = individual_steps(base)
    assert T is not None

    def left(T: int) -> float:
        return plain_residual(DegradationConfig(schedule="individual", T=T), base.data)

    assert left(T) <= target < min(left(t) for t in range(1, T))


def test_individual_may_never_be_strong_enough() -> None:
    base = replaced(tiny(), "degradation", T=60, padding="reflect")
    assert individual_steps(base) is None


WEAKER: list[dict[str, Any]] = [
    {"T": 3},
    {"sigma": 1.7},
    {"kernel_size": 3},
    {"padding": "reflect"},
    {"schedule": "shape", "total_variance": 5.0},
]


@pytest.mark.parametrize("change", WEAKER, ids=str)
def test_a_weaker_blur_is_refused(change: dict[str, Any]) -> None:
    base = tiny()
    config = replaced(base, "degradation", **change)
    assert plain_residual(config.degradation, base.data) > 1.01 * plain_residual(
        base.degradation, base.data
    )
    with pytest.raises(ValueError, match="blurring less is no way to restore better"):
        require_equal_terminal(config, base)


def test_as_strong_and_stronger_are_allowed() -> None:
    base = tiny()
    for change in ({}, {"T": 5}, {"sigma": 2.2}, {"sigma": 1.9999}):
        require_equal_terminal(replaced(base, "degradation", **change), base)


def test_a_base_that_does_not_blur() -> None:
    base = replaced(tiny(), "degradation", kernel_size=1)
    for family in ("shape", "linear"):
        blur, _ = equalised(Outline(family, 4, 5, "circular", 2.0), base)  # type: ignore[arg-type]
        target = plain_residual(base.degradation, base.data)
        assert plain_residual(blur, base.data) == pytest.approx(target, rel=1e-3)


def test_a_base_that_leaves_nothing_is_refused() -> None:
    base = replaced(tiny(), "degradation", T=400)
    with pytest.raises(ValueError, match=r"leaves an RMS of .* nothing in double precision"):
        equalised(OUTLINES[0], base)
