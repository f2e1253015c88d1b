"""Several processes at once, and a server that goes away."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tracking_helpers import (
    append,
    assert_exactly_the_journal,
    only_run,
    run_folder,
    runs,
    set_state,
)

from colddiff.files import write_atomic, write_json
from colddiff.journal import Journal
from colddiff.tracking import BackgroundSync, PushReport, initialise_store, push
from colddiff.tracking import _contents as contents

WAIT_S = 60


def until(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Race:
    """Four processes opened one fresh store together, then pushed a, b, c and c together."""

    uri: str
    experiments: list[str]
    folders: list[Path]
    pushed: list[str]


def race(uri, folder, barrier, answers) -> None:
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  before the start: it takes seconds

    barrier.wait(WAIT_S)
    experiment_id = initialise_store(uri, "test")
    barrier.wait(WAIT_S)
    answers.put((experiment_id, str(folder), push(folder, uri, "test").mlflow_run_id))


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> Race:
    place = tmp_path_factory.mktemp("race")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    folders = [run_folder(place / name, records=400, started_ms=ord(name)) for name in "abc"]
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=race, args=(uri, folder, barrier, answers))
        for folder in [*folders, folders[-1]]
    ]
    for process in processes:
        process.start()
    results = sorted((answers.get(timeout=WAIT_S) for _ in processes), key=lambda r: r[1])
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0
    return Race(uri, [r[0] for r in results], folders, [r[2] for r in results])


def test_four_processes_initialise_a_fresh_store(raced):
    assert len(set(raced.experiments)) == 1


def test_runs_pushed_at_once_are_all_complete(raced):
    for folder, run_id in zip(raced.folders, raced.pushed[:3], strict=True):
        assert_exactly_the_journal(folder, raced.uri, run_id)


def test_one_folder_pushed_twice_at_once_is_one_run(raced):
    assert raced.pushed[2] == raced.pushed[3]
    assert {run.info.run_id for run in runs(raced.uri)} == set(raced.pushed)


def test_background_sync_keeps_a_store_up_to_date(tmp_path, raced):
    folder = run_folder(tmp_path / "run", records=2, started_ms=1)
    sync = BackgroundSync(folder, raced.uri, "background", interval_s=0.05)
    sync.start()
    until(lambda: sync.report is not None, "the first push")
    append(folder, range(2, 30))
    set_state(folder, "finished")
    assert sync.stop()
    assert only_run(raced.uri, "background").info.status == "FINISHED"
    assert_exactly_the_journal(folder, raced.uri, sync.report.mlflow_run_id)


def test_a_store_is_asked_only_when_something_is_new(tmp_path, monkeypatch):
    pushes, failing = [], []

    def counted(*args, **kwargs):
        pushes.append(args)
        if failing:
            raise OSError(failing[0])
        return PushReport("1", "2", 0, (), "")

    monkeypatch.setattr("colddiff.tracking._background.push", counted)
    folder = run_folder(tmp_path / "run", records=2)
    sync = BackgroundSync(folder, "http://127.0.0.1:1", "test", interval_s=0.01)
    sync.start()
    until(lambda: sync.report is not None, "the first push")
    time.sleep(0.3)
    assert len(pushes) == 1
    changes = [
        lambda: append(folder, range(2, 3)),
        lambda: write_json(folder / "status.json", {"state": "interrupted"}),
        lambda: write_json(folder / "evaluation.json", {}),
        lambda: write_atomic(folder / "ema.safetensors", b"1"),
    ]
    for change in changes:
        before = len(pushes)
        change()
        until(lambda before=before: len(pushes) > before, "a change to be pushed")
        time.sleep(0.1)
        assert len(pushes) == before + 1
    failing.append("away")
    append(folder, range(3, 4))
    tried = len(pushes)
    until(lambda: len(pushes) > tried + 3, "what failed to be tried again")
    failing.clear()
    until(lambda: sync.error is None, "success")
    before = len(pushes)
    assert sync.stop()
    assert len(pushes) > before  # the last push is never left out


def test_a_disk_that_fails_for_a_moment_loses_nothing(tmp_path, raced, monkeypatch):
    folder = run_folder(tmp_path / "run", records=2, started_ms=9)
    sync = BackgroundSync(folder, raced.uri, "disk", interval_s=0.05)
    real, failures = contents.fingerprint, [OSError(errno.ESTALE, "stale")] * 3

    def failing(path):
        if failures:
            raise failures.pop()
        return real(path)

    monkeypatch.setattr(contents, "fingerprint", failing)
    sync.start()
    until(lambda: sync.error is not None, "the failure to be noticed")
    until(lambda: sync.report is not None, "a push")
    append(folder, range(2, 10))
    assert sync.stop()
    assert_exactly_the_journal(folder, raced.uri, sync.report.mlflow_run_id)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_too_early_is_not_complete(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run", records=2)
    monkeypatch.setattr(
        "colddiff.tracking._background.push", lambda *_, **__: PushReport("1", "2", 0, (), "")
    )
    sync = BackgroundSync(folder, "http://127.0.0.1:1", "test", interval_s=0.01)
    monkeypatch.setattr(sync._stopping, "wait", lambda _: sys.exit())  # ends the thread alone
    sync.start()
    sync._thread.join(10)
    assert sync.report is not None
    assert not sync.stop()


def test_unreachable_server_is_one_warning(tmp_path, caplog, no_backoff):
    folder = run_folder(tmp_path / "run", records=3)
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://ann:hunter2@127.0.0.1:{taken.getsockname()[1]}"
        sync = BackgroundSync(folder, uri, "test", interval_s=0.01)
        sync.start()
        until(lambda: sync.error is not None, "the first failure")
        time.sleep(0.3)
        assert not sync.stop()
    first, last = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the run goes on and is sent later" in first.getMessage()
    assert "launch.py sync" in last.getMessage()
    assert "hunter2" not in caplog.text


def test_hung_server_cannot_hold_up_the_end(tmp_path, no_backoff):
    folder = run_folder(tmp_path / "run", records=3)
    with socket.socket() as hung:  # accepts and never answers
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        uri = f"http://127.0.0.1:{hung.getsockname()[1]}"
        sync = BackgroundSync(folder, uri, "test", interval_s=0.01)
        sync.start()
        start = time.monotonic()
        assert not sync.stop(timeout_s=1.5)
        assert time.monotonic() - start < 2.5
    until(lambda: not sync._thread.is_alive(), "the thread, which must not log into other tests")
    assert not BackgroundSync(folder, uri, "test").stop()  # never started


class Server:
    """A real tracking server on loopback."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._database = folder, database
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port"]
        command += [str(self.port), "--workers", "1", "--backend-store-uri", self._database]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._answers, "the server")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        address = f"{self.uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture
