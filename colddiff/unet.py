"""The restorer: the ConvNeXt U-Net with linear attention of the authors' MNIST and CelebA runs.

The parameters are laid out in the authors' order and shapes, so that their checkpoints load
(:func:`load_reference_state_dict`), but the operations are native ones: ``F.layer_norm`` over the
channels of a ``channels_last`` tensor, and linear attention as two batched matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colddiff.depthwise import Depthwise
from colddiff.unet_parts import (
    reference_weights,
    require_multiple,
    require_widths,
    step_embedding,
)

HEADS, HEAD_DIM = 4, 32
EXPANSION = 2


class ChannelNorm(nn.Module):
    """Layer norm over the channel dimension of ``b c h w``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channel vector; in channels_last the permutes copy nothing."""
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depth-wise 7x7, time shift, norm, two 3x3 convolutions, residual (arXiv:2201.03545)."""

    def __init__(self, dim: int, dim_out: int, time_dim: int | None, *, norm: bool = True) -> None:
        super().__init__()
        hidden = dim_out * EXPANSION
        self.time = None if time_dim is None else nn.Linear(time_dim, dim)
        self.depthwise = Depthwise(dim, 7)
        self.norm = ChannelNorm(dim) if norm else nn.Identity()
        self.expand = nn.Conv2d(dim, hidden, 3, padding=1)
        self.project = nn.Conv2d(hidden, dim_out, 3, padding=1)
        self.skip = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """Map ``b dim h w`` to ``b dim_out h w``; ``time`` is the activated embedding."""
        h = self.depthwise(x)
        if self.time is not None and time is not None:
            h = h + self.time(time)[:, :, None, None]
        h = self.project(F.gelu(self.expand(self.norm(h))))
        out: Tensor = h + self.skip(x)
        return out


