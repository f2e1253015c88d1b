"""Trainers to be timed: presets on the images that are always there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from colddiff.batches import batches
from colddiff.config import RunConfig
from colddiff.optimisation import resolve_device
from colddiff.presets import preset
from colddiff.ranks import ALONE, Group
from colddiff.run_folder import RunFolder
from colddiff.trainer import Trainer

CPU = torch.device("cpu")


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same run with another seed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


def on_digits(name: str, dim: int, batch: int) -> RunConfig:
    """A preset at some width and batch, T = 20, one batch a step, averaged at each step."""
    config = preset(name)
    training = dataclasses.replace(
        config.training,
        batch_size=batch,
        accumulation=1,
        ema_every=1,
        ema_start=0,
        precision="bfloat16",  # where the processor has units for it
        device="cpu",
    )
    return dataclasses.replace(
        config,
        data=preset("demo").data,
        degradation=dataclasses.replace(config.degradation, T=20),
        model=dataclasses.replace(config.model, dim=dim),
        training=training,
    )


@contextmanager
def a_trainer(config: RunConfig) -> Iterator[tuple[Trainer, Callable[[], None]]]:
    """A trainer in a new run folder, which is taken away again, and what does one of its steps."""
    device = resolve_device("cpu")  # which has the process keep freed memory, as jobs do
    with tempfile.TemporaryDirectory() as runs:
        trainer = Trainer(RunFolder.create(Path(runs), config), config, Group(ALONE, device))
        trainer.folder.write_status("running", 0, config.training.steps)
        assert trainer.journal is not None
        stream = batches(trainer.images, config.data, trainer.order, 0, CPU, 0)
        with closing(stream), trainer.journal:
            yield trainer, lambda: trainer.train_step(stream)
