"""The smallest configuration that still does everything, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrainingConfig,
)


def tiny(**training: Any) -> RunConfig:
    """Embedded digits at 16 pixels, T = 4, 30 steps of 8 images; ``training`` overrides."""
    settings: dict[str, Any] = {
        "steps": 30,
        "batch_size": 8,
        "accumulation": 1,
        "ema_start": 6,
        "ema_every": 2,
        "ema_decay": 0.9,
        "log_every": 4,
        "validate_every": 10,
        "checkpoint_every": 7,
        "device": "cpu",
    }
    return RunConfig(
        preset="tiny",
        data=DataConfig(image_size=16, validation=16, flip=True, preparation="crop"),
        degradation=DegradationConfig(T=4, kernel_size=5, sigma=2.0),
        model=ModelConfig(dim=4, mults=(1,), patch=2),
        optimiser=OptimiserConfig(lr=1e-3, schedule="cosine", warmup_steps=4, clip_norm=1.0),
        training=TrainingConfig(**(settings | training)),
    )


def replaced(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The configuration with some values of one section replaced."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def changed(config: RunConfig, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """The configuration with values of several sections replaced at once."""
    new = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in sections.items()
    }
    return dataclasses.replace(config, **new)
