"""What a training run measures of itself on images kept back."""

from __future__ import annotations

import torch
from torch import nn

from colddiff.batches import to_batch
from colddiff.config import RunConfig
from colddiff.data import TensorImages
from colddiff.degradation import Noise, Process
from colddiff.diffusion import restore_directly
from colddiff.metrics import rmse, ssim
from colddiff.randomness import generator

PART = 250
"""Images restored at a time."""


@torch.no_grad()
def validate(
    restorer: nn.Module,
    degradation: Process,
    images: TensorImages,
    config: RunConfig,
    device: torch.device,
) -> dict[str, float]:
    """RMSE and SSIM of direct restoration from x_T, under their names in the journal."""
    x0 = to_batch(images.take(torch.arange(len(images))), config.data)
    restored = []
    restorer.eval()
    for k, part in enumerate(x0.split(PART)):
        part = part.to(device)
        if isinstance(degradation, Noise):
            draws = generator(config.training.seed, "validation", k)
            held = degradation.hold(torch.randn(*part.shape, generator=draws).to(device))
            xT = held.terminal(part)
        else:
            xT = degradation.terminal(part)
        restored.append(restore_directly(restorer, xT, degradation.T).cpu())
    x0_hat = torch.cat(restored).clamp(-1, 1)
    return {"validation/rmse": rmse(x0_hat, x0), "validation/ssim": ssim(x0_hat, x0)}
