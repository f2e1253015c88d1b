"""The restorer of the authors' CIFAR-10 runs: the U-Net of DDPM (arXiv:2006.11239).

Parameters are named and laid out as in the PyTorch port that the authors used (arXiv:2010.02502,
class ``Model``), so that their checkpoints load (:func:`load_reference_state_dict`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colddiff.unet_parts import (
    in_float32,
    reference_weights,
    require_multiple,
    require_widths,
    step_embedding,
)

GROUPS = 32
BLOCKS = 2
ATTENTION_RESOLUTION = 16


def group_norm(dim: int) -> nn.GroupNorm:
    """Normalisation over groups of channels and all pixels."""
    return nn.GroupNorm(GROUPS, dim, eps=1e-6)


class TimeEmbedding(nn.Module):
    """The 0-based step -> ``b 4 dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.dense = nn.ModuleList((nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, 4 * dim)))

    def forward(self, step: Tensor) -> Tensor:
        """Sines and cosines through two linear maps."""
        first, second = self.dense
        embedded: Tensor = second(F.silu(first(step_embedding(step, self.dim))))
        return embedded


class ResidualBlock(nn.Module):
    """Two normed 3x3 convolutions with a time shift between them, and a shortcut around them."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(dim)
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.temb_proj = nn.Linear(time_dim, dim_out)
        self.norm2 = group_norm(dim_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``b dim h w`` to ``b dim_out h w``; ``time`` is the activated embedding."""
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = h + self.nin_shortcut(x)
        return out


class Attention(nn.Module):
    """Normed self-attention of all pixels with one head, and a shortcut around it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``b c h w -> b c h w``."""
        h = self.norm(x)
        # b 1 hw c: one head of c features, whose default scale is 1 / sqrt(c).
        q, k, v = (part(h).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


def downsample(dim: int) -> nn.Sequential:
    """Half the resolution: a 3x3 convolution of stride 2, its zeros on the right and below only."""
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(dim: int) -> nn.Sequential:
    """Twice the resolution: repeated pixels and a 3x3 convolution."""
    repeat, conv = nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=repeat, conv=conv))


