"""Device, optimiser, learning rate, and the running sums of a training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from colddiff.config import OptimiserConfig
from colddiff.machine import keep_freed_memory


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` -> cuda where there is one, with its float32 made exact.

    Of several GPUs the node's ranks take one each; where Slurm shows each rank only its own, that
    is the only one there is.

    Raises:
        ValueError: for cuda where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("training.device = 'cuda' but torch sees no CUDA device: use auto or cpu")
    # TF32 keeps 10 bits of a float32, and near x_T the image lies below those. torch's default
    # uses it in convolutions; who wants speed takes bfloat16, behind a float32 first block.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu" or not available:
        keep_freed_memory()
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """The rate of the 0-based ``step`` of ``steps``: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimiser(config: OptimiserConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters, in one fused kernel."""
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(module.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def update_average(average: AveragedModel, module: torch.nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * module``, all parameters at once; 0 copies.

    The device is not waited for, and the same memory is written each time (CUDA graphs).
    """
    averaged, current = list(average.module.parameters()), list(module.parameters())
    get_ema_multi_avg_fn(decay)(averaged, current, 0)


@dataclass
class Interval:
    """A rank's sums on the device since the last record (float64 ``loss, gradient norm``)."""

    sums: Tensor
    steps: int = 0

    @classmethod
    def resumed(cls, sums: Tensor, steps: int, rank: int, world_size: int) -> Self:
        """From the sums of all ranks that saved them, ``n 2``: its own, or of other ranks the mean.

        So the mean over the ranks is the same whatever their number now.
        """
        return cls(sums[rank].clone() if len(sums) == world_size else sums.mean(0), steps)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """No host synchronisation here."""
        self.sums += torch.stack((loss.detach(), norm.detach())).double()
        self.steps += 1
