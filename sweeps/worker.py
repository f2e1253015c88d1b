"""One worker of a study: it takes trials and trains them, until as many are finished as wanted.

A trial is an ordinary run. Whoever holds its lease goes on from the run's last checkpoint, be that
the same job after a requeue or another one; the study is told once, by whoever came to the end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from colddiff.interruption import Interrupted, StopRequest
from colddiff.run_folder import RunFolder
from jobs import environment
from jobs.tasks import Task
from sweeps.lease import Holder
from sweeps.orphans import ORPHAN_AFTER_S

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from sweeps.desk import Desk
    from sweeps.study import StudyConfig

log = logging.getLogger("colddiff.sweeps")
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 5.0


def worker_name(study: str, number: int) -> str:
    """What the ledger calls a worker."""
    return f"{study}-worker-{number}"


@dataclass(frozen=True)
class WorkerTask(Task):
    """A worker of the study whose folder this is."""

    kind: ClassVar[str] = "worker"

    number: int = 0
    """Of the worker."""
    failed_before: int = 0
    """How many trials had failed when it was submitted."""
    orphan_after_s: float = ORPHAN_AFTER_S

    def __call__(self) -> str:
        """The study's folder, once the study is complete.

        A signal ends the process as its scheduler expects it; see :class:`jobs.tasks.Task`.
        """
        environment.set_up_logging()
        with StopRequest() as stop:
            log.info("%s", self.run)
            try:
                self.work_on(stop)
            except Interrupted as interruption:
                # Comes back outside a cluster.
                environment.leave(stop, interruption.signum, Path(self.folder).parents[1])
                raise
        return self.folder

    @property
    def run(self) -> str:
        """Name of the worker."""
        return worker_name(Path(self.folder).name, self.number)

    def work_on(self, stop: StopRequest) -> None:
        """Trial by trial, until the study is complete.

        Raises:
            Interrupted: where ``stop`` asks for it; what was begun is saved.
            TooManyFailuresError: naming the trials.
        """
        import optuna

        from sweeps.patience import Patience, wait
        from sweeps.record import Recorder
        from sweeps.study import open_study
        from sweeps.trial import carry_out

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config, ask = self.study_config(), Patience(stop)
        study = ask(lambda: open_study(config, self.number))
        recorder = Recorder(config, self.tracking_uri, self.experiment)
        desk, wait_s = self.desk(config, study), FIRST_WAIT_S
        while not ask(desk.is_complete):
            assignment = ask(desk.next) if stop.signum is None else None
            if assignment is None:  # the others work on the rest; one of them may be gone
                wait(wait_s, stop)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            wait_s = FIRST_WAIT_S
            parent = recorder.parent_run_id if config.space != "levels" else None
            carry_out(assignment, config, stop, functools.partial(self.sent, stop, parent))
            recorder.trial(ask(lambda: study.get_trials(deepcopy=False))[assignment.trial.number])
            recorder.study(study)
        # Each says so at its end: of whoever told the last trial it is not sure that it could.
        recorder.study(study, last=True)

    def study_config(self) -> StudyConfig:
        """The study as its file has it now: the number of trials may be raised."""
        from sweeps.study import StudyConfig

        return StudyConfig.from_json((Path(self.folder) / "study.json").read_text())

    def desk(self, config: StudyConfig, study: Study) -> Desk:
        """Where this worker gets its trials."""
        from sweeps.desk import Desk
        from sweeps.space import suggest

        return Desk(
            folder=Path(self.folder),
            study=study,
            me=Holder.here(self.run),
            target=lambda: self.study_config().trials,
            suggest=lambda trial: suggest(config.space, trial, config.base, config.keep),
            step_of=lambda frozen: saved_step(config, frozen),
            orphan_after_s=self.orphan_after_s,
            failed_before=self.failed_before,
        )

    @contextlib.contextmanager
    def sent(self, stop: StopRequest, parent_run_id: str | None, run: RunFolder) -> Iterator[None]:
        """Send a run's record to MLflow in the background, nested under the study's run."""
        if not self.tracking_uri:
            yield
            return
        from colddiff.tracking import BackgroundSync

        sync = BackgroundSync(
            run.path, self.tracking_uri, self.experiment, parent_run_id=parent_run_id
        )
        sync.start()
        try:
            yield
        finally:
            sync.stop(environment.seconds_to_leave(stop.signum))


def saved_step(config: StudyConfig, trial: FrozenTrial) -> int:
    """The step of the last checkpoint of a trial's run."""
    from colddiff.checkpoint import checkpoints

    run = trial.user_attrs.get("run")
    saved = checkpoints(RunFolder(Path(config.runs) / run).checkpoints) if run else []
    return int(saved[-1].stem.removeprefix("step-")) if saved else 0
