"""The forward processes against plain convolutions, SciPy and the paper's own rules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from plain_blur import PADDINGS, PAPER, random_images, sequence, taps_by_hand
from torch.utils._python_dispatch import TorchDispatchMode

from colddiff.config import DegradationConfig
from colddiff.degradation import (
    Blur,
    Discrete,
    Noise,
    blur_matrix,
    build_degradation,
    cumulative_matrices,
    gaussian_taps,
    stored,
    taps_of_step,
)
from colddiff.diffusion import Step, sample_algorithm2

needs_paper_schedule = pytest.mark.parametrize("name", PAPER)


@needs_paper_schedule
def test_kernels_are_the_papers(name: str) -> None:
    config, kernels = PAPER[name]
    assert len(kernels) == config.T
    assert config.padding == PADDINGS.get(name, "circular")
    for i, (size, sigma) in enumerate(kernels):
        expected = taps_by_hand(size, sigma)
        torch.testing.assert_close(taps_of_step(config, i), expected, rtol=0, atol=1e-15)


@needs_paper_schedule
def test_agrees_with_the_sequence_of_convolutions_at_mixed_levels(name: str) -> None:
    config = PAPER[name][0]
    x0 = random_images(4, 1, 13, 14, seed=1)
    t = torch.tensor([0, 3, config.T, config.T // 2])
    xt = Blur(config, 13, 14)(x0, t)
    assert xt.dtype == torch.float32
    exact = sequence(name, x0.double())[t, torch.arange(4)]
    torch.testing.assert_close(xt.double(), exact, rtol=0, atol=1e-6)
    # In float32 the sequence itself drifts: its rounded taps do not quite sum to one.
    picked = sequence(name, x0)[t, torch.arange(4)]
    torch.testing.assert_close(xt, picked, rtol=0, atol=1e-6 if config.T <= 200 else 3e-6)
    assert torch.equal(xt[0], x0[0])


class Made(TorchDispatchMode):
    """Bytes of all storage that operations make, which is no less than what they need at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, or an address would come again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storage = out.untyped_storage()
        self.storages[storage.data_ptr()] = storage
        return out

    def bytes_besides(self, *given: torch.Tensor) -> int:
        for each in given:
            self.storages.pop(each.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_grows_with_the_batch_and_not_with_T(channels: int) -> None:
    made = {}
    for T, batch in ((20, 8), (200, 8), (20, 32)):
        blur = Blur(DegradationConfig(T=T, kernel_size=11, sigma=7.0), 32)
        x0, t = random_images(batch, channels, 32, 32, seed=1), torch.linspace(1, T, batch).long()
        with Made() as mode:
            blur(x0, t)
        made[T, batch] = mode.bytes_besides(x0, t, blur.rows, blur.columns)
    assert made[20, 8] == made[200, 8]
    assert made[20, 32] == 4 * made[20, 8]
    image = channels * 32 * 32 * 4
    # The batch itself twice, its two matrices an image, and one of them for each channel.
    assert 3 * image <= made[20, 8] / 8 <= 5 * image


@needs_paper_schedule
def test_float64_matrices_are_exact_at_every_level(name: str) -> None:
    config = PAPER[name][0]
    x0 = random_images(1, 1, 14, 18, seed=2).double()
    rows, columns = cumulative_matrices(config, 14), cumulative_matrices(config, 18)
    closed = rows[:, None, None] @ x0 @ columns[:, None, None].mT
    torch.testing.assert_close(closed, sequence(name, x0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "size"), [("mnist", 32), ("cifar10", 32), ("celeba", 128)])
def test_agrees_at_full_size_over_all_levels(name: str, size: int) -> None:
    config = PAPER[name][0]
    x0 = random_images(1, 1, size, size, seed=3)
    blur, states = Blur(config, size), sequence(name, x0.double())
    for t in range(config.T + 1):
        xt = blur(x0, torch.tensor([t])).double()
        torch.testing.assert_close(xt, states[t], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("padding", "mode"), [("circular", "wrap"), ("reflect", "mirror")])
@pytest.mark.parametrize("taps", [1, 3, 11, 27])
def test_matrix_is_scipys_correlation(padding: str, mode: str, taps: int) -> None:
    kernel = gaussian_taps(taps, 3.0)
    x = np.random.default_rng(taps).standard_normal(16)
    expected = scipy.ndimage.correlate1d(x, kernel.numpy(), mode=mode)
    ours = blur_matrix(16, kernel, padding) @ torch.from_numpy(x)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "celeba-generation"])
def test_agrees_with_scipy(name: str) -> None:
    config, kernels = PAPER[name]
    x0 = random_images(1, 1, 16, 24, seed=4)
    expected = x0[0, 0].double().numpy()
    mode = "mirror" if config.padding == "reflect" else "wrap"
    for size, sigma in kernels:
        taps = taps_by_hand(size, sigma).numpy()
        for axis in (0, 1):
            expected = scipy.ndimage.correlate1d(expected, taps, axis=axis, mode=mode)
    xT = Blur(config, 16, 24).terminal(x0)[0, 0]
    np.testing.assert_allclose(xT.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("taps", "size"), [(27, 16), (27, 8), (11, 3)])
