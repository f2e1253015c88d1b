"""The restorer of a configuration: what surrounds the U-Net.

Precision is decided here. Degraded images stay float32 until their information has been lifted to
the images' own scale: near x_T everything that identifies an image lies below bfloat16's 8 bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colddiff.config import DegradationConfig, RunConfig
from colddiff.ddpm_unet import DDPMUNet
from colddiff.degradation import cumulative_matrices
from colddiff.machine import computes_bfloat16
from colddiff.sections import Storage
from colddiff.unet import UNet

FLOORS: dict[Storage, float] = {
    "float32": 1e-6,
    "bfloat16": 2**-9,
    "float16": 2**-12,
    "uint16": 2**-16,
    "uint8": 2**-8,
}
"""Error of x_t in units of the [-1, 1] range: a few roundings of values near 1 in float32, half a
step of the coarser formats."""
DISCRETE_FLOOR = 2**-7
"""The same where 8 bits are rounded down."""


def rounding_floor(blur: DegradationConfig) -> float:
    """The error of x_t as that degradation leaves it, in units of the [-1, 1] range."""
    return DISCRETE_FLOOR if blur.discrete else FLOORS[blur.storage]


class WienerEstimate(nn.Module):
    """The linear estimate of x0 from x_t = A_t x0 A_tᵀ (Wiener filter with a white prior).

    With A_t = U S Vᵀ, each coefficient of Uᵀ x_t U is divided by its gain g = s_i s_j as far as
    the floor allows: by (g² + floor²) / g. What the blur has pushed below the floor stays zero.
    The image's mean passes unchanged, as it does through the blur.
    """

    U: Tensor
    V: Tensor
    inverse: Tensor

    def __init__(self, matrices: Tensor, floor: float) -> None:
        """``matrices`` are A_0..A_T (float64 ``T+1 n n``), ``floor`` the error of x_t."""
        super().__init__()
        U, S, Vh = torch.linalg.svd(matrices)
        gain = S[:, :, None] * S[:, None, :]
        self.register_buffer("U", U.float(), persistent=False)
        self.register_buffer("V", Vh.mT.float().contiguous(), persistent=False)
        self.register_buffer("inverse", (gain / (gain**2 + floor**2)).float(), persistent=False)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """``b c n n`` -> ``b c n n``, float32."""
        U, V = self.U[t][:, None], self.V[t][:, None]
        mean = xt.mean(dim=(-2, -1), keepdim=True)
        coefficients = U.mT @ (xt - mean) @ U
        return mean + V @ (coefficients * self.inverse[t][:, None]) @ V.mT


class Restorer(nn.Module):
    """R(x_t, t): fold pixels into channels, condition the input, run the U-Net, unfold."""

    def __init__(
        self,
        unet: UNet | DDPMUNet,
        *,
        patch: int = 1,
        estimate: WienerEstimate | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        bounded: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.patch, self.estimate, self.precision = unet, patch, estimate, precision
        self.bounded = bounded
        devices = ("cpu", "cuda") if precision == "bfloat16" else ()
        self._in_bfloat16 = {device for device in devices if computes_bfloat16(device)}

    def arithmetic(self, device: str) -> Literal["float32", "bfloat16"]:
        """What the network computes in on a device of this type: ``precision`` where it can."""
        return "bfloat16" if device in self._in_bfloat16 else "float32"

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """x0_hat, float32 ``b c h w``, from x_t in [-1, 1] at int64 levels ``b`` in 1..T.

        A bounded one is clamped to [-1, 1], but not in training, where that would stop gradients.
        """
        device = xt.device.type
        with torch.autocast(device, enabled=False):
            inputs = xt.float()
            if self.estimate is not None:
                # First, because a residual U-Net adds its output to its first channels.
                inputs = torch.cat((self.estimate(inputs, t), inputs), dim=1)
            if self.patch > 1:
                inputs = F.pixel_unshuffle(inputs, self.patch)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=device in self._in_bfloat16):
            out: Tensor = self.unet(inputs, t)
        x0_hat = F.pixel_shuffle(out.float(), self.patch) if self.patch > 1 else out.float()
        return x0_hat.clamp(-1, 1) if self.bounded and not self.training else x0_hat


def build_restorer(config: RunConfig) -> Restorer:
    """The freshly initialised restorer of a configuration, seeded by ``training.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        unet = _build_unet(config)
    estimate, model = None, config.model
    if model.conditioning == "wiener":
        matrices = cumulative_matrices(config.degradation, config.data.image_size)
        estimate = WienerEstimate(matrices, rounding_floor(config.degradation))
    restorer = Restorer(
        unet,
        patch=model.patch,
        estimate=estimate,
        precision=config.training.precision,
        bounded=model.bounded,
    )
    return restorer.to(memory_format=torch.channels_last)


def _build_unet(config: RunConfig) -> UNet | DDPMUNet:
    model = config.model
    folded = config.data.channels * model.patch**2
    wiener = model.conditioning == "wiener"
    channels = 2 * folded if wiener else folded
    # The Wiener estimate is at the images' own scale; raw x_t near x_T is not.
    float32_first = not wiener
    match model.name:
        case "convnext":
            return UNet(
                model.dim,
                model.mults,
                channels,
                out_channels=folded,
                time_embedding=model.time_embedding,
                residual=model.residual,
                float32_first=float32_first,
            )
        case "ddpm":
            return DDPMUNet(
                model.dim,
                model.mults,
                channels,
                image_size=config.data.image_size // model.patch,
                out_channels=folded,
                dropout=model.dropout,
                residual=model.residual,
                float32_first=float32_first,
            )
