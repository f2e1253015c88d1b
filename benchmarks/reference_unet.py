"""The authors' ConvNeXt U-Net, the plain way and with their parameter names: the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, einsum, nn

HEADS, HEAD_DIM = 4, 32


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        rows = []
        for step in time.tolist():
            angles = [step * math.exp(-math.log(10000) * k / (half - 1)) for k in range(half)]
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        return torch.tensor(rows)


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.g + self.b


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int, dim_out: int, time_dim: int | None, norm: bool = True) -> None:
        super().__init__()
        self.mlp = None if time_dim is None else nn.Sequential(nn.GELU(), nn.Linear(time_dim, dim))
        self.ds_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.net = nn.Sequential(
            LayerNorm(dim) if norm else nn.Identity(),
            nn.Conv2d(dim, 2 * dim_out, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * dim_out, dim_out, 3, padding=1),
        )
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.ds_conv(x)
        if self.mlp is not None:
            h = h + self.mlp(time)[:, :, None, None]
        out: Tensor = self.net(h) + self.res_conv(x)
        return out


class LinearAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(dim, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_DIM, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        qkv = self.to_qkv(x).chunk(3, dim=1)
        q, k, v = (part.reshape(b, HEADS, HEAD_DIM, height * width) for part in qkv)
        q = q * 32**-0.5
        k = k.softmax(dim=-1)
        context = einsum("bhdn,bhen->bhde", k, v)
        heads = einsum("bhde,bhdn->bhen", context, q)
        out: Tensor = self.to_out(heads.reshape(b, HEADS * HEAD_DIM, height, width))
        return out


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(x) + x
        return out


def attention(dim: int) -> nn.Module:
    return Residual(PreNorm(dim, LinearAttention(dim)))


def parts(level: Any) -> Iterator[Any]:
    """Two blocks, attention, resampling."""
    return iter(level)


class ReferenceUNet(nn.Module):
    """``forward(x, time)``; ``time`` is the 0-based step."""

    def __init__(
        self,
        dim: int,
        mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 1,
        *,
        out_channels: int | None = None,
        with_time: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        time_dim = dim if with_time else None
        self.time_mlp: Callable[[Tensor], Tensor] | None = None
        if with_time:
            self.time_mlp = nn.Sequential(
                SinusoidalPosEmb(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
        dims = [channels, *(dim * m for m in mults)]
        in_out = list(zip(dims[:-1], dims[1:], strict=True))
        self.downs = nn.ModuleList()
        for i, (a, b) in enumerate(in_out):
            resample = nn.Conv2d(b, b, 4, 2, 1) if i < len(in_out) - 1 else nn.Identity()
            first = ConvNextBlock(a, b, time_dim, norm=i != 0)
            blocks = [first, ConvNextBlock(b, b, time_dim), attention(b), resample]
            self.downs.append(nn.ModuleList(blocks))
        self.mid_block1 = ConvNextBlock(dims[-1], dims[-1], time_dim)
        self.mid_attn = attention(dims[-1])
        self.mid_block2 = ConvNextBlock(dims[-1], dims[-1], time_dim)
        self.ups = nn.ModuleList()
        for a, b in reversed(in_out[1:]):
            first = ConvNextBlock(2 * b, a, time_dim)
            upsample = nn.ConvTranspose2d(a, a, 4, 2, 1)
            blocks = [first, ConvNextBlock(a, a, time_dim), attention(a), upsample]
            self.ups.append(nn.ModuleList(blocks))
        self.final_conv = nn.ModuleList(
            [
                ConvNextBlock(dim, dim, None),
                nn.Conv2d(dim, channels if out_channels is None else out_channels, 1),
            ]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        original = x
        t = self.time_mlp(time) if self.time_mlp is not None else None
        skips = []
        for level in self.downs:
            block1, block2, attend, downsample = parts(level)
            x = attend(block2(block1(x, t), t))
            skips.append(x)
            x = downsample(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, t)), t)
        for level in self.ups:
            block1, block2, attend, upsample = parts(level)
            x = torch.cat((x, skips.pop()), dim=1)
            x = upsample(attend(block2(block1(x, t), t)))
        block, convolution = self.final_conv
        x = convolution(block(x, None))
        return x + original if self.residual else x
