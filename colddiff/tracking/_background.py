"""The thread that keeps MLflow up to date while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from colddiff.tracking import _contents as contents
from colddiff.tracking._push import PushReport, push
from colddiff.tracking._store import set_environment
from colddiff.uris import absolute_uri, mask_secrets

log = logging.getLogger(__name__)


class BackgroundSync:
    """A daemon thread that pushes a run folder every ``interval_s`` seconds.

    Nothing that the tracking store does, or fails to do, reaches the thread that trains. Logs one
    warning when an outage begins and one line when it is over.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        *,
        parent_run_id: str | None = None,
        interval_s: float = 5.0,
    ) -> None:
        self.folder = folder
        self.report: PushReport | None = None
        """Of the last push that succeeded."""
        self.error: Exception | None = None
        """Of the last push, if that failed."""
        self._uri = absolute_uri(uri)
        self._experiment = experiment
        self._parent_run_id = parent_run_id
        self._interval_s = interval_s
        self._pushed: frozenset[tuple[str, int, int]] = frozenset()
        """The folder's files when they were last pushed with success."""
        self._complete = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="colddiff-tracking", daemon=True)

    def start(self) -> None:
        """Start pushing; returns at once."""
        set_environment()
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Push once more, waiting at most ``timeout_s`` seconds; whether everything has arrived."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        complete = self._complete and not self._thread.is_alive()
        if not complete:
            log.warning(
                "%s has everything but MLflow does not yet: `python jobs/launch.py sync` sends it",
                self.folder,
            )
        return complete

    def _loop(self) -> None:
        last = False
        while not last:
            last = self._stopping.is_set()  # read before the push, which then has all up to stop()
            self._attempt(last)
            if not last:
                self._stopping.wait(self._interval_s)
        self._complete = self.error is None and self.report is not None

    def _attempt(self, last: bool) -> None:
        """Push, if something is new: many runs do not ask their server every few seconds."""
        try:
            # The first attempt's start, recorded there, is what the MLflow run is found by.
            if not (self.folder / "environment.json").exists():
                return
            found = contents.fingerprint(self.folder)  # before: a change meanwhile is seen again
            if found == self._pushed and not last:
                return
            self._pushed = frozenset()
            with _quiet_retries():
                self.report = push(
                    self.folder, self._uri, self._experiment, parent_run_id=self._parent_run_id
                )
            self._pushed = found
        # Blanket on purpose, and only here: whatever a store, a network or a disk raises is kept
        # and tried again, because it must neither stop the run nor lose what the run recorded.
        except Exception as error:  # noqa: BLE001
            if self.error is None:
                log.warning(
                    "tracking fails; the run goes on and is sent later: %s",
                    mask_secrets(f"{type(error).__name__}: {error}"),
                )
            self.error = error.with_traceback(None)  # whose frames would keep the store open
        else:
            if self.error is not None:
                log.info("MLflow at %s is back and up to date", mask_secrets(self._uri))
            self.error = None


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Silence urllib3's warning per retry in this thread: an outage is one warning of ours."""
    retries, thread = logging.getLogger("urllib3.connectionpool"), threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    retries.addFilter(of_others)
    try:
        yield
    finally:
        retries.removeFilter(of_others)
