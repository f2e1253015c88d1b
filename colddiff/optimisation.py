"""Device, optimiser and learning rate."""

from __future__ import annotations

import math

import torch

from colddiff.config import OptimiserConfig


def resolve_device(name: str) -> torch.device:
    """``auto`` -> cuda where there is one; raises ``ValueError`` for cuda where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("training.device = 'cuda' but torch sees no CUDA device: use auto or cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


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
