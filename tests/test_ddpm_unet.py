"""The DDPM U-Net against a plain computation of its formulas from named weights."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from colddiff.ddpm_unet import DDPMUNet, ResidualBlock, load_reference_state_dict
from colddiff.degradation import Blur
from colddiff.restorer import build_restorer

Weights = Mapping[str, Tensor]
DIM, MULTS = 32, (1, 2)


# The oracle: which modules there are is read off the names, what they do is written out.


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def embedding(step: Tensor, dim: int) -> Tensor:
    rows = []
    for s in step.tolist():
        angles = [s * 10_000 ** (-k / (dim // 2 - 1)) for k in range(dim // 2)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows)


def convolved(w: Weights, name: str, x: Tensor, **how: Any) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normed(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def block(w: Weights, name: str, x: Tensor, temb: Tensor) -> Tensor:
    h = convolved(w, f"{name}.conv1", swish(normed(w, f"{name}.norm1", x)), padding=1)
    h = h + linear(w, f"{name}.temb_proj", swish(temb))[:, :, None, None]
    h = convolved(w, f"{name}.conv2", swish(normed(w, f"{name}.norm2", h)), padding=1)
    if f"{name}.nin_shortcut.weight" in w:
        x = convolved(w, f"{name}.nin_shortcut", x)
    return x + h


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    h = normed(w, f"{name}.norm", x)
    q, k, v = (convolved(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])
    share = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
    attended = torch.einsum("bij,bcj->bci", share, v).reshape(x.shape)
    return x + convolved(w, f"{name}.proj_out", attended)


def oracle(w: Weights, x: Tensor, step: Tensor) -> Tensor:
    """The network of the weights ``w`` at 0-based steps."""
    levels = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("down."))
    dim = w["conv_in.weight"].shape[0]
    temb = linear(w, "temb.dense.0", embedding(step, dim))
    temb = linear(w, "temb.dense.1", swish(temb))
    hs = [convolved(w, "conv_in", x, padding=1)]
    for i in range(levels):
        for j in range(2):
            h = block(w, f"down.{i}.block.{j}", hs[-1], temb)
            if f"down.{i}.attn.{j}.q.weight" in w:
                h = attention(w, f"down.{i}.attn.{j}", h)
            hs.append(h)
        if i < levels - 1:
            b, c, height, width = hs[-1].shape
            padded = torch.zeros(b, c, height + 1, width + 1)
            padded[:, :, :-1, :-1] = hs[-1]
            hs.append(convolved(w, f"down.{i}.downsample.conv", padded, stride=2))
    h = block(w, "mid.block_1", hs[-1], temb)
    h = block(w, "mid.block_2", attention(w, "mid.attn_1", h), temb)
    for i in reversed(range(levels)):
        for j in range(3):
            h = block(w, f"up.{i}.block.{j}", torch.cat([h, hs.pop()], dim=1), temb)
            if f"up.{i}.attn.{j}.q.weight" in w:
                h = attention(w, f"up.{i}.attn.{j}", h)
        if i > 0:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = convolved(w, f"up.{i}.upsample.conv", h, padding=1)
    assert hs == []
    return convolved(w, "conv_out", swish(normed(w, "norm_out", h)), padding=1)


def network(
    mults: Sequence[int] = MULTS, channels: int = 1, *, dim: int = DIM, **settings: Any
) -> DDPMUNet:
    """Norms and biases larger than at initialisation, so that every part counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DDPMUNet(dim, mults, channels, **({"image_size": 16} | settings))
        with torch.no_grad():
            for value in net.parameters():
                scale = 0.3 if value.ndim == 1 else 0.3 * float(value.std())
                value.add_(scale * torch.randn_like(value))
    return net.eval()


def inputs(channels: int = 1, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels + height + width)
    x = 2 * torch.rand(3, channels, height, width, generator=generator) - 1
    return x, torch.tensor([1, 2, 40])


# The function.


