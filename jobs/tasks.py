"""The work of one job, picklable: a run folder's path and where to show it, never tensors.

Everything else stands in the run folder. Heavy imports happen inside, when the job runs: the
launcher stays quick, and on a cluster the signal handlers are installed before torch is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from filelock import AcquireReturnProxy, FileLock, Timeout

from colddiff.config import EvaluationConfig, GenerationConfig
from colddiff.files import write_json
from colddiff.interruption import Interrupted, StopRequest
from colddiff.ranks import Ranks
from colddiff.run_folder import RunFolder
from colddiff.schema import build
from jobs import environment
from jobs.measuring import evaluate_run, generate_sets

if TYPE_CHECKING:
    import submitit

log = logging.getLogger("colddiff.jobs")
REQUEUED_CLAIM_S = 150.0
"""A lost node's lock on a network file system outlives it by a lease of up to 90 s."""


class AlreadyRunningError(RuntimeError):
    """Another process works on this run."""


@dataclass(frozen=True)
class Task:
    """Something to do for one run, tracked while it is done."""

    kind: ClassVar[str] = ""

    folder: str
    """The run folder, absolute."""
    tracking_uri: str = ""
    """Empty: the record stays in the folder, for ``launch.py sync`` to send."""
    experiment: str = "colddiff"
    progress: bool = False

    def __call__(self) -> str:
        """The path of what was made.

        On a cluster a signal ends the process as the scheduler expects it, see
        :func:`jobs.environment.leave`; elsewhere it raises ``Interrupted``, after a save.
        """
        environment.set_up_logging()
        with StopRequest() as stop:
            ranks = environment.ranks()
            folder = RunFolder.find(Path(self.folder))
            if environment.in_submitit():  # its log goes on over requeues: a new attempt starts
                log.info("%s %s", self.kind, folder.path.name)
            try:
                if not ranks.is_main:
                    return self.assist(folder, stop, ranks)
                with self.claimed(folder, stop):
                    self.introduce(folder)
                    with self.tracked(folder, stop):
                        return self.work(folder, stop, ranks)
            except Interrupted as interruption:
                # Comes back outside a cluster.
                environment.leave(stop, interruption.signum, folder.path.parent)
                raise

    @property
    def run(self) -> str:
        """Name of the run."""
        return Path(self.folder).name

    def claimed(self, folder: RunFolder, stop: StopRequest) -> AcquireReturnProxy[Any]:
        """The run's lock, which other work on the run may hold for long: this one is next.

        Raises:
            Interrupted: where ``stop`` asks for it meanwhile.
        """
        waiting = False
        while True:
            try:
                return claim(folder, timeout_s=1.0)
            except AlreadyRunningError as error:
                if not waiting:
                    log.info("waiting: %s", error)
                waiting = True
            if stop.signum is not None:
                raise Interrupted(folder.config.training.steps, stop.signum)

    def work(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """What subclasses do on rank 0."""
        raise NotImplementedError

    def assist(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """What the other ranks do."""
        return self.folder

    def introduce(self, folder: RunFolder) -> None:
        """Say which process works on the run, for ``status`` and ``cancel``; true while locked."""
        write_json(folder.path / "process.json", environment.process() | {"kind": self.kind})

    @contextlib.contextmanager
    def tracked(self, folder: RunFolder, stop: StopRequest) -> Iterator[None]:
        """Send the run folder's record to MLflow in the background, and its rest at the end."""
        if not self.tracking_uri:
            yield
            return
        from colddiff.tracking import BackgroundSync

        sync = BackgroundSync(folder.path, self.tracking_uri, self.experiment)
        sync.start()
        try:
            yield
        finally:
            sync.stop(environment.seconds_to_leave(stop.signum))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same task. The state is on disk already."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :func:`from_dict` reads them back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class TrainTask(Task):
    """Train a run to its end from wherever it stands, then evaluate it and generate its images."""

    kind: ClassVar[str] = "train"

    evaluate: bool = True
    profile_steps: int = 0
    """Training steps to profile, once, however often the job is requeued."""

    def claimed(self, folder: RunFolder, stop: StopRequest) -> AcquireReturnProxy[Any]:
        """The run's lock; whoever holds it does the same work, so there is nothing to wait for.

        Raises:
            AlreadyRunningError: where another process holds it.
        """
        return claim(folder, REQUEUED_CLAIM_S if environment.restarts() else 5.0)

    def work(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """The run folder's path."""
        self.assist(folder, stop, ranks)
        if not self.evaluate:
            return self.folder
        made = evaluate_run(folder, self.progress, folder.config.evaluation, stop)
        generate_sets(folder, self.progress, folder.config.generation, stop)
        return made

    def assist(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """Every rank's part of the training."""
        from colddiff.training import train

        if not folder.is_trained:
            done = environment.restarts() and folder.profile_table.exists()
            wanted = 0 if done else self.profile_steps
            train(folder, ranks=ranks, stop=stop, progress=self.progress, profile_steps=wanted)
        return self.folder


@dataclass(frozen=True)
class EvaluateTask(Task):
    """Measure a trained run, whose configuration then has these settings; generate its images."""

    kind: ClassVar[str] = "evaluate"

    evaluation: EvaluationConfig = EvaluationConfig()

    def work(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """The run folder's path."""
        made = evaluate_run(folder, self.progress, self.evaluation, stop)
        folder.update(dataclasses.replace(folder.config, evaluation=self.evaluation))
        generate_sets(folder, self.progress, folder.config.generation, stop)
        return made


@dataclass(frozen=True)
class GenerateTask(Task):
    """Generate images from a trained run."""

    kind: ClassVar[str] = "generate"

    settings: GenerationConfig = GenerationConfig()

    def work(self, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> str:
        """The array file's path."""
        generate_sets(folder, self.progress, (self.settings,), stop)
        return str(folder.samples / f"{self.settings.slug}.npz")


@dataclass(frozen=True)
class ReportTask:
    """The paper's table and figure of an experiment, from MLflow."""

    kind: ClassVar[str] = "report"

    run: str
    """What the ledger calls it."""
    tracking_uri: str
    experiment: str
    preset: str
    """Only runs of this preset; empty for all."""
    out: str
    """Folder for the results."""
    runs: tuple[str, ...] = ()
    """The runs that it was made for; the table has whatever is in the experiment by then."""
    reports: tuple[str, ...] = ("table1", "figure3")
    """Modules of ``analysis``."""

    def __call__(self) -> str:
        """The results' folder; raises ``CalledProcessError`` where one cannot be made."""
        environment.set_up_logging()
        if not environment.ranks().is_main:
            return self.out
        options = {
            "--experiment": self.experiment,
            "--preset": self.preset,
            "--tracking-uri": self.tracking_uri,
            "--out": self.out,
        }
        words = [word for option in options.items() if option[1] for word in option]
        for module in self.reports:
            # As processes: jobs know nothing of what analyses them.
            subprocess.run([sys.executable, "-m", f"analysis.{module}", *words], check=True)
        return self.out

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :func:`from_dict` reads them back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


AnyTask = Task | ReportTask


def from_dict(values: dict[str, Any]) -> AnyTask:
    """The task of :meth:`Task.to_dict`; raises ``ValueError`` for what is none."""
    kinds: dict[str, type[AnyTask]] = {
        each.kind: each for each in (TrainTask, EvaluateTask, GenerateTask, ReportTask)
    }
    kind = values.get("kind")
    if kind not in kinds:
        raise ValueError(f"task kind {kind!r} is none of {', '.join(kinds)}")
    return build(kinds[kind], {name: value for name, value in values.items() if name != "kind"})


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
