"""A trained run, measured: degraded, direct and sampled restorations against the originals.

Conventions as verified against the paper (docs/decisions.md): RMSE over all pixels in [0, 1], SSIM
with data range 1, restorations clamped to [-1, 1] first. FID compares the restorations of the split
with its originals, by the digit classifier's features and, given the weights, by Inception's.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from colddiff.batches import to_batch
from colddiff.checkpoint import load_weights
from colddiff.config import EvaluationConfig, RunConfig
from colddiff.data import load_images
from colddiff.degradation import Degradation, HeldNoise, Noise, build_degradation
from colddiff.diffusion import restore_directly, sample_algorithm1, sample_algorithm2
from colddiff.files import read_json, write_atomic, write_json
from colddiff.hot_samplers import fresh_noise, sample_ddim, sample_ddpm
from colddiff.images import save_grid, to_uint8
from colddiff.judge import Judge, KindResult, LevelCurve, LevelResult
from colddiff.machine import git_dirty, git_sha
from colddiff.metrics import find_inception_weights
from colddiff.randomness import generator
from colddiff.restorer import Restorer, build_restorer
from colddiff.run_folder import RunFolder
from colddiff.trajectory import TRAJECTORY, chosen_images, record_trajectory

log = logging.getLogger(__name__)
FIRST_KINDS = ("degraded", "direct", "sampled")
GRID_IMAGES = 10


@dataclass(frozen=True)
class EvaluationResult:
    """What ``evaluation.json`` holds."""

    split: str
    samples: int
    levels: tuple[int, ...]
    """Visited by the kinds ``sampled`` (Algorithm 2) and ``sampled_algorithm1``."""
    step: int
    """Training steps behind the weights."""
    device: str
    seconds: float
    timestamp_ms: int
    git_sha: str
    """Of the code that evaluated; the training's stands in environment.json."""
    git_dirty: bool
    settings: dict[str, Any]
    """The EvaluationConfig."""
    by_level: tuple[LevelResult, ...]
    """Of each t = 1..T, where settings.by_level asks for it."""
    kinds: dict[str, KindResult]
    """degraded, direct, sampled, sampled_algorithm1, and ``sampled[20-10-0]`` for other lists; of
    hot diffusion, where ``sampled`` holds its noise fixed, also sampled_ddim and sampled_ddpm."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def is_evaluated(folder: RunFolder, settings: EvaluationConfig) -> bool:
    """Whether the run's averaged weights were already measured with these very settings."""
    try:
        done = read_json(folder.evaluation)
    except FileNotFoundError:
        return False
    expected, default = (
        {name: _listed(value) for name, value in dataclasses.asdict(each).items()}
        for each in (settings, EvaluationConfig())
    )
    # A setting that is newer than the evaluation was as its default is.
    if default | done["settings"] != expected or done["step"] != folder.config.training.steps:
        return False
    kept = settings.images > 0 and folder.config.training.levels == "all"
    if kept and not (folder.samples / TRAJECTORY).exists():  # of before trajectories were kept
        return False
    # Inception weights may have been found since, in the environment or torch's cache.
    wanted = find_inception_weights(settings.inception_weights or None) is not None
    return not wanted or done["kinds"]["direct"]["fid_inception"] is not None


def load_restorer(
    folder: RunFolder,
    device: torch.device,
    which: Literal["average", "raw"] = "average",
    at_step: int = 0,
) -> tuple[Restorer, RunConfig, int]:
    """The weights of a finished run, in evaluation mode; its configuration and their step.

    Args:
        folder: the run.
        device: where they go.
        which: averaged weights or raw ones.
        at_step: one that ``training.keep_every`` kept; 0 for the last.

    Raises:
        ValueError: where the run is not trained yet, or did not keep such weights.
    """
    if not folder.weights.exists():
        raise ValueError(f"{folder.path.name} is not trained yet: it has no {folder.weights.name}")
    file = folder.weights
    if which == "raw" or at_step:
        file = folder.kept_weights(which, at_step or folder.config.training.steps)
    if not file.exists():
        raise ValueError(
            f"{folder.path.name} has no {file.name}: training.keep_every was "
            f"{folder.config.training.keep_every} when it was trained"
        )
    tensors, _, step = load_weights(file)
    config = folder.config
    restorer = build_restorer(config)
    restorer.load_state_dict(tensors)
    return restorer.to(device).eval().requires_grad_(False), config, step


