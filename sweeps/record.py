"""A study's record in MLflow: one parent run, its trials nested below it.

As with runs, the folder and the study's storage are the truth and MLflow is a view of them: all of
it can be sent again, by any worker, at any time, and what is there already is not sent twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from colddiff.machine import git_sha
from colddiff.tracking import TrackingError, initialise_store, open_client, push, store_errors
from colddiff.uris import absolute_uri, mask_secrets
from sweeps import contents, sending
from sweeps.storage import failures
from sweeps.study import read_study, study_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from optuna import Study
    from optuna.trial import FrozenTrial

    from sweeps.study import StudyConfig

log = logging.getLogger("colddiff.sweeps")
LOCK_TIMEOUT_S = 60.0
SHARE = 20
"""A study is recorded for at most one part in so many of a worker's time."""
RETRY_S = 300.0
"""How long a worker goes on without MLflow when that has failed."""


def parent_run(config: StudyConfig, uri: str, experiment: str) -> str:
    """MLflow's id of the study's run, which is found by its tag or created, by one process only.

    Raises:
        ValueError: if the experiment is deleted.
        TrackingError: if the store cannot be reached or refuses.
    """
    with _tracked(config, uri) as client:
        experiment_id = initialise_store(uri, experiment)
        identity = {"colddiff.study": config.name, "colddiff.study_id": study_id(config)}
        tags = identity | {"colddiff.kind": "study", "colddiff.git_sha": git_sha()}
        run = sending.find_or_create(client, experiment_id, identity, tags, config.name)
        sending.add_params(client, run, contents.params(config))
        return str(run.info.run_id)


def record_study(
    study: Study, config: StudyConfig, uri: str, parent_run_id: str, *, working: bool = True
) -> None:
    """Bring the study's run up to date: best values so far, counts, status, artifacts, a picture.

    Its status is FINISHED once as many trials are finished as ``config`` asks for; before that
    RUNNING or, where nobody is ``working`` on it, KILLED.

    Raises:
        TrackingError: if the store cannot be reached or refuses.
    """
    with _tracked(config, uri) as client:
        # Read under the lock: of two workers, the second one's state is the newer.
        record = contents.study_record(study, config)
        run = client.get_run(parent_run_id)
        sending.send_progress(client, run, record)
        sending.send_status(client, run, record, working=working)
        # Last, because the rest must arrive even where artifacts cannot be stored.
        sending.send_artifacts(client, run, record, study, config)


def record_trial(
    trial: FrozenTrial, config: StudyConfig, uri: str, experiment: str, parent_run_id: str
) -> None:
    """Bring a trial's run up to date, nested under the study's: its number, state and values.

    A run that several trials share has all their numbers, and a value at the step of each. Where
    the run need not be the study's, each trial gets an entry of its own instead: in the space
    ``levels``, and where another study has nested it already.

    Raises:
        ValueError: if its run folder is corrupt.
        TrackingError: if the store cannot be reached or refuses.
    """
    name = trial.user_attrs.get("run")
    folder = Path(config.runs) / str(name)
    if name is None or not (folder / "environment.json").exists():
        return  # it failed before its run began: trials.json has the reason
    if config.space == "levels":
        with _tracked(config, uri) as client:
            experiment_id = initialise_store(uri, experiment)
            run = sending.entry(client, experiment_id, trial, config, parent_run_id)
            sending.describe(client, run, trial, config)
            return
    pushed = push(folder, uri, experiment, parent_run_id=parent_run_id)
    with _tracked(config, uri) as client:
        run = client.get_run(pushed.mlflow_run_id)
        if run.data.tags.get("mlflow.parentRunId") != parent_run_id:  # another study has it
            run = sending.entry(client, pushed.experiment_id, trial, config, parent_run_id)
        sending.describe(client, run, trial, config)


def record_all(
    study: Study, config: StudyConfig, uri: str, experiment: str, *, working: bool = True
) -> str:
    """Send everything of a study, for one whose workers were offline; MLflow's id of its run.

    Raises:
        ValueError, TrackingError: as the functions above.
    """
    parent_run_id = parent_run(config, uri, experiment)
    for trial in study.get_trials(deepcopy=False):
        record_trial(trial, config, uri, experiment, parent_run_id)
    record_study(study, config, uri, parent_run_id, working=working)
    return parent_run_id


def untold(study: Study, config: StudyConfig, uri: str, parent_run_id: str) -> list[FrozenTrial]:
    """Finished trials that no run below the study's names.

    Raises:
        TrackingError: if the store cannot be reached or refuses.
    """
    with _tracked(config, uri) as client:
        known = sending.numbers_below(client, parent_run_id)
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in known]


class Recorder:
    """A worker's way to MLflow: what fails is said, once, and tried again; it stops no worker."""

    def __init__(self, config: StudyConfig, uri: str, experiment: str) -> None:
        self._config = config
        self._uri = uri
        self._experiment = experiment
        self._parent_run_id: str | None = None
        self._unsent: list[FrozenTrial] = []
        self._failing = False
        self._next = 0.0

    @property
    def parent_run_id(self) -> str | None:
        """Of the study; None where nothing is sent, or MLflow does not answer."""
        if self._uri and self._parent_run_id is None and time.monotonic() >= self._next:
            self._tolerantly(self._open)
        return self._parent_run_id

    def trial(self, trial: FrozenTrial) -> None:
        """Send a trial that was just told, and those that could not be sent before."""
        if self._uri:
            self._unsent.append(trial)
            if time.monotonic() >= self._next or not self._failing:
                self._tolerantly(self._send_trials)

    def study(self, study: Study, *, last: bool = False) -> None:
        """Send the study's state, unless that was done just now; the ``last`` time always."""
        if self._uri and (last or time.monotonic() >= self._next):
            self._tolerantly(lambda: self._send_study(study, last))

    def _open(self) -> str:
        if self._parent_run_id is None:
            self._parent_run_id = parent_run(self._config, self._uri, self._experiment)
        return self._parent_run_id

    def _send_trials(self) -> None:
        parent = self._open()
        while self._unsent:
            record_trial(self._unsent[0], self._config, self._uri, self._experiment, parent)
            del self._unsent[0]

    def _send_study(self, study: Study, last: bool) -> None:
        began = time.monotonic()
        self._send_trials()
        if last:  # a worker that was killed told the study of trials, and perhaps nobody else
            for trial in untold(study, self._config, self._uri, self._open()):
                record_trial(trial, self._config, self._uri, self._experiment, self._open())
        config = read_study(Path(self._config.runs), self._config.name)  # it may have been raised
        record_study(study, config, self._uri, self._open())
        now = time.monotonic()
        self._next = now + SHARE * (now - began)

    def _tolerantly(self, send: Callable[[], object]) -> None:
        kinds: tuple[type[Exception], ...] = (TrackingError, OSError, ValueError, *failures())
        try:
            send()
        except kinds as error:
            self._next = time.monotonic() + RETRY_S
            if not self._failing:
                log.warning(
                    "MLflow has not the study yet, which goes on: %s", mask_secrets(str(error))
                )
            self._failing = True
        else:
            self._failing = False


@contextlib.contextmanager
def _tracked(config: StudyConfig, uri: str) -> Iterator[MlflowClient]:
    """A client, while no other worker writes the study's record."""
    uri = absolute_uri(uri)
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.folder / ".tracking.lock", timeout=LOCK_TIMEOUT_S)
    with store_errors(uri), lock:
        yield open_client(uri)
