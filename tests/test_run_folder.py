"""The run folder: its names, status, attempts, and what happens to an old one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny import replaced, tiny

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder, Status


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", tiny())


def test_names_are_those_of_the_record(folder: RunFolder) -> None:
    assert folder.path.name == tiny().run_id
    names = {
        "config_file": "config.json",
        "environment": "environment.json",
        "checkpoints": "checkpoints",
        "journal": "journal.jsonl",
        "weights": "ema.safetensors",
        "evaluation": "evaluation.json",
        "samples": "samples",
        "logs": "logs",
        "lock": ".lock",
    }
    for attribute, name in names.items():
        assert getattr(folder, attribute) == folder.path / name


def test_create_writes_the_configuration(folder: RunFolder) -> None:
    assert folder.config == tiny()
    assert RunConfig.from_json((folder.path / "config.json").read_text()) == tiny()
    assert folder.status() is None
    assert not folder.is_trained


def test_create_finds_the_same_run_again(folder: RunFolder) -> None:
    (folder.path / "journal.jsonl").write_text("{}\n")
    written = folder.config_file.stat().st_ino
    again = RunFolder.create(folder.path.parent, tiny())
    assert again == folder
    assert folder.config_file.stat().st_ino == written  # not even rewritten
    assert (folder.path / "journal.jsonl").read_text() == "{}\n"


def test_create_takes_over_what_does_not_define_the_result(folder: RunFolder) -> None:
    (folder.path / "journal.jsonl").write_text("{}\n")
    new = replaced(tiny(log_every=17), "evaluation", samples=40)
    again = RunFolder.create(folder.path.parent, new)
    assert again == folder
    assert folder.config == new
    assert (folder.path / "journal.jsonl").exists()
    assert list(folder.path.parent.iterdir()) == [folder.path]


def test_another_result_gets_another_folder(folder: RunFolder) -> None:
    other = RunFolder.create(folder.path.parent, tiny(seed=1))
    assert other != folder
    assert folder.config == tiny()


def test_find_wants_a_run_folder(folder: RunFolder, tmp_path: Path) -> None:
    assert RunFolder.find(folder.path) == folder
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{path} is not a run folder: it has no config.json"):
            RunFolder.find(path)


def test_a_damaged_configuration_is_reported(folder: RunFolder) -> None:
    folder.config_file.write_text('{"training": {"steps": ')
    with pytest.raises(ValueError, match="not a configuration"):
        RunFolder.find(folder.path).config  # noqa: B018


def test_status_round_trip(folder: RunFolder) -> None:
    before = int(time.time() * 1000)
    folder.write_status("running", 3, 30)
    status = folder.status()
    assert status is not None
    assert status == Status("running", 3, 30, "", status.updated_ms)
    assert before <= status.updated_ms <= time.time() * 1000
    folder.write_status("failed", 4, 30, "OSError: größer")
    status = folder.status()
    assert status is not None
    assert (status.state, status.step, status.message) == ("failed", 4, "OSError: größer")
    written = json.loads((folder.path / "status.json").read_text())
    assert set(written) == {"state", "step", "steps", "message", "updated_ms"}


def test_trained_means_finished_with_weights(folder: RunFolder) -> None:
    folder.write_status("finished", 30, 30)
    assert not folder.is_trained
    folder.weights.write_bytes(b"weights")
    assert folder.is_trained
    for state in ("running", "interrupted", "failed"):
        folder.write_status(state, 30, 30)  # type: ignore[arg-type]
        assert not folder.is_trained


def record(folder: RunFolder, step: int) -> dict[str, object]:
    folder.record_attempt(
        device="cpu",
        threads=2,
        resumed_from_step=step,
        data_sha256="ab" * 32,
        data_samples=3984,
    )
    recorded: dict[str, object] = json.loads(folder.environment.read_text())
    return recorded


def test_attempts_are_appended(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_SECRET", "not recorded")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    first = record(folder, 0)
    monkeypatch.delenv("SLURM_JOB_ID")
    second = record(folder, 7)
    assert (second["data_sha256"], second["data_samples"]) == ("ab" * 32, 3984)
    attempts = second["attempts"]
    assert isinstance(attempts, list)
    assert [a["resumed_from_step"] for a in attempts] == [0, 7]
    assert attempts[:1] == first["attempts"]
    assert attempts[0]["slurm"]["job_id"] == "123"
    assert attempts[0]["slurm"]["restart_count"] == "2"
    assert "secret" not in attempts[0]["slurm"]
    assert "job_id" not in attempts[1]["slurm"]