class LinearAttention(nn.Module):
    """Pre-normed linear attention with a residual: softmax over the keys' pixels, none elsewhere.

    The context ``k vᵀ`` is a 32x32 matrix a head, so the cost grows linearly with the pixels.
    Queries and values are linear in the pixels and so is all that is done with them: with more
    pixels than the width pays for, the weights are multiplied first and neither is ever formed.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.qkv = nn.Conv2d(dim, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_DIM, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``b c h w -> b c h w``."""
        c, h, w = x.shape[1:]
        rows = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # b n c, a row a pixel
        inner = HEADS * HEAD_DIM
        # Multiplications of a pixel: 2 x 128 c through queries, c^2 and a share of 128 c^2 without.
        attend = self._folded if h * w * (2 * inner - c) > inner * c else self._direct
        q, k, v = self.qkv.weight.view(3, inner, c)
        attended: Tensor = attend(rows, q * HEAD_DIM**-0.5, k, v)
        if self.out.bias is not None:
            attended = attended + self.out.bias.to(attended.dtype)
        out: Tensor = attended.unflatten(1, (h, w)).permute(0, 3, 1, 2) + x
        return out

    def _folded(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``b n c -> b n c``: by one c x c matrix an image."""
        keys = F.linear(rows, k).softmax(dim=1)
        seen = (keys.mT @ rows).unflatten(1, (HEADS, HEAD_DIM))  # b heads 32 c
        context = seen @ v.view(HEADS, HEAD_DIM, -1).mT.to(seen.dtype)  # b heads 32 32
        out = self.out.weight.view(-1, HEADS, HEAD_DIM).permute(1, 2, 0)  # heads 32 c
        mixed = (context @ out.to(context.dtype)).flatten(1, 2)  # b 128 c
        attended: Tensor = rows @ (q.mT.to(mixed.dtype) @ mixed)
        return attended

    def _direct(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``b n c -> b n c``: as it is written in arXiv:2006.16236, with the authors' softmax."""
        b, n, _ = rows.shape
        queries, keys, values = (
            F.linear(rows, weight).view(b, n, HEADS, HEAD_DIM).transpose(1, 2)
            for weight in (q, k, v)
        )
        context = keys.softmax(dim=-2).mT @ values
        attended = (queries @ context).transpose(1, 2).reshape(b, n, HEADS * HEAD_DIM)
        return F.linear(attended, self.out.weight.flatten(1))


class Level(nn.Module):
    """One resolution: two blocks, attention and a resampling (identity at the ends).

    With ``float32_first`` the first block computes in float32, whatever autocast says.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        time_dim: int | None,
        resample: nn.Module,
        *,
        norm: bool = True,
        float32_first: bool = False,
    ) -> None:
        super().__init__()
        self.float32_first = float32_first
        self.block1 = ConvNextBlock(dim, dim_out, time_dim, norm=norm)
        self.block2 = ConvNextBlock(dim_out, dim_out, time_dim)
        self.attention = LinearAttention(dim_out)
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """The features before resampling, which the skip connection needs."""
        if self.float32_first:
            with torch.autocast(x.device.type, enabled=False):
                h = self.block1(x.float(), None if time is None else time.float())
        else:
            h = self.block1(x, time)
        out: Tensor = self.attention(self.block2(h, time))
        return out


class UNet(nn.Module):
    """R(x_t, t): predicts x0 from a degraded image and its level.

    Args:
        dim: width of the first resolution and of the time embedding; even and at least 4.
        mults: width multiplier of each resolution; each further one halves the image.
        channels: input channels.
        out_channels: output channels, as many as the input's by default.
        time_embedding: whether the network is told t.
        residual: whether the network predicts x0 minus its first ``out_channels`` inputs.
        float32_first: whether the first block ignores autocast: what bfloat16 would round away of
            x_t is then at least seen by it.

    At ``dim=64, mults=(1, 2, 4, 8)`` it is the authors' network: 56,612,916 parameters at one
    channel, 56,615,708 at three. Like theirs, it embeds the 0-based step ``t - 1``.
    """

    def __init__(
        self,
        dim: int = 64,
        mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 1,
        *,
        out_channels: int | None = None,
        time_embedding: bool = True,
        residual: bool = False,
        float32_first: bool = False,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be an even number of at least 4, got {dim}")
        require_widths(mults, channels)
        out_channels = channels if out_channels is None else out_channels
        self.dim, self.out_channels, self.residual = dim, out_channels, residual
        self.stride = 2 ** (len(mults) - 1)
        widths = [channels, *(dim * m for m in mults)]
        time_dim = dim if time_embedding else None
        self.time = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            if time_embedding
            else None
        )
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.downs = nn.ModuleList(
            Level(
                a,
                b,
                time_dim,
                nn.Conv2d(b, b, 4, 2, 1) if i < len(pairs) - 1 else nn.Identity(),
                norm=i > 0,  # the first block sees the image itself, which has nothing to norm
                float32_first=float32_first and i == 0,
            )
            for i, (a, b) in enumerate(pairs)
        )
        self.middle1 = ConvNextBlock(widths[-1], widths[-1], time_dim)
        self.middle_attention = LinearAttention(widths[-1])
        self.middle2 = ConvNextBlock(widths[-1], widths[-1], time_dim)
        self.ups = nn.ModuleList(
            Level(2 * b, a, time_dim, nn.ConvTranspose2d(a, a, 4, 2, 1))
            for a, b in reversed(pairs[1:])
        )
        # The authors write dim here, which is the same where mults starts with 1, as theirs does.
        self.final_block = ConvNextBlock(widths[1], widths[1], None)
        self.final = nn.Conv2d(widths[1], out_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict x0 from ``x`` (``b c h w`` in [-1, 1]) at levels ``t`` (``b``, int64, 1..T).

        Raises:
            ValueError: if height or width is not a multiple of ``2 ** (len(mults) - 1)``.
        """
        require_multiple(x, self.stride)
        time = None
        if self.time is not None:
            # Every block applies the same GELU to the embedding before its own linear map.
            time = F.gelu(self.time(step_embedding(t - 1, self.dim)))
        h, skips = x, []
        for down in self.downs:
            assert isinstance(down, Level)
            h = down(h, time)
            skips.append(h)
            h = down.resample(h)
        h = self.middle2(self.middle_attention(self.middle1(h, time)), time)
        for up in self.ups:
            assert isinstance(up, Level)
            h = up.resample(up(torch.cat((h, skips.pop()), dim=1), time))
        out: Tensor = self.final(self.final_block(h, None))
        return out + x[:, : self.out_channels] if self.residual else out


def load_reference_state_dict(
    unet: UNet,
    state_dict: Mapping[str, Tensor],
    weights: Literal["model", "ema"] = "model",
) -> None:
    """Load weights that carry the authors' parameter names (``downs.0.0.ds_conv.weight``, …).

    In any of the forms that :func:`~colddiff.unet_parts.reference_weights` reads.

    Raises:
        ValueError: naming the parameters that are missing, unknown or of another shape.
    """
    names, own = reference_names(unet), unet.state_dict()
    # Their norms (g and b) are stored 1 c 1 1; every other shape agrees.
    shapes = {
        r: (1, *own[n].shape, 1, 1) if r.endswith((".g", ".b")) else own[n].shape
        for n, r in names.items()
    }
    theirs = reference_weights(state_dict, shapes, weights)
    unet.load_state_dict({n: theirs[r].reshape(own[n].shape) for n, r in names.items()})


def reference_names(unet: UNet) -> dict[str, str]:
    """Our parameter name -> the authors' name, for every parameter of ``unet``."""
    block = {
        "time": "mlp.1",
        "depthwise": "ds_conv",
        "norm": "net.0",
        "expand": "net.1",
        "project": "net.3",
        "skip": "res_conv",
    }
    attention = {"norm": "fn.norm", "qkv": "fn.fn.to_qkv", "out": "fn.fn.to_out"}
    parts = {"block1": "0", "block2": "1", "attention": "2", "resample": "3"}
    tops = {
        "middle1": "mid_block1",
        "middle_attention": "mid_attn",
        "middle2": "mid_block2",
        "final_block": "final_conv.0",
        "final": "final_conv.1",
    }

    def translate(name: str) -> str:
        head, *rest = name.split(".")
        if head == "time":
            return f"time_mlp.{int(rest[0]) + 1}.{rest[1]}"
        if head in ("downs", "ups"):
            head, rest = f"{head}.{rest[0]}.{parts[rest[1]]}", [rest[1], *rest[2:]]
            kind = rest.pop(0)
        else:
            kind, head = head, tops[head]
        if len(rest) == 1:  # a plain convolution: resample or final
            return f"{head}.{rest[0]}"
        inner = attention if "attention" in kind else block
        leaf = {"weight": "g", "bias": "b"}[rest[1]] if rest[0] == "norm" else rest[1]
        return f"{head}.{inner[rest[0]]}.{leaf}"

    return {name: translate(name) for name in unet.state_dict()}
