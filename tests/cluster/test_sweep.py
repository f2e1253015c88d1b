"""A study on Slurm: workers are requeued, preempted, killed; its trials are finished once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import postgres
import pytest
import run_comparison
from harness import PATIENCE_S, ROOT, Site, assert_tracked, config, wait_for
from studies import created, recipe, run_of, small_study, states

from colddiff.files import read_json
from sweeps.lease import Leases
from sweeps.study import StudyConfig, open_study, read_study

TRIALS = 24
BASE = config(steps=400, checkpoint_every=50, validate_every=200)
ENQUEUED = [recipe(index) for index in range(TRIALS - 1)]


@pytest.fixture(params=["journal file", "Postgres"])
def storage(request: pytest.FixtureRequest) -> Iterator[str]:
    """What --storage gets; the study's own journal file is the default."""
    if request.param == "journal file":
        yield ""
        return
    assert (reason := postgres.obstacle()) is None, reason
    with postgres.postgres_server() as url:
        yield url


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """The same trials, on this machine and without faults."""
    place = tmp_path_factory.mktemp("calm")
    study = small_study(place / "runs", trials=TRIALS, base=BASE)
    created(study, *ENQUEUED)
    (place / "tmp").mkdir()  # where a machine's queues tell each other which places are taken
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "sweeps" / "launch.py"), "resume", "--study", "small"),
            *("--workers", "2", "--cluster", "local", "--offline", "--wait"),
        ],
        cwd=place, env=alone, check=True,
    )  # fmt: skip
    return read_study(place / "runs", "small")


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
            if work["turn"] == 1
            and 60 <= work["step"] < 150
            and not work["released"]
            and work["trial"] not in spared
        ]
        return bool(found)

    wait_for("a trial in the midst of its training", look)
    return found[0]


def node_of(site: Site, work: dict[str, Any]) -> str:
    return site.command("squeue", "-h", "-o", "%N", "-j", job_of(work)).strip()


def job_of(work: dict[str, Any]) -> str:
    return str(work["job"]).split(" ")[0]


def disturb(site: Site) -> dict[str, int]:
    """All that can happen to a worker, and the trial that each fault met."""
    hit: dict[str, int] = {}

    def victim(fault: str) -> dict[str, Any]:
        work = in_the_midst(site, *hit.values())
        hit[fault] = work["trial"]
        return work

    site.command("scancel", "--signal=USR2", job_of(victim("time limit")))
    for fault in ("first preemption", "second preemption"):
        node = node_of(site, victim(fault))
        # To its end, because it takes the node of all workers there: no next victim may be leaving.
        site.command(
            "sbatch", "--wait", "-p", "high", f"--nodelist={node}", "--exclusive",
            "--output=/dev/null", "--wrap", "sleep 1",
        )  # fmt: skip
    leases = Leases(site.runs / "studies" / "small" / "leases")
    killed = victim("kill")["trial"]
    (lease,) = leases.current([killed]).values()
    os.kill(lease.holder.pid, signal.SIGKILL)  # nodes are this machine; scancel sends TERM first
    site.slurm.kill_node(node_of(site, victim("lost node")))
    return hit


def finished(site: Site) -> StudyConfig:
    def complete() -> bool:
        time.sleep(1)
        return bool(status(site)["is_complete"])

    wait_for("the study to be complete", complete, 2 * PATIENCE_S)
    return read_study(site.runs, "small")


@pytest.mark.timeout(1200)
def test_a_study_survives_what_a_cluster_does(site: Site, storage: str, calm: StudyConfig) -> None:
    # The study itself is the command's; before its workers, the trials are made known.
    (site.place / "run.json").write_text(BASE.to_json())
    study_config = small_study(site.runs, trials=TRIALS, base=BASE, storage=storage)
    created(study_config, *ENQUEUED)
    sweep(
        site, "start", "--study", "small", "--space", "recipe", "--sampler", "random",
        "--trials", str(TRIALS), "--workers", "4", "--config", "run.json", "--cluster", "slurm",
        "--profile", "site.toml", "--experiment", site.experiment, "--storage", storage,
    )  # fmt: skip
    hit = disturb(site)
    assert_same_trials(finished(site), calm)
    assert_held_in_turn(study_config, hit)
    study = open_study(study_config, 0)
    for number in hit.values():
        folder = run_of(study_config, study.trials[number])
        assert read_json(folder.environment)["attempts"][-1]["resumed_from_step"] >= 50
        assert_tracked(folder, site)
    assert_study_is_tracked(site)


def assert_same_trials(study_config: StudyConfig, calm: StudyConfig) -> None:
    """Exactly as many as were wanted, and each what it is without faults, bit for bit."""
    study, undisturbed = open_study(study_config, 0), open_study(calm, 0)
    assert states(study) == states(undisturbed) == ["COMPLETE"] * TRIALS
    for trial, same in zip(study.trials, undisturbed.trials, strict=True):
        assert (trial.params, trial.values) == (same.params, same.values)
        run_comparison.assert_identical(run_of(study_config, trial), run_of(calm, same))


def assert_held_in_turn(study_config: StudyConfig, hit: dict[str, int]) -> None:
    """Who was requeued goes on with its trial; who was killed gave nothing back."""
    leases = Leases(study_config.folder / "leases")
    for fault, number in hit.items():
        first, second = leases.history(number)[:2]
        if fault in ("kill", "lost node"):
            assert first.released == "", fault
        else:
            assert first.released.startswith("interrupted"), fault
        if fault == "kill":
            assert second.holder.job_id != first.holder.job_id
        else:
            assert second.holder.job_id == first.holder.job_id, fault
            assert second.holder.restarts > first.holder.restarts, fault


def assert_study_is_tracked(site: Site) -> None:
    """One finished run of the study, and below it one of each trial."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=site.uri)
    experiment = client.get_experiment_by_name(site.experiment)
    assert experiment is not None

    def runs(terms: str) -> list[Any]:
        return list(client.search_runs([experiment.experiment_id], terms))

    is_study = "tags.`colddiff.kind` = 'study'"
    is_over = f"attributes.status = 'FINISHED' and {is_study}"
    wait_for("the study's run to end", lambda: runs(is_over), 60)
    (parent,) = runs(is_study)
    assert parent.data.metrics["trials/finished"] == TRIALS
    nested = runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(int(run.data.tags["colddiff.trial"]) for run in nested) == list(range(TRIALS))
    assert {run.info.status for run in nested} == {"FINISHED"}