def server(tmp_path, raced) -> Iterator[Server]:
    place = tmp_path / "server"
    place.mkdir()
    server = Server(place, raced.uri)
    server.start()
    yield server
    server.kill()


def test_a_run_does_not_notice_that_the_server_was_away(tmp_path, server, caplog):
    caplog.set_level(logging.INFO, logger="colddiff")
    folder = run_folder(tmp_path / "run", started_ms=2)
    sync = BackgroundSync(folder, server.uri, "outage", interval_s=0.1)
    sync.start()
    slowest, step = 0.0, 0

    def train_until(condition, what: str) -> None:
        nonlocal slowest, step
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"trained {WAIT_S} s waiting for {what}"
            start = time.monotonic()
            journal.append(step, {"loss": 1 / (step + 1), "rmse/direct": step / 7})
            slowest, step = max(slowest, time.monotonic() - start), step + 1
            time.sleep(0.005)

    with Journal.open(folder / "journal.jsonl") as journal:
        train_until(lambda: sync.report is not None and sync.report.metrics > 0, "metrics")
        server.kill()
        train_until(lambda: sync.error is not None, "the outage to be noticed")
        before = sync.report
        server.start()
        train_until(lambda: sync.error is None and sync.report is not before, "the server back")
    (folder / "ema.safetensors").write_bytes(b"weights")
    set_state(folder, "finished")
    assert sync.stop()
    assert slowest < 1.0  # a failing call to the server takes four seconds and more
    assert_exactly_the_journal(folder, server.uri, sync.report.mlflow_run_id)
    run = only_run(server.uri, "outage")
    assert run.info.status == "FINISHED"
    assert sync.report.link.endswith(
        f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    )
    assert sync.report.artifacts == ("ema.safetensors",)
    (uploaded,) = (tmp_path / "server" / "artifacts").rglob("ema.safetensors")
    assert uploaded.read_bytes() == b"weights"
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("cold")]
    assert len(messages) == 2
    assert "tracking fails" in messages[0]
    assert "is back" in messages[1]
