"""The U-Net against a plain implementation of the authors', through their parameter names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from reference_unet import ReferenceUNet, attention
from torch import Tensor

from colddiff.depthwise import Depthwise
from colddiff.unet import LinearAttention, UNet, load_reference_state_dict, reference_names
from colddiff.unet_parts import step_embedding

DIM, MULTS = 8, (1, 2, 3)


def reference(
    channels: int = 1,
    mults: Sequence[int] = MULTS,
    *,
    seed: int = 0,
    with_time: bool = True,
    residual: bool = False,
) -> ReferenceUNet:
    """Random weights, norms included, larger than at initialisation so that every part counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ReferenceUNet(DIM, mults, channels, with_time=with_time, residual=residual)
        with torch.no_grad():
            for name, value in net.named_parameters():
                scale = 0.3 if name.endswith((".g", ".b", ".bias")) else 0.3 * float(value.std())
                value.add_(scale * torch.randn_like(value))
    return net.eval()


def inputs(
    channels: int = 1, height: int = 16, width: int = 16, T: int = 40
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels + height + width)
    x = 2 * torch.rand(4, channels, height, width, generator=generator) - 1
    return x, torch.tensor([1, 2, T // 2, T])


@torch.no_grad()
def assert_same_function(ours: UNet, theirs: ReferenceUNet, x: Tensor, t: Tensor) -> None:
    expected = theirs(x, t - 1)
    assert float(expected.std()) > 0.02  # a function of something
    torch.testing.assert_close(ours(x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "parameters"), [(1, 56_612_916), (3, 56_615_708)])
def test_full_size_has_the_authors_parameters(channels: int, parameters: int) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(64, (1, 2, 4, 8), channels), ReferenceUNet(64, channels=channels)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    names, state = reference_names(ours), theirs.state_dict()
    assert set(names.values()) == set(state) and len(names) == len(state)
    assert {"downs.0.0.ds_conv.weight", "time_mlp.1.weight", "final_conv.1.bias"} <= set(state)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_computes_the_authors_function(channels: int, residual: bool) -> None:
    theirs = reference(channels, residual=residual)
    ours = UNet(DIM, MULTS, channels, residual=residual)
    load_reference_state_dict(ours, theirs.state_dict())
    assert_same_function(ours, theirs, *inputs(channels))


def test_computes_the_authors_function_on_wide_images_and_late_steps() -> None:
    theirs, ours = reference(2), UNet(DIM, MULTS, 2)
    load_reference_state_dict(ours, theirs.state_dict())
    assert_same_function(ours, theirs, *inputs(2, height=8, width=20, T=300))


@pytest.mark.parametrize("mults", [(1,), (1, 2), (1, 1, 1, 1)])
def test_computes_the_authors_function_at_other_depths(mults: tuple[int, ...]) -> None:
    theirs, ours = reference(mults=mults), UNet(DIM, mults)
    load_reference_state_dict(ours, theirs.state_dict())
    assert_same_function(ours, theirs, *inputs())


@pytest.mark.parametrize("mults", [(2,), (2, 1), (3, 4)])
def test_the_first_resolution_may_be_wider_than_dim(mults: tuple[int, ...]) -> None:
    x, t = inputs()
    assert UNet(DIM, mults)(x, t).shape == x.shape


def test_without_time_embedding() -> None:
    theirs, ours = reference(with_time=False), UNet(DIM, MULTS, time_embedding=False)
    load_reference_state_dict(ours, theirs.state_dict())
    x, t = inputs()
    assert_same_function(ours, theirs, x, t)
    assert torch.equal(ours(x, t), ours(x, t.flip(0)))


def test_level_matters_per_image() -> None:
    ours, (x, t) = UNet(DIM, MULTS), inputs()
    load_reference_state_dict(ours, reference().state_dict())
    x = x[:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        together = ours(x, t)
        for i in range(4):
            torch.testing.assert_close(together[i : i + 1], ours(x[:1], t[i : i + 1]))
            assert i == 0 or float((together[i] - together[0]).abs().max()) > 1e-3


# Reading the authors' checkpoints.

PREFIXES = ["", "module.", "denoise_fn.", "module.denoise_fn.", "denoise_fn.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_prefixes_and_whole_checkpoints(prefix: str, weights: str) -> None:
    nets = {"model": reference(seed=1), "ema": reference(seed=2)}
    checkpoint: dict[str, object] = {"step": 700_000}
    for entry, net in nets.items():
        state = OrderedDict((prefix + name, value) for name, value in net.state_dict().items())
        outer = prefix.split("denoise_fn.")[0] if "denoise_fn." in prefix else ""
        for i in range(3):
            state[f"{outer}gaussian_kernels.{i}.weight"] = torch.ones(1, 1, 11, 11)
        checkpoint[entry] = state
    ours = UNet(DIM, MULTS)
    load_reference_state_dict(ours, checkpoint, weights)  # type: ignore[arg-type]
    assert_same_function(ours, nets[weights], *inputs())
    bare = UNet(DIM, MULTS)
    load_reference_state_dict(bare, checkpoint[weights])  # type: ignore[arg-type]
    for a, b in zip(ours.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loaded_weights_are_copies() -> None:
    state, ours = reference().state_dict(), UNet(DIM, MULTS)
    load_reference_state_dict(ours, state)
    x, t = inputs()
    before = ours(x, t)
    for value in state.values():
        value.zero_()
    assert torch.equal(ours(x, t), before)


def assert_refused(state: dict[str, Tensor], *names: str) -> None:
    ours = UNet(DIM, MULTS)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_reference_state_dict(ours, state)
    for name in names:
        assert name in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_missing_and_unknown_names_are_refused() -> None:
    state = dict(reference().state_dict())
    for name in ("mid_attn.fn.norm.g", "ups.1.3.bias"):
        assert_refused({n: value for n, value in state.items() if n != name}, name)
    assert_refused(state | {"downs.0.9.weight": torch.zeros(1)}, "downs.0.9.weight")
    assert_refused({}, "time_mlp.1.weight", "final_conv.1.bias")
    deeper = dict(reference(mults=(1, 2, 3, 3)).state_dict())
    assert_refused(deeper, "downs.3.0.ds_conv.weight")


@pytest.mark.parametrize(
    "name",
    [
        "time_mlp.1.weight",  # 32 x 8
        "downs.1.0.net.1.weight",
        "downs.2.2.fn.fn.to_qkv.weight",
        "mid_block1.mlp.1.weight",
        "mid_block1.net.3.weight",
        "final_conv.0.net.1.weight",
    ],
)
def test_transposed_weights_are_refused(name: str) -> None:
    state = dict(reference().state_dict())
    transposed = state[name].transpose(0, 1).contiguous()
    assert transposed.numel() == state[name].numel() and transposed.shape != state[name].shape
    assert_refused(state | {name: transposed}, name)


def test_other_shapes_are_refused() -> None:
    state = dict(reference().state_dict())
    norm = "downs.1.2.fn.norm.g"
    assert_refused(state | {norm: state[norm].view(1, 1, 1, -1)}, norm, "(1, 16, 1, 1)")
    bias = "downs.0.0.ds_conv.bias"
    assert_refused(state | {bias: torch.zeros(7)}, bias, "(7,)")
    assert_refused(dict(reference(channels=3).state_dict()), "downs.0.0.ds_conv.weight")


# The network itself.


def test_gradients_reach_every_parameter() -> None:
    ours, (x, t) = UNet(DIM, MULTS), inputs()
    load_reference_state_dict(ours, reference().state_dict())
    ours(x, t).square().mean().backward()
    dead = [n for n, p in ours.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []


def test_channels_last_gives_the_same() -> None:
    ours, (x, t) = UNet(DIM, MULTS, 3), inputs(3)
    load_reference_state_dict(ours, reference(3).state_dict())
    with torch.no_grad():
        plain = ours(x, t)
        last = ours.to(memory_format=torch.channels_last)
        result = last(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)


def test_further_input_channels_and_residual_to_the_first() -> None:
    plain = UNet(DIM, MULTS, 5, out_channels=2)
    added = UNet(DIM, MULTS, 5, out_channels=2, residual=True)
    added.load_state_dict(plain.state_dict())
    x, t = inputs(5)
    with torch.no_grad():
        assert plain(x, t).shape == (4, 2, 16, 16)
        torch.testing.assert_close(added(x, t) - plain(x, t), x[:, :2])


@pytest.mark.parametrize("size", [(16, 18), (10, 16), (7, 7)])
def test_wrong_sizes_are_refused(size: tuple[int, int]) -> None:
    x, t = torch.zeros(1, 1, *size), torch.tensor([1])
    with pytest.raises(ValueError, match=rf"multiples of 4, got \(1, 1, {size[0]}, {size[1]}\)"):
        UNet(DIM, MULTS)(x, t)


def test_bad_arguments_are_refused() -> None:
    for dim in (7, 2, 0, -8):
        with pytest.raises(ValueError, match=rf"dim must be .*got {dim}"):
            UNet(dim)
    for mults in ((), (1, 0)):
        with pytest.raises(ValueError, match="mults"):
            UNet(8, mults)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        UNet(8, channels=0)


def test_step_embedding() -> None:
    embedded = step_embedding(torch.tensor([0, 1, 19]), 6)
    for row, step in zip(embedded.tolist(), (0, 1, 19), strict=True):
        angles = [step, step / 100, step / 10_000]
        expected = [f(a) for f in (math.sin, math.cos) for a in angles]
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("dim", "size", "folded"), [(8, 16, True), (32, 3, False), (64, 8, True), (256, 8, False)]
)
def test_linear_attention_either_way_is_the_authors(dim: int, size: int, folded: bool) -> None:
    """In value and gradients, whether or not the weights are multiplied first."""
    own, theirs = LinearAttention(dim), attention(dim)
    generator = torch.Generator().manual_seed(3)
    names = ("norm.weight", "norm.bias", "qkv.weight", "out.weight", "out.bias")
    pairs = list(zip((own.get_parameter(name) for name in names), theirs.parameters(), strict=True))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(torch.randn(other.shape, generator=generator) / other[0].numel() ** 0.5)
            mine.copy_(other.view_as(mine))
    x, upstream = torch.randn(2, 2, dim, size, size + 1, generator=generator)
    way = "_folded" if folded else "_direct"
    with patch.object(own, way, wraps=getattr(own, way)) as spy:
        results = [layer(x) for layer in (own, theirs)]
    assert spy.call_count == 1
    for out in results:
        out.backward(upstream)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    for mine, other in pairs:
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (8, 8), (4, 16), (9, 8), (16, 16)])
def test_depthwise_convolutions_are_those_of_the_library(
    height: int, width: int, dtype: torch.dtype
) -> None:
    """Small images go through matrix products, larger ones through float32."""
    layer = Depthwise(6, 7)
    x, upstream = (
        torch.randn(3, 6, height, width, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )

    def gradients(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        layer.zero_grad()
        given = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        out = call(given)
        assert out.dtype == dtype and out.shape == x.shape
        out.backward(upstream.to(dtype))
        return [out.detach(), given.grad, layer.weight.grad, layer.bias.grad]  # type: ignore[list-item]

    def library(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=3, groups=6)

    expected = gradients(library, x.dtype)
    found = gradients(layer, dtype)
    for one, other in zip(found, expected, strict=True):
        limit = 2e-6 if dtype == torch.float32 else 0.02
        assert float((one.float() - other).abs().max()) <= limit * float(other.abs().max())