@torch.no_grad()
def evaluate(
    folder: RunFolder,
    settings: EvaluationConfig,
    device: torch.device,
    *,
    progress: bool = False,
) -> EvaluationResult:
    """Measure a trained run and write evaluation.json, the sample grid and the arrays behind it.

    Raises:
        ValueError: for a run that is not trained, absent data, or lists of levels that do not fit.
    """
    start = time.perf_counter()
    restorer, config, step = load_restorer(folder, device)
    inception = find_inception_weights(settings.inception_weights or None)
    images = load_images(config.data, settings.split)
    count = min(settings.samples or len(images), len(images))
    labels = images.labels[:count] if images.labels is not None else None
    samplers = _samplers(restorer, config, settings)
    degradation = build_degradation(config.degradation, config.data.image_size).to(device)
    judge, shown = Judge(config.data, labels, inception, device), _Shown(settings.images)
    by_level = settings.by_level if config.training.levels == "all" else 0
    curve = LevelCurve(restorer, config.degradation.T, by_level)
    parts = torch.split(torch.arange(count), settings.batch_size)
    for part in _bar(parts, "evaluate", progress):
        x0 = to_batch(images.take(part), config.data).to(device)
        held = hold(degradation, x0, config.training.seed, part)
        xT = held.terminal(x0)
        restored = {"degraded": xT.clamp(-1, 1)} | {
            name: sampler(held, xT, part).float().clamp(-1, 1) for name, sampler in samplers.items()
        }
        judge.add(x0, restored)
        curve.add(x0, held)
        shown.add({"original": x0, **restored})
    result = EvaluationResult(
        split=settings.split,
        samples=count,
        levels=tuple(range(config.degradation.T, -1, -1)),
        step=step,
        device=str(device),
        seconds=round(time.perf_counter() - start, 1),
        timestamp_ms=int(time.time() * 1000),
        git_sha=git_sha(),
        git_dirty=git_dirty(),
        settings=dataclasses.asdict(settings),
        kinds=judge.results(),
        by_level=curve.results(),
    )
    save_images(folder, shown.stacked(), labels, settings.images)
    if settings.images and config.training.levels == "all":
        part = chosen_images(labels, count)
        x0 = to_batch(images.take(part), config.data).to(device)
        held = hold(degradation, x0, config.training.seed, part)
        record_trajectory(folder, restorer, held, x0, part, labels)
    write_json(folder.evaluation, result.to_dict())
    return result


class _Shown:
    """The first so many images of the kinds that are kept as pictures."""

    def __init__(self, count: int) -> None:
        self.missing = count
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, images: Mapping[str, Tensor]) -> None:
        for name in (*FIRST_KINDS, "original"):
            if name in images:
                self.kept.setdefault(name, []).append(images[name][: self.missing].cpu())
        self.missing = max(0, self.missing - len(images["original"]))

    def stacked(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.kept.items()}


def hold(degradation: torch.nn.Module, x0: Tensor, seed: int, indices: Tensor) -> Degradation:
    """The degradation, where it has noise (hot diffusion) with one draw for each image."""
    if isinstance(degradation, Noise):
        sources = (generator(seed, "evaluation noise", int(i)) for i in indices)
        z = torch.stack([torch.randn(x0.shape[1:], generator=source) for source in sources])
        return degradation.hold(z.to(x0.device))
    return degradation  # type: ignore[return-value]


Sampler = Callable[[Degradation, Tensor, Tensor], Tensor]
"""From the degradation, x_T and the images' indices to x0_hat."""


def _samplers(
    restorer: Restorer, config: RunConfig, settings: EvaluationConfig
) -> dict[str, Sampler]:
    def paper(sample: Any, **options: Any) -> Sampler:
        return lambda degradation, xT, part: sample(restorer, degradation, xT, **options)

    T = config.degradation.T

    def direct(degradation: Degradation, xT: Tensor, part: Tensor) -> Tensor:
        return restore_directly(restorer, xT, T)

    if config.training.levels == "last":  # it knows no other level
        return {"direct": direct}
    samplers: dict[str, Sampler] = {
        "direct": direct,
        "sampled": paper(sample_algorithm2),
        "sampled_algorithm1": paper(sample_algorithm1),
    }
    for text, levels in zip(settings.levels, settings.level_lists, strict=True):
        samplers[f"sampled[{text}]"] = paper(sample_algorithm2, levels=levels)
    if config.degradation.kind == "noise":
        samplers |= _hot_samplers(restorer, config.training.seed)
    return samplers


def _hot_samplers(restorer: Restorer, seed: int) -> dict[str, Sampler]:
    def ddim(held: Degradation, xT: Tensor, part: Tensor) -> Tensor:
        assert isinstance(held, HeldNoise), "of a noise degradation"
        return sample_ddim(restorer, held.noise, xT)

    def ddpm(held: Degradation, xT: Tensor, part: Tensor) -> Tensor:
        assert isinstance(held, HeldNoise), "of a noise degradation"
        draw = fresh_noise(seed, "evaluation ddpm", part.tolist(), xT)
        return sample_ddpm(restorer, held.noise, xT, draw)

    return {"sampled_ddim": ddim, "sampled_ddpm": ddpm}


def save_images(
    folder: RunFolder, stacked: dict[str, Tensor], labels: Tensor | None, count: int
) -> None:
    """The first ``count`` restorations as arrays, and a grid of the first few as a picture."""
    if count == 0:
        return
    kinds = tuple(stacked)
    arrays: dict[str, NDArray[Any]] = {name: to_uint8(stacked[name][:count]) for name in kinds}
    arrays["index"] = np.arange(len(arrays["original"]))
    if labels is not None:
        arrays["label"] = labels[:count].numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(folder.samples / "restorations.npz", buffer.getvalue())
    rows = [stacked[name][: min(GRID_IMAGES, count)] for name in kinds]
    save_grid(folder.samples / "restorations.png", rows)


def _bar(parts: tuple[Tensor, ...], name: str, progress: bool) -> Iterator[Tensor]:
    yield from tqdm(parts, desc=name, unit="batch", disable=None if progress else True)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
