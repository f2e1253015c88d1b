"""Optuna's proxy between workers and a database, as ``sweeps/launch.py serve`` starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import GrpcStorageProxy
from studies import states
from tiny import tiny

from sweeps.launch import main
from sweeps.storage import storage_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """A proxy in front of a database of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "sweeps" / "launch.py"), "serve"]
    command += ["--storage", f"sqlite:///{tmp_path}/s.db", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"serving at grpc://localhost:{port}, until Ctrl-C\n"
        url = f"grpc://localhost:{port}"
        client = storage_of(url)
        assert isinstance(client, GrpcStorageProxy)
        client.wait_server_ready(timeout=30)
        client.close()
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=30)
    assert server.returncode == 130, said
    assert "Traceback" not in said


def test_a_study_through_the_proxy_is_in_the_database(
    proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(tiny(steps=8, validate_every=8).to_json())
    words = ["--study", "s", "--space", "recipe", "--trials", "3", "--config", "tiny.json"]
    assert main(["start", *words, "--offline", "--cluster", "debug", "--storage", proxy]) == 0
    behind = storage_of(f"sqlite:///{tmp_path}/s.db", one_machine=True)
    study = optuna.load_study(study_name="s", storage=behind)
    assert states(study) == ["COMPLETE"] * 3
    assert main(["status", "--study", "s"]) == 0