def test_circular_kernels_may_be_wider_than_the_image(taps: int, size: int) -> None:
    config = DegradationConfig(T=1, kernel_size=taps, sigma=4.0)
    x0 = random_images(2, 1, size, size, seed=5)
    tiles = 2 * math.ceil(taps / size) + 1
    tiled = x0.double().repeat(1, 1, tiles, tiles)
    half, start = taps // 2, tiles // 2 * size
    window = slice(start - half, start + size + half)
    weights = taps_by_hand(taps, 4.0)
    kernel = weights[:, None] * weights
    expected = F.conv2d(tiled[..., window, window], kernel[None, None])
    ours = Blur(config, size).terminal(x0)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


def test_reflect_is_refused_where_torch_refuses_it() -> None:
    widest, too_wide = 2 * 8 - 1, 2 * 8 + 1
    blur_matrix(8, gaussian_taps(widest, 2.0), "reflect")
    F.pad(torch.zeros(1, 1, 8), (widest // 2,) * 2, mode="reflect")
    with pytest.raises(RuntimeError):
        F.pad(torch.zeros(1, 1, 8), (too_wide // 2,) * 2, mode="reflect")
    with pytest.raises(ValueError, match=r"at most 15 taps for 8 pixels, got 17"):
        blur_matrix(8, gaussian_taps(too_wide, 2.0), "reflect")
    with pytest.raises(ValueError, match="reflect"):
        Blur(DegradationConfig(kernel_size=too_wide, padding="reflect"), 16, 8)


def test_blur_conserves_the_mean_and_constants() -> None:
    circular, reflect = Blur(PAPER["mnist"][0], 32), Blur(PAPER["cifar10"][0], 32)
    x0, t = random_images(4, 1, 32, 32, seed=6), torch.tensor([1, 5, 10, 20])
    means = x0.mean(dim=(-2, -1))
    torch.testing.assert_close(circular(x0, t).mean(dim=(-2, -1)), means, rtol=0, atol=1e-6)
    grey = torch.full((4, 1, 32, 32), 0.4)
    torch.testing.assert_close(circular(grey, t), grey, rtol=0, atol=1e-6)
    torch.testing.assert_close(reflect(grey, t), grey, rtol=0, atol=1e-6)


def test_float32_inside_bfloat16_autocast() -> None:
    blur, x0 = Blur(PAPER["mnist"][0], 32), random_images(4, 1, 32, 32, seed=7)
    t = torch.tensor([1, 8, 19, 20])
    plain = blur(x0, t)
    with torch.autocast("cpu", torch.bfloat16):
        inside = blur(x0, t)
        terminal = blur.terminal(x0)
    assert inside.dtype == terminal.dtype == torch.float32
    assert torch.equal(inside, plain)
    # An image that arrives as bfloat16, as a network's output may, is blurred in float32.
    low = x0.bfloat16()
    assert torch.equal(blur(low, t), blur(low.float(), t))


def test_terminal_is_level_T() -> None:
    for name in ("mnist", "celeba"):
        blur, x0 = Blur(PAPER[name][0], 16), random_images(3, 1, 16, 16, seed=8)
        torch.testing.assert_close(blur.terminal(x0), blur(x0, torch.full((3,), blur.T)))


# "Discrete": in training rounded down to 8 bits, the last level the image's mean.


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_discrete_follows_the_authors_rules_in_training(name: str) -> None:
    config = PAPER[name][0]
    x0 = random_images(6, 3, 16, 20, seed=10)
    t = torch.tensor([1, 2, 5, config.T - 1, config.T, config.T])
    exact = sequence(name, x0.double())
    exact[-1] = exact[-1].mean(dim=(-2, -1), keepdim=True)
    levels = (exact[t, torch.arange(6)] + 1) / 2 * 255
    xt = Discrete(Blur(config, 16, 20))(x0, t)
    ours = (xt.double() + 1) / 2 * 255
    torch.testing.assert_close(ours, ours.round(), rtol=0, atol=1e-4)
    # float32 may fall on the other side of an integer only where the exact value is one, nearly.
    clear = (levels - levels.round()).abs() > 1e-3
    assert clear.double().mean() > 0.99
    assert torch.equal(ours.round()[clear], levels.floor()[clear])
    assert bool(((ours.round() - levels.floor()).abs() <= 1).all())
    assert torch.equal(xt[4:].amin(dim=(-2, -1)), xt[4:].amax(dim=(-2, -1)))


def test_discrete_level_0_is_the_image_itself() -> None:
    grey = (torch.arange(256.0) / 127.5 - 1).view(1, 1, 16, 16)
    discrete = Discrete(Blur(PAPER["mnist"][0], 16))
    assert torch.equal(discrete(grey, torch.tensor([0])), grey)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_discrete_sampling_starts_from_the_exact_mean(name: str) -> None:
    discrete = Discrete(Blur(PAPER[name][0], 16))
    x0 = random_images(5, 3, 16, 16, seed=11)
    means = sequence(name, x0.double())[-1].mean(dim=(-2, -1), keepdim=True)
    start = discrete.terminal(x0)
    assert start.shape == x0.shape
    torch.testing.assert_close(start.double(), means.expand_as(x0), rtol=0, atol=1e-6)
    grey_levels = (start.double() + 1) * 127.5
    assert float((grey_levels - grey_levels.round()).abs().max()) > 0.05  # not rounded
    t = torch.tensor([discrete.T, 3, 0, discrete.T, 1])
    unrounded = discrete.unrounded(x0, t)
    torch.testing.assert_close(unrounded[[0, 3]], start[[0, 3]])
    torch.testing.assert_close(unrounded[[1, 2, 4]], discrete.blur(x0, t)[[1, 2, 4]])


# Hot diffusion.


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("T", [20, 200, 1000])
def test_noise_preserves_variance_and_ends_in_noise(schedule: str, T: int) -> None:
    noise = Noise(DegradationConfig(kind="noise", T=T, noise_schedule=schedule))  # type: ignore[arg-type]
    t, one = torch.arange(T + 1), torch.ones(T + 1, 1, 1, 1)
    signal = noise(one, t, torch.zeros_like(one)).flatten()
    sigma = noise(torch.zeros_like(one), t, one).flatten()
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(T + 1), rtol=0, atol=1e-6)
    assert signal[0] == 1 and sigma[0] == 0
    assert bool((signal.diff() < 0).all()) and bool((sigma.diff() >= 0).all())
    assert signal[-1] ** 2 < 1e-3


def test_noise_schedules_are_the_published_ones() -> None:
    ddpm = Noise(DegradationConfig(kind="noise", T=1000, noise_schedule="linear"))
    betas = np.linspace(1e-4, 0.02, 1000)
    expected = np.concatenate(([1.0], np.cumprod(1 - betas)))
    np.testing.assert_allclose(ddpm.signal_power.numpy(), expected, rtol=1e-5)
    assert float(ddpm.signal_power[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    cosine = Noise(DegradationConfig(kind="noise", T=100, noise_schedule="cosine"))
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    np.testing.assert_allclose(cosine.signal_power[:100].numpy(), np.array(f) / f[0], rtol=1e-5)


def test_held_noise_is_one_z_for_every_level() -> None:
    noise = Noise(DegradationConfig(kind="noise", T=30))
    x0, z = (
        random_images(4, 1, 8, 8, seed=12),
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(13)),
    )
    held = noise.hold(z)
    assert held.T == 30
    assert torch.equal(held(x0, torch.zeros(4, dtype=torch.int64)), x0)
    t = torch.tensor([1, 10, 29, 30])
    xt = held(x0, t)
    assert torch.equal(xt, held(x0, t))
    power = noise.signal_power[t].view(-1, 1, 1, 1)
    torch.testing.assert_close((xt - power.sqrt() * x0) / (1 - power).sqrt(), z, rtol=0, atol=1e-5)
    assert torch.equal(held.terminal(x0)[3], xt[3])


def test_build_degradation() -> None:
    kinds = {
        Blur: DegradationConfig(),
        Discrete: DegradationConfig(discrete=True),
        Noise: DegradationConfig(kind="noise"),
    }
    for kind, config in kinds.items():
        built = build_degradation(config, 16)
        assert type(built) is kind and built.T == 20
        assert not built.state_dict()  # computed, never saved


# Other number formats.


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "uint16", "uint8"])
def test_stored_states_are_rounded_to_nearest(storage: Any) -> None:
    """Against every value the format has in [-1, 1], or numpy's own conversion."""
    config = DegradationConfig(T=3, storage=storage)
    degradation, x0 = build_degradation(config, 16), random_images(3, 1, 16, 16, seed=31)
    exact = Blur(DegradationConfig(T=3), 16)
    xt = degradation(x0, torch.tensor([0, 1, 3]))
    unrounded = exact(x0, torch.tensor([0, 1, 3]))
    assert torch.equal(xt[0], x0[0])
    if storage == "float16":
        values = unrounded.numpy().astype(np.float16).astype(np.float32)
    elif storage == "bfloat16":
        # The upper half of a float32, rounded to nearest even.
        bits = unrounded.contiguous().numpy().view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        values = rounded.astype(np.uint32).view(np.float32)
    else:
        grid = np.linspace(-1, 1, 2 ** (16 if storage == "uint16" else 8))
        index = np.rint((unrounded.double().numpy() + 1) / (grid[1] - grid[0])).astype(int)
        values = grid[index].astype(np.float32)
    np.testing.assert_allclose(xt[1:].numpy(), values[1:], atol=2e-7)
    np.testing.assert_allclose(degradation.terminal(x0[2:]).numpy(), values[2:], atol=2e-7)
    # Samplers start from what was stored and do not round after that.
    steps: list[Step] = []
    sample_algorithm2(lambda x, t: x0, degradation, degradation.terminal(x0), None, steps.append)
    assert torch.equal(steps[0].xt, degradation.terminal(x0))
    assert not torch.equal(stored(steps[1].xt, storage), steps[1].xt)
