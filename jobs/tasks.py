"""The work of one job, picklable: a run folder's path and where to show it, never tensors.

Everything else stands in the run folder. Heavy imports happen inside, when the job runs: the
launcher stays quick, and on a cluster the signal handlers are installed before torch is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from filelock import AcquireReturnProxy, FileLock, Timeout

from colddiff.config import EvaluationConfig, GenerationConfig
from colddiff.interruption import Interrupted
from colddiff.run_folder import RunFolder

log = logging.getLogger("colddiff.jobs")


class AlreadyRunningError(RuntimeError):
    """Another process works on this run."""


@dataclass(frozen=True)
class Task:
    """Something to do for one run, tracked while it is done."""

    folder: str
    tracking_uri: str
    experiment: str
    progress: bool = False

    def __call__(self) -> str:
        """The path of what was made; raises ``Interrupted`` after a save where a signal asked."""
        folder = RunFolder.find(Path(self.folder))
        with claim(folder), self.tracked(folder):
            return self.work(folder)

    def work(self, folder: RunFolder) -> str:
        """What subclasses do."""
        raise NotImplementedError

    @contextlib.contextmanager
    def tracked(self, folder: RunFolder) -> Iterator[None]:
        """Send the run folder's record to MLflow in the background, and its rest at the end."""
        from colddiff.tracking import BackgroundSync

        sync = BackgroundSync(folder.path, self.tracking_uri, self.experiment)
        sync.start()
        try:
            yield
        finally:
            sync.stop()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same task. The state is on disk already."""
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class TrainTask(Task):
    """Train a run to its end from wherever it stands, then evaluate it."""

    evaluate: bool = True

    def work(self, folder: RunFolder) -> str:
        """The run folder's path."""
        from colddiff.training import train

        if not folder.is_trained:
            train(folder, progress=self.progress)
        if not self.evaluate:
            return self.folder
        return _evaluate(folder, self.progress, folder.config.evaluation)


@dataclass(frozen=True)
class EvaluateTask(Task):
    """Measure a trained run; its configuration then has these settings."""

    evaluation: EvaluationConfig = EvaluationConfig()

    def work(self, folder: RunFolder) -> str:
        """The run folder's path."""
        made = _evaluate(folder, self.progress, self.evaluation)
        folder.update(dataclasses.replace(folder.config, evaluation=self.evaluation))
        return made


@dataclass(frozen=True)
class GenerateTask(Task):
    """Generate images from a trained run."""

    settings: GenerationConfig = GenerationConfig()

    def work(self, folder: RunFolder) -> str:
        """The array file's path."""
        from colddiff.generation import generate
        from colddiff.optimisation import resolve_device

        device = resolve_device(folder.config.training.device)
        return str(generate(folder, self.settings, device, progress=self.progress))


@dataclass(frozen=True)
class TaskList:
    """Several tasks, one after the other; a failed one does not stop the others."""

    tasks: tuple[Callable[[], str], ...]

    def __call__(self) -> list[str]:
        """What each task made; raises ``RuntimeError`` with the number of failures."""
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("colddiff").setLevel(logging.INFO)
        made, failed = [], 0
        for task in self.tasks:
            try:
                made.append(task())
            except Interrupted:
                raise
            except AlreadyRunningError as error:
                log.info("%s; left to it", error)  # launched twice: the other one does it
            except Exception:  # noqa: BLE001  # one run's failure must not take the others along
                log.exception("%s failed", task)
                failed += 1
        if failed:
            raise RuntimeError(f"{failed} of {len(self.tasks)} tasks failed: see above")
        return made

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same list: finished runs are found finished."""
        return submitit.helpers.DelayedSubmission(self)


def claim(folder: RunFolder, timeout_s: float = 5.0) -> AcquireReturnProxy[Any]:
    """The run's lock, held until the ``with`` block ends, or the process, however that ends.

    Waits a little, because ``status`` looks at locks by taking them for a moment.

    Raises:
        AlreadyRunningError: where another process holds it.
    """
    try:
        return FileLock(folder.lock).acquire(timeout=timeout_s)
    except Timeout:
        raise AlreadyRunningError(
            f"{folder.path.name} is being worked on by another process: "
            "see python jobs/launch.py status"
        ) from None


def is_claimed(folder: RunFolder) -> bool:
    """Whether some process works on this run now."""
    if not folder.lock.exists():
        return False
    try:
        with claim(folder, timeout_s=0):
            return False
    except AlreadyRunningError:
        return True


def _evaluate(folder: RunFolder, progress: bool, settings: EvaluationConfig) -> str:
    from colddiff.evaluation import evaluate, is_evaluated
    from colddiff.optimisation import resolve_device

    if is_evaluated(folder, settings):
        log.info("%s is evaluated with these settings already", folder.path.name)
    else:
        log.info("evaluating %s", folder.path.name)
        device = resolve_device(folder.config.training.device)
        evaluate(folder, settings, device, progress=progress)
    return str(folder.path)
