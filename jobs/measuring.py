"""What follows a training: evaluation and images, where they are not there yet.

Heavy imports happen inside, as in :mod:`jobs.tasks`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from colddiff.config import EvaluationConfig, GenerationConfig
from colddiff.interruption import StopRequest
from colddiff.run_folder import RunFolder

log = logging.getLogger("colddiff.jobs")


def evaluate_run(
    folder: RunFolder, progress: bool, settings: EvaluationConfig, stop: StopRequest
) -> str:
    """Measure the run with these settings; its folder's path."""
    from colddiff.evaluation import evaluate, is_evaluated
    from colddiff.optimisation import resolve_device

    if is_evaluated(folder, settings):
        log.info("%s is evaluated with these settings already", folder.path.name)
    else:
        log.info("evaluating %s", folder.path.name)
        device = resolve_device(folder.config.training.device)
        with stop.immediate(folder.config.training.steps):
            evaluate(folder, settings, device, progress=progress)
    return str(folder.path)


def generate_sets(
    folder: RunFolder, progress: bool, sets: Sequence[GenerationConfig], stop: StopRequest
) -> None:
    """The sets that are not there yet; an interruption loses the one at work."""
    from colddiff.generation import generate
    from colddiff.optimisation import resolve_device

    device = resolve_device(folder.config.training.device)
    for settings in sets:
        if folder.is_generated(settings):
            log.info("%s has %s already", folder.path.name, settings.slug)
            continue
        log.info("generating %s", settings.slug)
        with stop.immediate(folder.config.training.steps):
            generate(folder, settings, device, progress=progress)
