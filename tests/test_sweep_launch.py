"""The command line of sweeps as its users have it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import FakeSlurm, install
from studies import created, recipe, small_study, states
from tiny import tiny
from tracked_runs import fresh_store

from colddiff.files import read_json, write_json
from jobs.ledger import Entry, Ledger
from sweeps.desk import fail
from sweeps.launch import main
from sweeps.lease import Holder, Leases
from sweeps.study import read_study
from sweeps.workers import last_launch, living_workers

ROOT = Path(__file__).parent.parent
SERVER = "http://mlflow.invalid:5000"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a base configuration, on a machine without a GPU."""
    folder = tmp_path / "here"
    for made in (folder, tmp_path / "tmp"):
        made.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "tiny.json").write_text(tiny(steps=8, validate_every=8).to_json())
    yield folder
    left = [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in _line(each)]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)


def _line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ()) if process.pid != os.getpid() else ""


@pytest.fixture
def slurm(place: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = install(place, monkeypatch)
    (made.state / "sinfo.out").write_text("all*|infinite\n")
    return made


def start(*extra: str, study: str = "s", trials: int = 2) -> int:
    words = ["start", "--study", study, "--space", "recipe", "--trials", str(trials), "--offline"]
    return main([*words, "--config", "tiny.json", *extra])


def status(*extra: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(["status", "--json", *extra]) == 0
    return json.loads(capsys.readouterr().out)


def until(true: Callable[[], object], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, sweeps.launch\n"
        "try: sweeps.launch.main(['start', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'sklearn', 'pandas', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--study", "--space", "--workers", "--orphan-after", "--degradation.T"):
        assert word in done.stdout
    assert "--ranks" not in done.stdout


SLURM = ("--cluster", "slurm", "--tracking-uri", SERVER, "--sbatch", "gpus=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["start"], "--study"),
        (["start", "--study", "s", "--space", "shedule"], "schedule"),
        (["start", "--study", "a/b"], "name = 'a/b' is not allowed"),
        (["start", "--study", "s", "--preset", "mnits"], "Did you mean 'mnist'"),
        (["start", "--study", "s", "--trials", "0"], "trials = 0 is not allowed"),
        (["start", "--study", "s", "--workers", "0"], "--workers 0 is not allowed"),
        (["start", "--study", "s", "--objective", "pareto", "--pruner", "median"], "pruner"),
        (["start", "--study", "s", "--storage", "mysql://a/b"], "'mysql://a/b' is not allowed"),
        (["start", "--study", "s", *SLURM, "--storage", "sqlite:///s.db"], "SQLite's locks"),
        (["start", "--study", "s", *SLURM, "--sbatch", "gpus=4"], "worker of 4 processes"),
        (["start", "--study", "s", *SLURM[:2], "--workers", "2"], "mlflow.db is a SQLite file"),
        (["start", "--study", "s", "--preset", "mnist", "--data-root", "nowhere"], "nowhere/MNIST"),
        (["resume", "--study", "s"], "there is no study 's' in runs"),
        (["status", "--study", "s"], "there is no study 's' in runs"),
        (["status", "--watch", "0"], "--watch 0 is not allowed"),
        (["cancel", "--study", "s"], "there is no study 's' in runs"),
        (["cancel"], "--study"),
        (["sync", "--study", "s"], "there is no study 's' in runs"),
        (["serve", "--storage", "journal.log"], "the proxy needs a database"),
        (["serve", "--storage", "sqlite:///a.db", "--port", "0"], "--port 0 is not allowed"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = sorted(place.rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    assert code == 2
    assert said in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert sorted(place.rglob("*")) == before


def test_a_study_from_start_to_end_in_this_process(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--cluster", "debug") == 0
    assert "s: 2 of 2 trials finished" in capsys.readouterr().out
    (found,) = status(capsys=capsys)
    assert found["counts"] == {
        "finished": 2, "running": 0, "waiting": 0, "failed": 0, "complete": 2, "pruned": 0,
    }  # fmt: skip
    assert found["is_complete"] and not found["work"] and not found["workers"]
    (best,) = found["best"]
    (measured,) = (place / "runs" / best["run"]).glob("objective-*.json")
    assert best["values"] == [read_json(measured)["values"]["rmse"]]

    # The same again finds it complete; another one of that name is refused.
    journals = [path.read_bytes() for path in sorted(place.glob("runs/*/journal.jsonl"))]
    assert start("--cluster", "debug") == 0
    assert [p.read_bytes() for p in sorted(place.glob("runs/*/journal.jsonl"))] == journals
    assert start("--cluster", "debug", "--seed", "7") == 2
    assert "seed: 0 there, 7 here" in capsys.readouterr().err

    # More trials; and where it stands, for people.
    assert main(["resume", "--study", "s", "--trials", "3", "--cluster", "debug", "--offline"]) == 0
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert "s: 3 of 3 trials finished (3 complete); workers: none" in said
    assert "minimize sampled RMSE (validation)" in said
    assert re.search(r"^trial \d  0\.\d+ +digits-\S+ +lr=\S+ dim=\d", said, re.MULTILINE)


def test_the_study_is_in_mlflow_with_its_trials_below(place: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(fresh_store(place))
    words = ["start", "--study", "s", "--space", "recipe", "--trials", "1", "--cluster", "debug"]
    assert main([*words, "--config", "tiny.json"]) == 0
    experiment = client.get_experiment_by_name("colddiff")
    assert experiment is not None
    runs = {
        run.data.tags.get("colddiff.kind", "run"): run
        for run in client.search_runs([experiment.experiment_id])
    }
    study, trial = runs["study"], runs["run"]
    assert study.data.tags["colddiff.study"] == "s"
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert (study.info.status, trial.info.status) == ("FINISHED", "FINISHED")


def test_what_was_offline_is_sent_by_sync(place: Path) -> None:
    from mlflow import MlflowClient

    assert start("--cluster", "debug", trials=1) == 0
    assert not (place / "mlflow.db").exists()
    assert main(["sync", "--study", "s"]) == 0
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("colddiff")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_local_workers_are_added_cancelled_and_resumed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever starts twice gets no worker twice; who cancels loses nothing."""
    (place / "tiny.json").write_text(tiny(steps=20_000, validate_every=0).to_json())
    runs = place / "runs"
    assert start("--workers", "2", trials=9) == 0
    assert [job.entry.run for job in living_workers(runs, "s")] == ["s-worker-0", "s-worker-1"]
    assert start("--workers", "2", trials=9) == 0
    assert len(living_workers(runs, "s")) == 2
    assert start("--workers", "3", trials=9) == 0
    assert [job.entry.run for job in living_workers(runs, "s")][2:] == ["s-worker-2"]
    until(lambda: len(status(capsys=capsys)[0]["work"]) == 3)  # all of them, at once
    until(lambda: [w for w in status(capsys=capsys)[0]["work"] if w["step"] > 0])

    assert main(["cancel", "--study", "s"]) == 0
    assert "s-worker-0: running as" in capsys.readouterr().out
    # Those that still save are no workers any more.
    assert main(["resume", "--study", "s", "--workers", "1", "--offline"]) == 0
    assert "workers: 0 + 1 new" in capsys.readouterr().out
    until(lambda: len(living_workers(runs, "s")) == 1)
    (job,) = living_workers(runs, "s")
    assert job.entry.run == "s-worker-3"  # the others' names were taken yet
    until(lambda: any(work["turn"] == 2 for work in status(capsys=capsys)[0]["work"]))
    (found,) = status(capsys=capsys)
    assert found["counts"]["running"] == 3  # none was lost, none is new
    assert {work["released"] for work in found["work"] if work["turn"] == 1} == {
        "interrupted by SIGTERM"
    }
    assert main(["cancel", "--study", "s"]) == 0
    until(lambda: not living_workers(runs, "s"))
    assert main(["cancel", "--study", "s"]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_waiting_for_local_workers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--wait", trials=1) == 0
    assert "s: 1 of 1 trials finished (1 complete); workers: none" in capsys.readouterr().out


def test_slurm_gets_an_array_of_workers(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster", "slurm", "--workers", "3", "--sbatch", "time=10", "--sbatch", "gpus=1"]
    assert start(*words, "--dry-run", trials=8) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in said and "--time=10" in said
    assert not (place / "runs" / "studies").exists()

    assert start(*words, trials=8) == 0
    (script,) = slurm.scripts()
    assert "#SBATCH --array=0-2" in script and "--job-name=colddiff-worker" in script
    latest = Ledger(place / "runs").latest()
    assert [latest[f"s-worker-{n}", "worker"].job_id for n in range(3)] == [
        "901_0",
        "901_1",
        "901_2",
    ]
    assert not read_study(place / "runs", "s").one_machine

    # One has ended: the same command again replaces that one alone, as before.
    slurm.queue(*(f"901_{n}|RUNNING|None|node1|N/A|N/A" for n in (0, 2)))
    assert main(["resume", "--study", "s", "--workers", "3", "--offline"]) == 0
    assert len(slurm.scripts()) == 2
    entry = last_launch(place / "runs", "s")
    assert entry is not None
    assert (entry.run, entry.cluster, entry.profile["time"]) == ("s-worker-1", "slurm", "10")

    # And where Slurm cannot be asked, none is submitted.
    slurm.fail("squeue", "Unable to contact slurm controller")
    assert main(["resume", "--study", "s", "--workers", "9", "--offline"]) == 1
    assert "Unable to contact" in capsys.readouterr().err
    assert len(slurm.scripts()) == 2
    assert main(["status"]) == 0
    assert "warning: Slurm cannot be asked" in capsys.readouterr().out


def test_no_more_workers_than_trials_to_do(place: Path, slurm: FakeSlurm) -> None:
    config = small_study(place / "runs", trials=5)
    study = created(config)
    for _ in range(3):
        study.tell(study.ask().number, 1.0)
    assert main(["resume", "--study", "small", *SLURM, "--workers", "9", "--offline"]) == 0
    assert len(Ledger(place / "runs").latest()) == 2


def test_resume_forgives_the_failures_that_were(place: Path, slurm: FakeSlurm) -> None:
    config = small_study(place / "runs")
    study = created(config)
    for _ in range(2):
        fail(study.ask(), "no space")
    assert main(["resume", "--study", "small", *SLURM, "--offline"]) == 0
    entry = last_launch(place / "runs", "small")
    assert entry is not None
    assert entry.task["failed_before"] == 2


def test_status_says_who_works_on_what(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_study(place / "runs", trials=5)
    study = created(config, recipe(1))
    leases = Leases(config.folder / "leases")
    first, second = study.ask(), study.ask()
    assert leases.take(first.number, Holder("small-worker-0", "node1", 77))
    held = leases.take(second.number, Holder("small-worker-1", "node2", 8, 0.0, "slurm", "12_1"))
    assert held is not None
    held.release("interrupted by SIGUSR2")
    first.set_user_attr("run", "a-run")
    write_json(
        place / "runs" / "a-run" / "status.json",
        {"state": "running", "step": 7, "steps": 9, "message": "", "updated_ms": 0},
    )
    fail(study.ask(), "CUDA out of memory")
    assert states(study) == ["RUNNING", "RUNNING", "FAIL"]
    assert main(["status", "--study", "small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0 of 5 trials finished (2 running, 1 failed); workers: none" in lines[0]
    rows = {line[:1]: re.split(r"  +", line) for line in lines if line[:1] in ("0", "1")}
    assert rows["0"][:6] == ["0", "a-run", "7/9", "1", "small-worker-0", "process 77 on node1"]
    assert rows["1"][-2:] == ["12_1 on node2", "free: interrupted by SIGUSR2"]
    assert "trial 2 failed: CUDA out of memory" in lines
    assert "go on: python sweeps/launch.py resume --study small" in lines


def test_status_without_studies(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "no studies below runs" in capsys.readouterr().out


def test_a_storage_that_is_down_is_said_without_a_traceback(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--cluster", "debug", "--storage", f"sqlite:///{place}/absent/s.db") == 1
    said = capsys.readouterr().err
    assert "unable to open database file" in said
    assert "Traceback" not in said


def test_jobs_of_runs_and_workers_do_not_mix(place: Path) -> None:
    entries = [
        Entry(run="s-worker-1", kind="worker", cluster="local", job_id="local-00000000-1"),
        Entry(run="s-worker-2-worker-1", kind="worker", cluster="local", job_id="local-00000000-2"),
        Entry(run="s-worker-3", kind="train", cluster="local", job_id="local-00000000-3"),
    ]
    Ledger(place / "runs").append(entries)
    found = [last_launch(place / "runs", name) for name in ("s", "s-worker-2", "none")]
    assert [entry and entry.run for entry in found] == ["s-worker-1", "s-worker-2-worker-1", None]
