"""D(x0, t): the forward processes, in closed form.

A sequence of separable linear blurs is itself one: D(x, t) = A_t x A_tᵀ with A_t = B_t ⋯ B_1, the
1-D blurs with their padding as N x N matrices. All A_t are made once, in float64; a batch with any
mix of levels then costs two small matrix products a channel, whatever t is (docs/decisions.md).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from colddiff.config import DegradationConfig
from colddiff.sections import Storage


class Degradation(Protocol):
    """What loss, restoration and samplers need of a forward process."""

    T: int

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        """D(x0, t): ``x0`` is ``b c h w`` in [-1, 1], ``t`` is ``b`` int64 in 0..T."""
        ...

    def terminal(self, x0: Tensor) -> Tensor:
        """D(x0, T) as sampling starts from it."""
        ...


def gaussian_taps(kernel_size: int, sigma: float) -> Tensor:
    """Normalised taps exp(-j² / 2 sigma²), j = -(K//2)..K//2, float64."""
    j = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    taps = torch.exp(-(j**2) / (2 * sigma**2))
    return taps / taps.sum()


def blur_matrix(size: int, taps: Tensor, padding: Literal["circular", "reflect"]) -> Tensor:
    """The ``size x size`` float64 matrix of a 1-D convolution with that padding.

    Circular kernels may be wider than the image: they wrap around as often as needed.

    Raises:
        ValueError: for reflect padding of ``size`` or more pixels, which has no definition.
    """
    half = len(taps) // 2
    if padding == "reflect" and half >= size:
        raise ValueError(
            f"reflect padding needs a kernel of at most {2 * size - 1} taps for {size} pixels, "
            f"got {len(taps)}"
        )
    rows = torch.arange(size)[:, None].expand(size, len(taps))
    columns = rows + torch.arange(len(taps)) - half
    if padding == "circular":
        columns = columns % size
    else:
        columns = (size - 1) - ((size - 1) - columns.abs()).abs()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.index_put_((rows, columns), taps.expand(size, -1), accumulate=True)


def taps_of_step(config: DegradationConfig, i: int) -> Tensor:
    """The 1-D kernel of the 0-based step ``i`` (table in docs/decisions.md, from the authors)."""
    size = config.kernel_size
    match config.schedule:
        case "constant":
            return gaussian_taps(size, config.sigma)
        case "linear":
            return gaussian_taps(size, config.sigma + config.growth * i)
        case "exponential":
            return gaussian_taps(size, config.sigma * math.exp(config.growth * i))
        case "incremental":
            return gaussian_taps(size, config.sigma * (i + 1))
        case "individual":
            return gaussian_taps(2 * i + 1, 2.0 * (2 * i + 1))
        case "shape":
            step = config.cumulative_variance(i + 1) - config.cumulative_variance(i)
            return taps_of_variance(size, step)


def taps_of_variance(kernel_size: int, variance: float) -> Tensor:
    """Gaussian taps whose own variance, after truncation, is exactly ``variance`` square pixels.

    Variances add under convolution, so schedules built from these share their total blur whatever
    their T and kernel. Raises ``ValueError`` where a flat kernel of that size has less.
    """
    j = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    widest = (kernel_size**2 - 1) / 12
    if not 0 <= variance < widest:
        raise ValueError(
            f"a kernel of {kernel_size} taps has variance in [0, {widest:.4g}), got {variance:.4g}"
        )
    low, high = math.log(1e-3), math.log(1e6)  # bisect log sigma: the variance grows with it
    for _ in range(60):  # to the last bit of a float64
        middle = (low + high) / 2
        if (gaussian_taps(kernel_size, math.exp(middle)) * j**2).sum() < variance:
            low = middle
        else:
            high = middle
    return gaussian_taps(kernel_size, math.exp(high))


def cumulative_matrices(config: DegradationConfig, size: int) -> Tensor:
    """A_0..A_T, float64 ``T+1 size size``; A_0 is the identity."""
    matrices = [torch.eye(size, dtype=torch.float64)]
    for i in range(config.T):
        step = blur_matrix(size, taps_of_step(config, i), config.padding)
        matrices.append(step if config.schedule == "individual" else step @ matrices[-1])
    return torch.stack(matrices)


class Blur(nn.Module):
    """Deterministic Gaussian blur, D(x, t) = A_t x A_tᵀ (paper section 3, appendix A.3).

    Agrees with the sequence of depth-wise convolutions to 1e-6 in float32. The products are done
    in float32 whatever autocast says, because near x_T everything that identifies the image lies
    below bfloat16's eight bits; images in float64 are blurred in float64.
    """

    rows: Tensor
    columns: Tensor
    rows_float64: Tensor
    columns_float64: Tensor

    def __init__(self, config: DegradationConfig, height: int, width: int | None = None) -> None:
        super().__init__()
        width = height if width is None else width
        self.T = config.T
        rows = cumulative_matrices(config, height)
        columns = rows if width == height else cumulative_matrices(config, width)
        for suffix, dtype in (("", torch.float32), ("_float64", torch.float64)):
            self.register_buffer(f"rows{suffix}", rows.to(dtype), persistent=False)
            columns_T = columns.mT.to(dtype).contiguous()
            self.register_buffer(f"columns{suffix}", columns_T, persistent=False)

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """``b c h w`` and int64 ``b`` in 0..T -> x_t, ``b c h w``, float32 or as x0 float64."""
        rows, columns = self.rows, self.columns
        if x0.dtype == torch.float64:
            rows, columns = self.rows_float64, self.columns_float64
        with torch.autocast(x0.device.type, enabled=False):
            # Along the rows all channels at once; along the columns a product for each.
            along = torch.bmm(x0.to(rows.dtype).flatten(1, 2), columns.index_select(0, t))
            xt: Tensor = rows.index_select(0, t)[:, None] @ along.view_as(x0)
            return xt

    def terminal(self, x0: Tensor) -> Tensor:
        """x_T."""
        xT: Tensor = self(x0, x0.new_full((len(x0),), self.T, dtype=torch.int64))
        return xT


class Discrete(nn.Module):
    """The authors' "discrete" blur: in training x_t is rounded down to 8 bits and x_T is constant.

    ``terminal`` is the exact mean image, unrounded, as their sampler starts.
    """

    def __init__(self, blur: Blur) -> None:
        super().__init__()
        self.blur, self.T = blur, blur.T

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """x_t as a network was trained on it; D(x0, 0) is x0 itself."""
        # Rounding down is not idempotent in float32: it would darken 63 of the 256 grey levels.
        xt = self.unrounded(x0, t)
        return torch.where((t == 0)[:, None, None, None], xt, round_to_8_bits(xt))

    def unrounded(self, x0: Tensor, t: Tensor) -> Tensor:
        """x_t as the authors' sampler computes it: the mean at T, plain blur before."""
        blurred: Tensor = self.blur(x0, t)
        mean = blurred.mean(dim=(-2, -1), keepdim=True)
        return torch.where((t == self.T)[:, None, None, None], mean, blurred)

    def terminal(self, x0: Tensor) -> Tensor:
        """The image's mean, everywhere."""
        return self.blur.terminal(x0).mean(dim=(-2, -1), keepdim=True).expand_as(x0).contiguous()


def round_to_8_bits(x: Tensor) -> Tensor:
    """Round [-1, 1] down to the 256 grey levels of an 8-bit image, as the authors' cast does."""
    return ((x + 1) * 127.5).trunc() / 127.5 - 1


class Stored(nn.Module):
    """Blur whose x_t is kept in another number format, rounded to nearest (the information floor).

    As with :class:`Discrete`, samplers start from the rounded x_T and do not round after that.
    """

    def __init__(self, blur: Blur, storage: Storage) -> None:
        super().__init__()
        self.blur, self.T, self.storage = blur, blur.T, storage

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """x_t as it is read back; D(x0, 0) is x0 itself."""
        xt = self.unrounded(x0, t)
        return torch.where((t == 0)[:, None, None, None], xt, stored(xt, self.storage))

    def unrounded(self, x0: Tensor, t: Tensor) -> Tensor:
        """x_t as the samplers evaluate it."""
        xt: Tensor = self.blur(x0, t)
        return xt

    def terminal(self, x0: Tensor) -> Tensor:
        """x_T as it is read back."""
        return stored(self.blur.terminal(x0), self.storage)


def stored(x: Tensor, storage: Storage) -> Tensor:
    """Values in [-1, 1] as they come back from a format; integers cover that range evenly."""
    match storage:
        case "float32":
            return x
        case "bfloat16" | "float16":
            return x.to(torch.bfloat16 if storage == "bfloat16" else torch.float16).to(x.dtype)
    half = (2.0 ** (16 if storage == "uint16" else 8) - 1) / 2
    return (((x.double() + 1) * half).round() / half - 1).to(x.dtype)


class Noise(nn.Module):
    """Hot diffusion: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) z, a_t the cumulative signal power.

    ``z`` is explicit: :meth:`hold` binds one, which makes a deterministic :class:`Degradation`.
    """

    signal_power: Tensor

    def __init__(self, config: DegradationConfig) -> None:
        super().__init__()
        self.T = config.T
        steps = torch.arange(config.T + 1, dtype=torch.float64)
        if config.noise_schedule == "cosine":  # arXiv:2102.09672, equation 17, betas below 0.999
            f = torch.cos((steps / config.T + 0.008) / 1.008 * math.pi / 2) ** 2
            alphas = (f[1:] / f[:-1]).clamp(min=0.001)
        else:  # arXiv:2006.11239, betas 1e-4..0.02 at 1,000 steps, rescaled to T steps
            scale = 1000 / config.T
            betas = torch.linspace(1e-4, 0.02, config.T, dtype=torch.float64) * scale
            alphas = 1 - betas.clamp(max=0.999)
        power = torch.cat((torch.ones(1, dtype=torch.float64), alphas.cumprod(0)))
        self.register_buffer("signal_power", power.float(), persistent=False)

    def forward(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t for ``x0`` and standard normal ``z``, both ``b c h w``, at levels ``t``."""
        power = self.signal_power[t][:, None, None, None].to(x0.dtype)
        return power.sqrt() * x0 + (1 - power).sqrt() * z

    def hold(self, z: Tensor) -> HeldNoise:
        """The degradation with its noise fixed to ``z``."""
        return HeldNoise(self, z)


class HeldNoise:
    """:class:`Noise` with one ``z`` for every level: a deterministic degradation."""

    def __init__(self, noise: Noise, z: Tensor) -> None:
        self.noise, self.z, self.T = noise, z, noise.T

    def __call__(self, x0: Tensor, t: Tensor) -> Tensor:
        """x_t with the held z."""
        xt: Tensor = self.noise(x0, t, self.z)
        return xt

    def terminal(self, x0: Tensor) -> Tensor:
        """x_T with the held z."""
        return self(x0, x0.new_full((len(x0),), self.T, dtype=torch.int64))


Process = Blur | Discrete | Stored | Noise
"""What :func:`build_degradation` makes; all but :class:`Noise` are a :class:`Degradation`."""


def build_degradation(config: DegradationConfig, image_size: int) -> Process:
    """The forward process of a configuration, for square images."""
    if config.kind == "noise":
        return Noise(config)
    blur = Blur(config, image_size)
    if config.discrete:
        return Discrete(blur)
    return blur if config.storage == "float32" else Stored(blur, config.storage)
