"""New images from nothing: a start near x_T, then a sampler (paper, section 5)."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from colddiff.batches import to_batch
from colddiff.config import GenerationConfig, RunConfig
from colddiff.data import load_images
from colddiff.degradation import Noise, Process, build_degradation
from colddiff.diffusion import SAMPLERS
from colddiff.evaluation import load_restorer
from colddiff.files import read_json, write_atomic, write_json
from colddiff.hot_samplers import fresh_noise, sample_ddim, sample_ddpm
from colddiff.images import save_grid, to_float, to_uint8
from colddiff.levels import parse_levels
from colddiff.machine import git_dirty, git_sha
from colddiff.prior import MeanPrior, TerminalPrior, break_symmetry, real_terminals
from colddiff.quality import generation_quality
from colddiff.randomness import generator
from colddiff.restorer import Restorer
from colddiff.run_folder import RunFolder

GRID = (10, 10)
FITTED = 10_000
"""Training images that the start is fitted to."""


@torch.no_grad()
def generate(
    folder: RunFolder,
    settings: GenerationConfig,
    device: torch.device,
    *,
    progress: bool = False,
    measured: bool = True,
) -> Path:
    """Generate images; write ``samples/<slug>.npz`` (uint8 ``images``, n h w c), .png and .json.

    The last, where ``measured``, has the settings, what it took and, of digits, how good they are.
    Images that were made before and lack that are measured, not made again. Returns the array
    file's path.

    Raises:
        ValueError: for a run that is not trained, absent data, levels or a sampler that do not fit.
    """
    settings.check_for(folder.config.degradation, folder.config.training)
    restorer, config, step = load_restorer(folder, device, settings.weights, settings.step)
    T = config.degradation.T
    levels = parse_levels(settings.levels) if settings.levels else tuple(range(T, -1, -1))
    degradation = build_degradation(config.degradation, config.data.image_size).to(device)
    start = starting_states(config, settings, degradation, device)
    path = folder.samples / f"{settings.slug}.npz"
    images, record = _made_before(path, step)
    if not record:
        clock = time.perf_counter()
        images = _sampled(restorer, degradation, start, settings, levels, device, progress)
        record = {
            "settings": dataclasses.asdict(settings),
            "levels": levels,
            "network_calls": len(levels) - 1,
            "sampling_seconds": round(time.perf_counter() - clock, 3),
            "device": str(device),
            "step": step,
            "git_sha": git_sha(),
            "git_dirty": git_dirty(),
        }
        _save_images(path, images, settings)
    if measured:
        quality = None
        if config.data.has_digits and len(images) > 1:
            told = None if isinstance(degradation, Noise) else start.mean(dim=(1, 2, 3))
            quality = dataclasses.asdict(generation_quality(to_float(images), config, device, told))
        code = {"measured_git_sha": git_sha(), "measured_git_dirty": git_dirty()}
        write_json(path.with_suffix(".json"), record | {"quality": quality} | code)
    return path


def _sampled(
    restorer: Restorer,
    degradation: Process,
    start: Tensor,
    settings: GenerationConfig,
    levels: Sequence[int],
    device: torch.device,
    progress: bool,
) -> NDArray[np.uint8]:
    """Grey levels from ``start``, ``n h w c``; the memory for more is that of one part."""
    made, first = [], 0
    parts = torch.split(start, settings.batch_size)
    for xT in tqdm(parts, desc="generate", disable=None if progress else True):
        sample = _sampler(settings, degradation, restorer, range(first, first + len(xT)))
        made.append(to_uint8(sample(xT.to(device), levels)))
        first += len(xT)
    return np.concatenate(made)


def _made_before(path: Path, step: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The images of a record that is of the same weights, and the record; empty where none is."""
    try:
        record: dict[str, Any] = read_json(path.with_suffix(".json"))
        with np.load(path) as arrays:
            images: NDArray[np.uint8] = arrays["images"]
    except FileNotFoundError:
        return np.empty(0, np.uint8), {}
    return (images, record) if record["step"] == step else (images, {})


def _save_images(path: Path, images: NDArray[np.uint8], settings: GenerationConfig) -> None:
    """The array file, and a grid of the first of them."""
    buffer = io.BytesIO()
    described = json.dumps(dataclasses.asdict(settings))
    np.savez_compressed(buffer, images=images, settings=np.array(described))
    write_atomic(path, buffer.getvalue())
    shown = to_float(images[: GRID[0] * GRID[1]])
    rows = list(torch.split(shown, GRID[1]))
    if len(rows[-1]) < len(rows[0]):
        blank = rows[0].new_full((len(rows[0]) - len(rows[-1]), *rows[0].shape[1:]), 1.0)
        rows[-1] = torch.cat((rows[-1], blank))
    save_grid(path.with_suffix(".png"), rows)


def _sampler(
    settings: GenerationConfig,
    degradation: Process,
    restorer: Restorer,
    indices: range,
) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """From x_T of the images ``indices`` and levels to x0."""
    if not isinstance(degradation, Noise):
        paper = SAMPLERS[settings.algorithm]
        return lambda xT, levels: paper(restorer, degradation, xT, levels)
    match settings.algorithm:
        case "ddim":
            return lambda xT, levels: sample_ddim(restorer, degradation, xT, levels)
        case "ddpm":

            def ancestral(xT: Tensor, levels: Sequence[int]) -> Tensor:
                draw = fresh_noise(settings.seed, "ddpm", indices, xT)
                return sample_ddpm(restorer, degradation, xT, draw, levels)

            return ancestral
    held = SAMPLERS[settings.algorithm]
    # The noise it starts from is held: at T almost nothing else is there.
    return lambda xT, levels: held(restorer, degradation.hold(xT), xT, levels)


def starting_states(
    config: RunConfig,
    settings: GenerationConfig,
    degradation: Process,
    device: torch.device,
) -> Tensor:
    """x_T for every image, ``n c h w`` on the CPU."""
    size, n, seed = config.data.image_size, settings.n, settings.seed
    if isinstance(degradation, Noise):
        source = generator(seed, "start")
        return torch.randn(n, config.data.channels, size, size, generator=source)
    images = load_images(config.data, "train")
    chosen = torch.randperm(len(images), generator=generator(seed, "start"))
    chosen = chosen[: n if settings.start == "real" else FITTED].sort().values
    x0 = to_batch(images.take(chosen), config.data)

    def terminal(x: Tensor) -> Tensor:
        return torch.cat([degradation.terminal(p.to(device)).cpu() for p in x.split(500)])

    match settings.start:
        case "real":
            start = real_terminals(terminal, x0, n, seed)
        case "terminals":
            start = TerminalPrior.fit(terminal(x0), settings.components, seed).sample(n, seed)
        case "means":
            means = MeanPrior.fit(x0.mean(dim=(-2, -1)), settings.components, seed)
            start = means.sample(n, size, size, seed)
    return break_symmetry(start, settings.symmetry_noise, seed)
