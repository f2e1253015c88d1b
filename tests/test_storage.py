"""Storages of studies: which are allowed, and journals that killed writers left torn."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage

from sweeps import storage as storages
from sweeps.storage import check_storage, postgres_url, storage_of


def a_study(storage: BaseStorage, trials: int = 3) -> optuna.Study:
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    return study


def values(path: Path) -> list[float]:
    """The finished trials, as a fresh process would read them."""
    study = optuna.load_study(storage=storage_of(str(path)), study_name="s")
    return [
        trial.values[0] for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    ]


def test_journals_by_path_and_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = a_study(storage_of("new/folder/j.log")).trials
    path = tmp_path / "new/folder/j.log"
    monkeypatch.chdir("/")
    for url in (str(path), f"journal://{path}"):
        storage = storage_of(url)
        assert isinstance(storage, JournalStorage)
        assert optuna.load_study(storage=storage, study_name="s").trials == expected
    assert not path.with_name("j.log.lock").exists()


REFUSED = {
    "sqlite:///s.db": "SQLite's locks do not hold on network file systems",
    "postgresql://me:word@host/db": "PGPASSWORD and ~/.pgpass",
    "postgresql://host/db?user=me&password=word": "PGPASSWORD and ~/.pgpass",
    "grpc://host": "it must be grpc://host:port",
    "grpc://:12": "it must be grpc://host:port",
    "grpc://host:port": "is no address",
    "journal://folder/j.log": "it must be journal:///absolute/path",
    "postgres://host/db": "Did you mean 'postgresql'",
    "redis://host": "a URL of journal, postgresql, grpc, sqlite",
}


@pytest.mark.parametrize("url", REFUSED)
def test_refused_with_the_reason(url: str) -> None:
    for function in (check_storage, storage_of):
        with pytest.raises(ValueError, match=re.escape(REFUSED[url])) as caught:
            function(url)
        assert "word" not in str(caught.value).replace("password", "").replace("PASSWORD", "")


def test_sqlite_on_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = storage_of("sqlite:///s.db", one_machine=True)
    assert isinstance(storage, RDBStorage)
    assert storage.heartbeat_interval is None
    expected = a_study(storage).trials
    monkeypatch.chdir("/")
    again = storage_of(f"sqlite:///{tmp_path}/s.db", one_machine=True)
    assert optuna.load_study(storage=again, study_name="s").trials == expected


def test_postgres_is_reached_by_psycopg_3(monkeypatch: pytest.MonkeyPatch) -> None:
    check_storage("postgresql://me@host:5433/db?sslmode=require")
    monkeypatch.setattr(storages.importlib.util, "find_spec", lambda name: name)
    url = postgres_url("postgresql://me@host:5433/db?sslmode=require")
    assert url == "postgresql+psycopg://me@host:5433/db?sslmode=require"


@pytest.mark.parametrize(
    ("url", "package"), [("postgresql://host/db", "psycopg"), ("grpc://host:1", "grpc")]
)
def test_a_missing_driver_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'colddiff\["):
        storage_of(url)


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j.log"
    a_study(storage_of(str(path)))
    whole, expected = path.read_bytes(), values(path)
    assert len(expected) == 3
    last = whole.splitlines(keepends=True)[-1]
    for torn in (last[:1], last[: len(last) // 2], last[:-1], b"\0\0\0"):
        path.write_bytes(whole + torn)
        assert values(path) == expected
        assert path.read_bytes() == whole
    path.write_bytes(b'{"op')
    storage_of(str(path))
    assert path.read_bytes() == b""


def test_a_line_torn_while_others_are_at_work(tmp_path: Path) -> None:
    """A worker that opened the journal before another was killed writes on, and both are read."""
    path = tmp_path / "j.log"
    study = a_study(storage_of(str(path)))
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"killed","stu')
    trial = study.ask()
    study.tell(trial, 0.5)
    assert values(path)[-1] == 0.5
    assert len(values(path)) == 4
    assert [t.number for t in study.trials] == [0, 1, 2, 3]


def test_merged_lines_are_mended_where_they_stand(tmp_path: Path) -> None:
    """By a writer without our lock, such as another tool: what it wrote is kept."""
    path = tmp_path / "j.log"
    study = a_study(storage_of(str(path)))  # which has read so far, and no further
    with path.open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"killed","note":"{\\"op_code\\":')
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    record = {"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": {"note": '{"op_code":1}'}}
    backend.append_logs([record])
    backend.append_logs([record | {"user_attr": {"more": 1}}])
    with pytest.raises(json.JSONDecodeError):
        optuna.load_study(storage=JournalStorage(backend), study_name="s")
    size = path.stat().st_size
    assert len(values(path)) == 3
    assert path.stat().st_size == size
    assert study.user_attrs == {"note": '{"op_code":1}', "more": 1}
    a_study(storage_of(str(path)), trials=1)
    assert len(study.trials) == 4


def test_a_journal_that_is_none_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.log"
    a_study(storage_of(str(path)))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"something else\n"
    path.write_bytes(b"".join(lines))
    start = len(lines[0]) + len(lines[1])
    with pytest.raises(
        ValueError, match=rf"j.log: line 3 \(byte {start}\) is corrupt: b'something"
    ):
        storage_of(str(path))
    assert path.read_bytes() == b"".join(lines)
    assert not path.with_name("j.log.lock").exists()


WRITER = """
    import os, signal, sys
    import optuna
    from sweeps.storage import storage_of

    optuna.logging.disable_default_handler()
    study = optuna.load_study(storage=storage_of(sys.argv[1]), study_name="s")
    for _ in range(int(sys.argv[2])):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    if sys.argv[3] == "die":
        with open(sys.argv[1], "ab") as file:
            file.write(b'{"op_code":4,"worker_id":"me","study_')
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_several_processes_of_which_some_are_killed(tmp_path: Path) -> None:
    path = tmp_path / "j.log"
    a_study(storage_of(str(path)), trials=0)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path), "20", end],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for end in ("die", "live", "die")
    ]
    assert [each.wait(120) for each in processes] == [-signal.SIGKILL, 0, -signal.SIGKILL]
    assert len(values(path)) == 60