class Level(nn.Module):
    """The blocks of one resolution, each with attention after it or none, and a resampling.

    With ``float32_first`` the first block computes in float32, whatever autocast says.
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        time_dim: int,
        dropout: float,
        *,
        attention: bool,
        float32_first: bool = False,
    ) -> None:
        super().__init__()
        self.float32_first = float32_first
        self.block = nn.ModuleList(ResidualBlock(a, b, time_dim, dropout) for a, b in widths)
        self.attn = nn.ModuleList(Attention(b) for _, b in widths if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def step(self, i: int, h: Tensor, time: Tensor) -> Tensor:
        """Through block ``i`` and the attention after it."""
        block = self.block[i]
        h = in_float32(block, h, time) if self.float32_first and i == 0 else block(h, time)
        return self.attn[i](h) if self.attn else h


class DDPMUNet(nn.Module):
    """R(x_t, t): predicts x0 from a degraded image and its level.

    Args:
        dim: width of the first resolution and of the step's embedding; a multiple of 32. Where a
            resolution has 32 channels, its norms take away the shift by which it is told t.
        mults: width multiplier of each resolution; each further one halves the image.
        channels: input channels.
        image_size: height and width the network is made for: its blocks attend where that leaves
            16 pixels, those in the middle always.
        out_channels: output channels, as many as the input's by default.
        dropout: share of each block's features that is zeroed in training.
        residual: whether the network predicts x0 minus its first ``out_channels`` inputs.
        float32_first: whether the first convolution and the first block ignore autocast. The
            convolution alone would not do: it is linear, so what follows it would round the faint
            residual of x_t as bfloat16 rounds x_t.

    At ``dim=128, mults=(1, 2, 2, 2)``, three channels and 32 pixels it is the authors' network of
    35,746,307 parameters. Like theirs, it embeds the 0-based step ``t - 1``.
    """

    def __init__(
        self,
        dim: int = 128,
        mults: Sequence[int] = (1, 2, 2, 2),
        channels: int = 3,
        *,
        image_size: int = 32,
        out_channels: int | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        float32_first: bool = False,
    ) -> None:
        super().__init__()
        if dim < GROUPS or dim % GROUPS:
            raise ValueError(f"dim must be a positive multiple of {GROUPS}, got {dim}")
        require_widths(mults, channels)
        out_channels = channels if out_channels is None else out_channels
        self.out_channels, self.residual, self.float32_first = out_channels, residual, float32_first
        self.stride = 2 ** (len(mults) - 1)
        widths, time_dim = [dim, *(dim * m for m in mults)], 4 * dim
        attends = [image_size == ATTENTION_RESOLUTION << i for i in range(len(mults))]
        self.temb = TimeEmbedding(dim)
        self.conv_in = nn.Conv2d(channels, dim, 3, padding=1)
        downs, ups = [], []
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            pairs = [(a, b), *[(b, b)] * (BLOCKS - 1)]
            first = float32_first and i == 0
            down = Level(pairs, time_dim, dropout, attention=attends[i], float32_first=first)
            # Each block on the way up is given what came in, and the features of the same
            # resolution on the way down: BLOCKS outputs and, last, what entered there.
            below = widths[min(i + 2, len(mults))]
            pairs = [(below + b, b), *[(2 * b, b)] * (BLOCKS - 1), (b + a, b)]
            up = Level(pairs, time_dim, dropout, attention=attends[i])
            if i < len(mults) - 1:
                down.downsample = downsample(b)
            if i > 0:
                up.upsample = upsample(b)
            downs.append(down)
            ups.append(up)
        self.down = nn.ModuleList(downs)
        self.mid = nn.ModuleDict(
            {
                "block_1": ResidualBlock(widths[-1], widths[-1], time_dim, dropout),
                "attn_1": Attention(widths[-1]),
                "block_2": ResidualBlock(widths[-1], widths[-1], time_dim, dropout),
            }
        )
        self.up = nn.ModuleList(ups)
        self.norm_out = group_norm(widths[1])
        self.conv_out = nn.Conv2d(widths[1], out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict x0 from ``x`` (``b c h w`` in [-1, 1]) at levels ``t`` (``b``, int64, 1..T).

        Raises:
            ValueError: if height or width is not a multiple of ``2 ** (len(mults) - 1)``.
        """
        require_multiple(x, self.stride)
        # Every block applies the same swish to the embedding before its own linear map.
        time = F.silu(self.temb(t - 1))
        skips = [in_float32(self.conv_in, x) if self.float32_first else self.conv_in(x)]
        for level in self.down:
            assert isinstance(level, Level)
            for i in range(BLOCKS):
                skips.append(level.step(i, skips[-1], time))
            if level.downsample is not None:
                skips.append(level.downsample(skips[-1]))
        h = self.mid["attn_1"](self.mid["block_1"](skips[-1], time))
        h = self.mid["block_2"](h, time)
        for level in reversed(self.up):
            assert isinstance(level, Level)
            for i in range(BLOCKS + 1):
                h = level.step(i, torch.cat((h, skips.pop()), dim=1), time)
            if level.upsample is not None:
                h = level.upsample(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out + x[:, : self.out_channels] if self.residual else out


def load_reference_state_dict(
    unet: DDPMUNet,
    state_dict: Mapping[str, Tensor],
    weights: Literal["model", "ema"] = "model",
) -> None:
    """Load weights that carry the authors' parameter names, which are ours too.

    In any of the forms that :func:`~colddiff.unet_parts.reference_weights` reads.

    Raises:
        ValueError: naming the parameters that are missing, unknown or of another shape.
    """
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    unet.load_state_dict(reference_weights(state_dict, shapes, weights))
