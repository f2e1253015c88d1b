"""Train a run: open what that needs, write down how it ended.

The loop itself is :mod:`colddiff.trainer`.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Literal

from colddiff.batches import shared_size
from colddiff.interruption import Interrupted, StopRequest, StopSource
from colddiff.optimisation import resolve_device
from colddiff.profiling import StepProfiler
from colddiff.ranks import ALONE, Ranks, open_group
from colddiff.run_folder import RunFolder
from colddiff.trainer import Report, Trainer


def train(
    folder: RunFolder,
    *,
    ranks: Ranks = ALONE,
    stop: StopSource | None = None,
    report: Report | None = None,
    progress: bool = False,
    profile_steps: int = 0,
) -> None:
    """Train the folder's configuration to its last step, from wherever it stands.

    Args:
        folder: the run; holds the configuration and receives everything.
        ranks: this process among those that train the run together; each calls this function.
        stop: asked at each step boundary; where any rank's asks, the state is saved and all stop.
        report: see :data:`colddiff.trainer.Report`.
        progress: show a bar instead of one log line an interval, where there is a terminal.
        profile_steps: so many steps are profiled, see :class:`colddiff.profiling.StepProfiler`.

    Raises:
        Interrupted: after a save, where ``stop`` asked for it.
        NonFiniteError: naming the step range; checkpoints before it are kept.
        ValueError: for data that is absent, checkpoints that are all damaged, or a batch that the
            ranks cannot share.
        RuntimeError: where ranks stand at different checkpoints or have different data.
    """
    settings, before = folder.config.training, folder.status()
    shared_size(settings.batch_size, ranks.world_size)  # before anything is written
    step, trainer = (before.step if before else 0), None

    def write_status(state: Literal["interrupted", "failed"], message: str) -> None:
        if ranks.is_main:
            folder.write_status(state, trainer.step if trainer else step, settings.steps, message)

    try:
        with ExitStack() as stack:
            request = stack.enter_context(StopRequest() if stop is None else nullcontext(stop))
            device = resolve_device(settings.device, ranks.local_rank)
            group = stack.enter_context(open_group(ranks, device))
            trainer = Trainer(folder, folder.config, group)
            wanted = profile_steps if ranks.is_main else 0
            profiler = StepProfiler(folder, wanted, trainer.step, settings.steps, device)
            trainer.run(request, report, progress, stack.enter_context(profiler))
            signum = group.agree(request.signum)  # it may have come during the last step
    except (Interrupted, KeyboardInterrupt) as interruption:
        write_status("interrupted", str(interruption))
        raise
    except BaseException as error:
        write_status("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        if trainer and trainer.journal:
            trainer.journal.close()
    signum = signum or request.signum  # or while the ranks parted
    if signum is not None:  # what follows must not start
        raise Interrupted(settings.steps, signum)
