"""A study on Slurm: workers are requeued, preempted, killed; its trials are finished once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import run_comparison
from harness import PATIENCE_S, Site, config, wait_for
from studies import created, recipe, run_of, small_study, states, worker

from colddiff.files import read_json
from sweeps.lease import Leases
from sweeps.study import StudyConfig, open_study, read_study

ENQUEUED = [recipe(index) for index in range(5)]


def sweep(site: Site, *words: str) -> str:
    """A command of sweeps/launch.py; what it said."""
    done = subprocess.run(
        [sys.executable, str(site.source / "sweeps" / "launch.py"), *words],
        cwd=site.place, env=site.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(site: Site) -> dict[str, Any]:
    """Where the study stands; asking starts requeued workers at once."""
    (found,) = json.loads(sweep(site, "status", "--json"))
    return dict(found)


def in_the_midst(site: Site, *spared: int) -> dict[str, Any]:
    """A trial that trains, in its first worker's hands."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [
            work
            for work in status(site)["work"]
            if work["turn"] == 1 and 100 <= work["step"] < 400 and work["trial"] not in spared
        ]
        return bool(found)

    wait_for("a trial in the midst of its training", look)
    return found[0]


def job_of(work: dict[str, Any]) -> str:
    return str(work["job"]).split(" ")[0]


def disturb(site: Site) -> list[int]:
    """A time limit, a preemption and a kill without notice; the trials that met them."""
    limited = in_the_midst(site)
    site.command("scancel", "--signal=USR2", job_of(limited))
    preempted = in_the_midst(site, limited["trial"])
    node = site.command("squeue", "-h", "-o", "%N", "-j", job_of(preempted)).strip()
    site.command(
        "sbatch", "-p", "high", f"--nodelist={node}", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 1",
    )  # fmt: skip
    spared = (limited["trial"], preempted["trial"])
    killed = in_the_midst(site, *spared)
    (lease,) = (
        Leases(site.runs / "studies" / "small" / "leases").current([killed["trial"]]).values()
    )
    os.kill(lease.holder.pid, signal.SIGKILL)  # nodes are this machine; scancel sends TERM first
    return [*spared, killed["trial"]]


def finished(site: Site) -> StudyConfig:
    def complete() -> bool:
        time.sleep(1)
        return bool(status(site)["is_complete"])

    wait_for("the study to be complete", complete, 2 * PATIENCE_S)
    return read_study(site.runs, "small")


def test_a_study_survives_what_a_cluster_does(site: Site, tmp_path: Path) -> None:
    base = config(steps=600, checkpoint_every=100)
    calm = small_study(tmp_path / "calm", trials=6, base=base)
    undisturbed = created(calm, *ENQUEUED)
    # The study itself is the command's; before its workers, the trials are made known.
    (site.place / "run.json").write_text(base.to_json())
    created(small_study(site.runs, trials=6, base=base), *ENQUEUED)
    sweep(
        site, "start", "--study", "small", "--space", "recipe", "--sampler", "random",
        "--trials", "6", "--workers", "3", "--config", "run.json", "--cluster", "slurm",
        "--profile", "site.toml", "--experiment", site.experiment,
    )  # fmt: skip
    hit = disturb(site)
    study_config = finished(site)
    worker(calm)()

    study = open_study(study_config, 0)
    assert states(study) == states(undisturbed) == ["COMPLETE"] * 6
    for trial, same in zip(study.trials, undisturbed.trials, strict=True):
        assert (trial.params, trial.values) == (same.params, same.values)
        run_comparison.assert_identical(run_of(study_config, trial), run_of(calm, same))
    leases = Leases(study_config.folder / "leases")
    for number in hit:
        attempts = read_json(run_of(study_config, study.trials[number]).environment)["attempts"]
        assert attempts[-1]["resumed_from_step"] >= 100
    for number in hit[:2]:
        first, second = leases.history(number)[:2]
        assert second.holder.job_id == first.holder.job_id  # the same job goes on with it
        assert second.holder.restarts > first.holder.restarts
    first, second = leases.history(hit[2])[:2]
    assert second.holder.job_id != first.holder.job_id
    assert first.released == ""
