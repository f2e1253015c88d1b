"""What a study optimises, measured on a trained run: never on the test split.

restoration: the sampled restoration (Algorithm 2) of the validation images. direct: their direct
restoration R(x_T, T). generation: FID(digits) of generated digits against training images. pareto:
that FID, and the network calls an image costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from colddiff.config import RunConfig
from colddiff.files import read_json, write_json
from colddiff.levels import check_levels, parse_levels
from colddiff.machine import git_dirty, git_sha
from colddiff.run_folder import RunFolder

if TYPE_CHECKING:
    from colddiff.interruption import StopRequest
    from sweeps.study import StudyConfig

ObjectiveName = Literal["restoration", "direct", "generation", "pareto"]
RESTORING: tuple[ObjectiveName, ...] = ("restoration", "direct")
"""The objectives on validation images, which have a metric."""
Metric = Literal["rmse", "ssim"]
Direction = Literal["minimize", "maximize"]


def directions(objective: ObjectiveName, metric: Metric = "rmse") -> list[Direction]:
    """Of each value: minimize or maximize, as Optuna says it."""
    match objective:
        case "restoration" | "direct":
            return ["maximize" if metric == "ssim" else "minimize"]
        case "generation":
            return ["minimize"]
        case "pareto":
            return ["minimize", "minimize"]


def value_names(objective: ObjectiveName, metric: Metric = "rmse") -> list[str]:
    """Of each value: what it is, for tables and figures."""
    match objective:
        case "restoration":
            return [f"sampled {metric.upper()} (validation)"]
        case "direct":
            return [f"direct {metric.upper()} (validation)"]
        case "generation":
            return ["FID(digits), generated"]
        case "pareto":
            return ["FID(digits), generated", "network calls"]


def intermediate(
    objective: ObjectiveName, metrics: Mapping[str, float], metric: Metric = "rmse"
) -> float | None:
    """What of a journal record is reported for pruning, None where there is nothing.

    The direct restoration of the validation images, by the metric with the study's direction. It
    only stands in for the objective, which would be too slow to measure while training.
    """
    if objective == "pareto":  # Optuna does not prune with several objectives
        return None
    similar = objective in RESTORING and metric == "ssim"
    return metrics.get("validation/ssim" if similar else "validation/rmse")


def measure(
    folder: RunFolder,
    study: StudyConfig,
    stop: StopRequest | None = None,
    config: RunConfig | None = None,
) -> tuple[float, ...]:
    """The values of the study's objective for a trained run; kept in its folder.

    The sampler visits the first list of ``evaluation.levels``, all levels where there is none, of
    ``config``: the trial's. (Trials of the space ``levels`` share one folder, whose own
    configuration cannot say it; without ``config`` that one holds.) A signal ends the work at once.

    Raises:
        Interrupted: where ``stop`` was asked to; nothing is half done.
        ValueError: for a run that is not trained, and absent data.
    """
    own = folder.config
    config = own if config is None else config
    T = own.degradation.T
    levels = sampled_levels(config, T)
    kind = study.objective if study.objective in RESTORING else "generation"
    settings = _settings(folder, study, kind, levels)
    found = _kept(folder, settings)
    if found is None:
        step = own.training.steps
        with stop.immediate(step) if stop is not None else contextlib.nullcontext():
            found = (
                _generation(folder, study, levels)
                if kind == "generation"
                else _restoration(folder, levels if kind == "restoration" else None)
            )
            _keep(folder, settings, found)
    match study.objective:
        case "restoration" | "direct":
            return (found[study.metric],)
        case "generation":
            return (found["fid_digits"],)
        case "pareto":
            return (found["fid_digits"], float(len(levels) - 1))


def sampled_levels(config: RunConfig, T: int) -> tuple[int, ...]:
    """The levels that the objective's sampler visits; raises ``ValueError`` for another T's."""
    lists = config.evaluation.levels
    levels = parse_levels(lists[0]) if lists else tuple(range(T, -1, -1))
    check_levels(levels, T)
    return levels


def _settings(
    folder: RunFolder, study: StudyConfig, kind: str, levels: tuple[int, ...]
) -> dict[str, Any]:
    """What defines the measured values, beside the run."""
    settings: dict[str, Any] = {"kind": kind, "run": folder.config.run_id}
    if kind != "direct":
        settings["levels"] = "-".join(map(str, levels))
    if kind in RESTORING:
        return settings | {"split": "validation", "samples": folder.config.data.validation}
    generation = dataclasses.asdict(study.generation)
    del generation["batch_size"], generation["levels"]
    from colddiff.collapse import REFERENCE_IMAGES

    return settings | {"generation": generation, "training_images": REFERENCE_IMAGES}


def _file(folder: RunFolder, settings: Mapping[str, Any]) -> Any:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder.path / f"objective-{digest}.json"


def _kept(folder: RunFolder, settings: Mapping[str, Any]) -> dict[str, float] | None:
    try:
        kept = read_json(_file(folder, settings))
    except FileNotFoundError:
        return None
    return dict(kept["values"]) if kept["settings"] == settings else None


def _keep(folder: RunFolder, settings: Mapping[str, Any], values: Mapping[str, float]) -> None:
    code = {"git_sha": git_sha(), "git_dirty": git_dirty()}
    write_json(_file(folder, settings), {"settings": settings, "values": values} | code)


def _restoration(folder: RunFolder, levels: tuple[int, ...] | None) -> dict[str, float]:
    """RMSE and SSIM from x_T on the images that training kept back.

    By Algorithm 2 over ``levels``, or directly without.
    """
    import torch

    from colddiff import metrics
    from colddiff.batches import to_batch
    from colddiff.data import load_images, split_validation
    from colddiff.degradation import build_degradation
    from colddiff.diffusion import restore_directly, sample_algorithm2
    from colddiff.evaluation import hold, load_restorer
    from colddiff.optimisation import resolve_device

    device = resolve_device(folder.config.training.device)
    restorer, config, _ = load_restorer(folder, device)
    data, settings = config.data, config.training
    _, images = split_validation(load_images(data, "train"), data.validation, settings.batch_size)
    if images is None:
        raise ValueError(
            f"data.validation = {data.validation} is not allowed for this objective: it must be at "
            "least 1, and the test split is not for optimising"
        )
    degradation = build_degradation(config.degradation, data.image_size).to(device)
    originals, restored = [], []
    with torch.no_grad():
        for part in torch.split(torch.arange(len(images)), config.evaluation.batch_size):
            x0 = to_batch(images.take(part), data).to(device)
            held = hold(degradation, x0, settings.seed, part)
            xT = held.terminal(x0)
            x0_hat = (
                restore_directly(restorer, xT, held.T)
                if levels is None
                else sample_algorithm2(restorer, held, xT, levels)
            )
            originals.append(x0.cpu())
            restored.append(x0_hat.float().clamp(-1, 1).cpu())
    x0, x0_hat = torch.cat(originals), torch.cat(restored)
    return {"rmse": metrics.rmse(x0_hat, x0), "ssim": metrics.ssim(x0_hat, x0)}


def _generation(folder: RunFolder, study: StudyConfig, levels: tuple[int, ...]) -> dict[str, float]:
    """FID(digits) of generated images, which are kept among the run's samples."""
    import numpy as np

    from colddiff.generation import generate
    from colddiff.images import to_float
    from colddiff.optimisation import resolve_device
    from colddiff.quality import distance_to_training

    config = folder.config
    device = resolve_device(config.training.device)
    T = config.degradation.T
    every = levels == tuple(range(T, -1, -1))
    text = "" if every else "-".join(map(str, levels))
    settings = dataclasses.replace(study.generation, levels=text)
    # Measured here alone: all that is measured elsewhere draws lines by test images.
    path = generate(folder, settings, device, measured=False)
    with np.load(path) as arrays:
        images = to_float(arrays["images"])
    return {"fid_digits": distance_to_training(images, config, device)}
