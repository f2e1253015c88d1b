"""Submitting, resubmitting and mending on a real cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    ROOT,
    Site,
    assert_identical,
    assert_tracked,
    attempts,
    config,
    last_step,
    wait_for,
)
from tiny import replaced

from colddiff.files import read_json
from colddiff.run_folder import RunFolder

Reference = Callable[..., RunFolder]


def test_killed_during_a_checkpoint_write(site: Site, reference: Reference) -> None:
    run = config(checkpoint_every=1)
    folder = site.folder(run)
    site.train(run)
    site.wait_step(folder, 150)
    wait_for("a torn checkpoint", lambda: torn_by_a_kill(site, folder))
    site.wait_ended(folder, "FAILED")
    assert "failed" in site.launch("status")
    assert folder.path.name in site.launch("retry", "--wait")
    assert attempts(folder)[-1]["resumed_from_step"] >= 150
    assert not list(folder.checkpoints.glob(".*.tmp"))
    assert_identical(folder, reference(run))
    assert_tracked(folder, site)


def torn_by_a_kill(site: Site, folder: RunFolder) -> bool:
    """Kill -9 while the temporary file of a save is there; the run is taken up if it was not."""
    process = read_json(folder.path / "process.json")["pid"]
    for _ in range(200_000):
        if torn(folder):
            os.kill(process, signal.SIGKILL)
            break
    wait_for("the job to end", lambda: site.state(folder) not in ("RUNNING", "COMPLETING"))
    if torn(folder):
        return True
    site.launch("retry")
    site.wait_running(folder)
    site.wait_step(folder, last_step(folder) + 40)
    return False


def torn(folder: RunFolder) -> bool:
    return any(folder.checkpoints.glob(".step-*.tmp"))


def test_one_of_six_fails_and_only_that_is_retried(site: Site) -> None:
    run = config(steps=200)
    seeds = [replaced(run, "training", seed=seed) for seed in range(6)]
    broken = RunFolder.create(site.runs, seeds[3])
    broken.checkpoints.write_text("a file where a folder must be")
    words = ("--seeds", *map(str, range(6)), "--array-parallelism", "2")
    site.train(run, *words)
    most = 0

    def all_ended() -> bool:
        nonlocal most
        states = site.command("squeue", "-h", "--array", "-o", "%T").split()
        most = max(most, states.count("RUNNING"))
        return not states

    wait_for("the array to end", all_ended, 300)
    assert 1 <= most <= 2
    for seed in (0, 1, 2, 4, 5):
        assert_tracked(site.folder(seeds[seed]), site)
    said = site.launch("status")
    line = next(line for line in said.splitlines() if line.startswith(broken.path.name))
    assert "failed" in line
    assert "NotADirectoryError" in said or "FileExistsError" in said
    broken.checkpoints.unlink()
    before = {seed: len(attempts(site.folder(seeds[seed]))) for seed in (0, 1, 2, 4, 5)}
    retried = site.launch("retry", "--wait")
    assert broken.path.name in retried
    assert broken.is_trained and broken.evaluation.exists()
    assert {seed: len(attempts(site.folder(seeds[seed]))) for seed in before} == before
    assert_tracked(broken, site)
    assert "nothing" in site.launch("retry").lower()
    again = site.train(run, *words)
    assert again.count("complete") == 6


def test_editing_a_source_file_does_not_reach_a_queued_run(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "clone"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", "runs", "mlruns", ".*_cache", "data")
    )
    site.source = source
    run = config(steps=300)
    site.train(run, "--sbatch", "hold", "--offline")
    folder = site.folder(run)
    training = source / "colddiff" / "training.py"
    training.write_text("raise RuntimeError('edited after submission')\n")
    site.command("scontrol", "release", site.job(folder))
    site.wait_ended(folder)
    assert folder.is_trained
    sha = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert attempts(folder)[0]["git_sha"] == sha
    assert "edited after submission" not in (folder.path / "code/colddiff/training.py").read_text()


def test_two_launchers_at_once_run_each_run_once(site: Site) -> None:
    run = config(steps=300)
    (site.place / "run.json").write_text(run.to_json())
    words = (
        "train", "--config", "run.json", "--cluster", "slurm", "--profile", "site.toml",
        "--seeds", "0", "1", "2", "--experiment", site.experiment,
    )  # fmt: skip
    launchers = [site.start(*words) for _ in range(2)]
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    wait_for("the jobs to end", lambda: not site.command("squeue", "-h").strip(), 300)
    submitted = (site.runs / "jobs.jsonl").read_text().splitlines()
    assert len(submitted) == 3
    for seed in range(3):
        folder = site.folder(replaced(run, "training", seed=seed))
        assert len(attempts(folder)) == 1
        assert_tracked(folder, site)


def test_a_server_that_is_down_costs_nothing(site: Site, reference: Reference) -> None:
    run = config()
    alive, site.uri = site.uri, "http://127.0.0.1:9"
    said = site.train(run, "--wait")
    assert "warning" in said
    folder = site.folder(run)
    assert folder.is_trained
    assert_identical(folder, reference(run))
    site.uri = alive
    assert "metric values" in site.launch("sync", "--experiment", site.experiment)
    assert_tracked(folder, site)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("partition=nowhere", "invalid partition"),
        ("gres=gpu:5", "node configuration is not available"),
        ("nodes=7", "node configuration is not available"),
    ],
)
def test_an_impossible_request_is_refused_in_slurms_words(
    site: Site, override: str, said: str
) -> None:
    answer = site.train(config(), "--sbatch", override, code=2)
    assert said.lower() in answer.lower()
    assert "Traceback" not in answer
    assert not site.command("squeue", "-h").strip()


def test_a_dry_run_submits_nothing(site: Site) -> None:
    said = site.train(config(), "--seeds", "0", "1", "--dry-run")
    assert "#SBATCH --array=0-1" in said and "#SBATCH --requeue" in said
    assert "to start at" in said
    assert not site.command("squeue", "-h").strip()
    assert not site.runs.joinpath("jobs.jsonl").exists()


def test_sqlite_on_several_nodes_is_refused(site: Site) -> None:
    site.uri = f"sqlite:///{site.place}/mlflow.db"
    answer = site.train(config(), "--seeds", "0", "1", code=2)
    assert "SQLite" in answer and "--offline" in answer