@pytest.mark.parametrize(
    ("mults", "channels", "size", "attending"),
    [
        ((1, 2), 1, 16, {0}),
        ((1, 2), 3, 32, {1}),
        ((1, 1, 2), 1, 64, {2}),
        ((2, 1, 3), 1, 16, {0}),
        ((1,), 1, 32, set()),
        ((1, 2), 1, 24, set()),
    ],
)
@torch.no_grad()
def test_computes_the_formulas(
    mults: tuple[int, ...], channels: int, size: int, attending: set[int]
) -> None:
    net = network(mults, channels, image_size=size)
    weights = net.state_dict()
    # The blocks attend at 16 x 16 alone, the middle everywhere.
    for way, blocks in (("down", 2), ("up", 3)):
        found = {n.rsplit(".", 2)[0] for n in weights if n.startswith(way) and ".attn." in n}
        expected = {f"{way}.{i}.attn.{j}" for i in attending for j in range(blocks)}
        assert {n for n in found if n.count(".") == 3} == expected
    x, t = inputs(channels, size, size)
    expected_output = oracle(weights, x, t - 1)
    assert float(expected_output.std()) > 0.02  # a function of something
    torch.testing.assert_close(net(x, t), expected_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_computes_the_formulas_on_wide_images() -> None:
    net, (x, t) = network(), inputs(1, 8, 20)
    torch.testing.assert_close(net(x, t), oracle(net.state_dict(), x, t - 1), rtol=1e-5, atol=1e-5)


def test_full_size_has_the_authors_parameters() -> None:
    with torch.device("meta"):
        net = DDPMUNet(128, (1, 2, 2, 2), 3, image_size=32, dropout=0.1)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 35_746_307
    assert shapes["temb.dense.0.weight"] == (512, 128)
    assert shapes["temb.dense.1.weight"] == (512, 512)
    assert shapes["conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["down.1.attn.1.proj_out.bias"] == (256,)
    assert shapes["down.2.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["mid.block_2.temb_proj.weight"] == (256, 512)
    # What comes up, and one skip connection: of the last block the narrower one before it.
    assert shapes["up.1.block.2.conv1.weight"] == (256, 256 + 128, 3, 3)
    assert shapes["up.0.block.0.conv1.weight"] == (128, 256 + 128, 3, 3)
    assert shapes["up.3.upsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["conv_out.weight"] == (3, 128, 3, 3)
    assert (
        "down.3.downsample.conv.weight" not in shapes and "up.0.upsample.conv.weight" not in shapes
    )


@torch.no_grad()
def test_each_image_is_restored_by_itself_at_its_own_level() -> None:
    net, (x, t) = network(), inputs()
    together = net(x, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], t[i : i + 1]))
    other = net(x, torch.tensor([2, 2, 40]))
    assert torch.equal(other[1:], together[1:])
    assert float((other[0] - together[0]).abs().max()) > 1e-3


@torch.no_grad()
def test_level_1_is_the_authors_step_0() -> None:
    """Whose embedding is zeros and ones, whatever the frequencies."""
    net, (x, _) = network(), inputs()
    ones = torch.cat((torch.zeros(1, DIM // 2), torch.ones(1, DIM // 2)), dim=1)
    dense0, dense1 = net.temb.dense
    expected = dense1(swish(dense0(ones)))
    seen: list[Tensor] = []
    net.temb.register_forward_hook(lambda _m, _x, out: seen.append(out))
    net(x, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(seen[0], expected.expand(3, -1))


@torch.no_grad()
def test_further_input_channels_and_residual_to_the_first() -> None:
    plain = network(channels=5, out_channels=2)
    added = network(channels=5, out_channels=2, residual=True)
    x, t = inputs(5)
    assert plain(x, t).shape == (3, 2, 16, 16)
    torch.testing.assert_close(added(x, t) - plain(x, t), x[:, :2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_channels_last_gives_the_same() -> None:
    net, (x, t) = network(channels=3), inputs(3)
    plain = net(x, t)
    last = net.to(memory_format=torch.channels_last)
    result = last(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    # At dim = 32 a group is one channel, whose norm takes away what is added to all its pixels.
    net, (x, t) = network(dim=64), inputs()
    net(x, t).square().mean().backward()
    # A bias of the keys adds the same to all scores of a row, which the softmax takes away again.
    no_effect = {n for n, _ in net.named_parameters() if n.endswith(".k.bias")}
    assert len(no_effect) == 6
    for name, value in net.named_parameters():
        assert value.grad is not None, name
        size = float(value.grad.abs().max())
        assert size < 1e-6 if name in no_effect else size > 1e-5, name


def test_dropout_zeroes_its_share_in_training_alone() -> None:
    net, (x, t) = network(dropout=0.25), inputs()
    without = network(dropout=0.0)
    shares: list[float] = []
    blocks = [m for m in net.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 2 * 2 + 2 + 3 * 2

    def watch(each: ResidualBlock) -> None:
        normed_output: list[Tensor] = []
        each.norm2.register_forward_hook(lambda _m, _x, out: normed_output.append(out))
        each.conv2.register_forward_pre_hook(lambda _m, x: note(normed_output.pop(), x[0]))

    def note(normed_output: Tensor, given: Tensor) -> None:
        """Between second norm and second convolution: what is not zeroed makes up for the rest."""
        kept = given != 0
        shares.append(1 - float(kept.float().mean()))
        expected = swish(normed_output) / (0.75 if net.training else 1)
        torch.testing.assert_close(given[kept], expected[kept])

    for each in blocks:
        watch(each)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert torch.equal(net(x, t), without(x, t))
        assert torch.equal(without.train()(x, t), without.eval()(x, t))
        assert max(shares) < 0.001
        shares.clear()
        net.train()
        first, second = net(x, t), net(x, t)
    assert not torch.equal(first, second)
    assert all(0.2 < share < 0.3 for share in shares) and len(shares) == 2 * len(blocks)


@pytest.mark.parametrize("size", [(16, 18), (10, 16), (7, 7)])
def test_wrong_sizes_are_refused(size: tuple[int, int]) -> None:
    x, t = torch.zeros(1, 1, *size), torch.tensor([1])
    with pytest.raises(ValueError, match=rf"multiples of 4, got \(1, 1, {size[0]}, {size[1]}\)"):
        network((1, 1, 1))(x, t)


def test_bad_arguments_are_refused() -> None:
    for dim in (16, 48, 0, -32):
        with pytest.raises(ValueError, match=rf"dim must be .* multiple of 32, got {dim}"):
            DDPMUNet(dim)
    for mults in ((), (1, 0)):
        with pytest.raises(ValueError, match="mults"):
            DDPMUNet(32, mults)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        DDPMUNet(32, channels=0)
    with pytest.raises(ValueError, match="dropout"):
        DDPMUNet(32, (1,), dropout=-0.1)


# The authors' weights.


def bare(state: Weights) -> dict[str, Tensor]:
    return dict(state)


def wrapped(prefix: str) -> Callable[[Weights], dict[str, Tensor]]:
    def wrap(state: Weights) -> dict[str, Tensor]:
        outer = prefix.split("denoise_fn.")[0]
        kernels = {f"{outer}gaussian_kernels.{i}.weight": torch.ones(3, 1, 11, 11) for i in (0, 1)}
        return OrderedDict({prefix + name: value for name, value in state.items()} | kernels)

    return wrap


@pytest.mark.parametrize(
    "form",
    [
        bare,
        *map(wrapped, ("denoise_fn.", "module.denoise_fn.", "denoise_fn.module.")),
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
)
@torch.no_grad()
def test_weights_load_in_every_form(form: Callable[[Weights], dict[str, Tensor]]) -> None:
    theirs, (x, t) = network(channels=3), inputs(3)
    average = {name: 0.9 * value for name, value in theirs.state_dict().items()}
    checkpoint = {"step": 700_000, "model": form(theirs.state_dict()), "ema": form(average)}
    loads: list[tuple[Any, Literal["model", "ema"], Weights]] = [
        (form(theirs.state_dict()), "model", theirs.state_dict()),
        (checkpoint, "model", theirs.state_dict()),
        (checkpoint, "ema", average),
    ]
    for state, weights, expected in loads:
        ours = DDPMUNet(DIM, MULTS, 3, image_size=16).eval()
        load_reference_state_dict(ours, state, weights)
        torch.testing.assert_close(ours(x, t), oracle(expected, x, t - 1), rtol=1e-5, atol=1e-5)


def assert_refused(state: Weights, *said: str) -> None:
    ours = DDPMUNet(DIM, MULTS, 1, image_size=16)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_reference_state_dict(ours, state)
    for words in said:
        assert words in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_weights_that_do_not_fit_are_refused() -> None:
    state = dict(network().state_dict())
    for name in ("mid.attn_1.q.weight", "up.1.upsample.conv.bias"):
        without = {n: value for n, value in state.items() if n != name}
        assert_refused(without, f"missing ['{name}'], unknown []")
    assert_refused(
        state | {"down.0.block.9.conv1.bias": torch.zeros(1)}, "down.0.block.9.conv1.bias"
    )
    assert_refused({}, "temb.dense.0.weight", "conv_out.bias")
    # The same widths, but made for images of another size: attention elsewhere.
    assert_refused(network(image_size=32).state_dict(), "down.0.attn.0.q.weight", "down.1.attn")
    for name in ("temb.dense.0.weight", "down.1.block.0.nin_shortcut.weight", "conv_in.weight"):
        transposed = state[name].transpose(0, 1).contiguous()
        shapes = f"{name} is {tuple(transposed.shape)} and should be {tuple(state[name].shape)}"
        assert_refused(state | {name: transposed}, shapes)
    assert_refused(network(channels=3).state_dict(), "conv_in.weight is (32, 3, 3, 3)")


@torch.no_grad()
def test_files_keep_the_names(tmp_path: Path) -> None:
    theirs, (x, t) = network(), inputs()
    torch.save({"model": theirs.state_dict()}, tmp_path / "model.pt")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    for state in (
        torch.load(tmp_path / "model.pt", weights_only=True),
        load_file(tmp_path / "model.safetensors"),
    ):
        ours = DDPMUNet(DIM, MULTS, 1, image_size=16).eval()
        load_reference_state_dict(ours, state)
        assert torch.equal(ours(x, t), theirs(x, t))


# In a restorer.

SMALL = RunConfig(
    data=DataConfig(name="digits", image_size=32),
    degradation=DegradationConfig(T=20),
    model=ModelConfig(name="ddpm", dim=DIM, mults=MULTS, patch=2, dropout=0.1),
)


def faint(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """x0, x_T and T of two blurred images."""
    size, generator = config.data.image_size, torch.Generator().manual_seed(1)
    x0 = 2 * torch.rand(2, 1, size, size, generator=generator).round() - 1
    T = torch.full((2,), config.degradation.T)
    return x0, Blur(config.degradation, size)(x0, T), T


def test_attention_is_where_16_patches_are() -> None:
    for patch, size, attending in ((1, 32, 1), (2, 32, 0), (4, 64, 0), (2, 64, 1)):
        config = dataclasses.replace(
            SMALL,
            data=DataConfig(image_size=size),
            model=dataclasses.replace(SMALL.model, patch=patch),
        )
        unet = build_restorer(config).unet
        assert isinstance(unet, DDPMUNet)
        assert [len(level.attn) for level in unet.down] == [2 * (i == attending) for i in (0, 1)]
        x0, xt, t = faint(config)
        assert build_restorer(config)(xt, t).shape == x0.shape


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("conditioning", ["raw", "wiener"])
def test_a_training_step_lowers_the_loss(
    precision: Literal["float32", "bfloat16"], conditioning: Literal["raw", "wiener"]
) -> None:
    model = dataclasses.replace(SMALL.model, conditioning=conditioning)
    config = dataclasses.replace(SMALL, model=model, training=TrainingConfig(precision=precision))
    restorer, (x0, xt, t) = build_restorer(config), faint(config)
    optimiser = torch.optim.Adam(restorer.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            restored = restorer.eval()(xt, t)
        assert restored.dtype == torch.float32
        losses.append(float((restored - x0).abs().mean()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            (restorer.train()(xt, t) - x0).abs().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in restorer.parameters())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("conditioning", ["raw", "wiener"])
@torch.no_grad()
def test_bfloat16_inside_but_not_before_raw_images_are_lifted(
    conditioning: Literal["raw", "wiener"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colddiff.restorer.computes_bfloat16", lambda device: True)
    model = dataclasses.replace(SMALL.model, conditioning=conditioning)
    config = dataclasses.replace(SMALL, model=model)
    exact = build_restorer(config).eval()
    rounded = build_restorer(
        dataclasses.replace(config, training=TrainingConfig(precision="bfloat16"))
    ).eval()
    unet, inside = rounded.unet, []
    assert isinstance(unet, DDPMUNet)
    for module in (unet.conv_in, unet.down[0].block[0], unet.down[0].block[1].conv2, unet.conv_out):
        module.register_forward_hook(lambda _m, _x, out: inside.append(out.dtype))
    _, xt, t = faint(config)
    x0_hat, expected = rounded(xt, t), exact(xt, t)
    assert 0 < float((x0_hat - expected).norm()) < 0.1 * float(expected.norm())
    first = torch.float32 if conditioning == "raw" else torch.bfloat16
    assert inside == [first, first, torch.bfloat16, torch.bfloat16]


@torch.no_grad()
def test_the_faint_residual_of_x_T_comes_out_of_the_first_block() -> None:
    """Which the first convolution in float32 would not achieve without the block after it."""
    config = dataclasses.replace(SMALL, degradation=DegradationConfig(T=40))
    _, xt, t = faint(config)
    flat = xt.mean(dim=(-2, -1), keepdim=True).expand_as(xt)
    assert 1e-5 < float((xt - flat).square().mean().sqrt()) < 1e-3

    def response(autocast: bool, *, convolution: bool, block: bool) -> Tensor:
        """What the residual changes in the features after the first block."""
        net = network(dim=64, float32_first=convolution)
        net.down[0].float32_first = block
        seen: list[Tensor] = []
        net.down[0].block[0].register_forward_hook(lambda _m, _x, out: seen.append(out.float()))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net(xt, t), net(flat, t)
        return seen[0] - seen[1]

    true = response(False, convolution=False, block=False)

    def error(*, convolution: bool, block: bool) -> float:
        rounded = response(True, convolution=convolution, block=block)
        return float((rounded - true).norm() / true.norm())

    assert error(convolution=True, block=True) < 0.02
    assert error(convolution=True, block=False) > 0.5
    assert error(convolution=False, block=False) > 0.5
