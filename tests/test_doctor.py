"""The preflight: each thing that can be wrong is found, said, and costs the exit code."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from slurm_runner import PARTITIONS, SlurmRunner
from tiny import changed

from colddiff.checkpoint import checkpoints
from colddiff.presets import preset
from colddiff.run_folder import RunFolder
from colddiff.tracking import initialise_store, open_client
from jobs.doctor import checks, probe, tracking_checks
from jobs.doctor.checks import Check, Torch
from jobs.doctor.command import Doctor
from jobs.doctor.slurm_checks import (
    Cluster,
    ask,
    check_kill_wait,
    check_slurm,
    check_time,
    check_warning,
)
from jobs.doctor.tracking_checks import check_store, check_tracking
from jobs.launch import main
from jobs.options import Launch
from jobs.profiles import Profile

Lines = dict[str, tuple[str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder of a user without GPUs and without a server."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(checks, "MEASURED_BYTES", 1_000_000)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmRunner:
    return SlurmRunner(tmp_path, monkeypatch)


def lines(text: str) -> Lines:
    """Verdict and finding of each check, by its name."""
    found = {}
    for line in text.splitlines():
        if line.startswith(("ok ", "warning ", "FAIL ")):
            found[line[9:24].strip()] = (line[:8].strip(), line[25:])
    return found


def verdicts(found: Lines) -> dict[str, str]:
    return {name: verdict for name, (verdict, _) in found.items() if verdict != "ok"}


# The whole command


def test_a_good_machine_passes_and_stays_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--preset", "demo"]) == 0
    out = capsys.readouterr().out
    found = lines(out)
    assert verdicts(found) == {} and out.splitlines()[-1] == "all is well"
    names = ["Python", "GPUs", "runs folder", "free space", "file locks", "code", "MLflow"]
    assert list(found) == names
    assert list(here.iterdir()) == []


def test_a_good_cluster_passes(
    here: Path,
    slurm: SlurmRunner,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking_checks, "is_this_machine", lambda uri: False)
    with server() as uri:
        arguments = ["doctor", "--cluster", "slurm", "--preset", "demo"]
        code = main([*arguments, "--tracking-uri", uri])
    out = capsys.readouterr().out
    found = lines(out)
    # pytest's folder is on a disk of this machine, which alone does not fail.
    assert code == 0 and set(verdicts(found)) <= {"shared disk"}
    assert "23.11.4" in found["Slurm"][1] and "2030-01-02T03:04:05" in found["profile"][1]
    assert "--probe sends a job to look" in out
    assert list(here.iterdir()) == []


def test_what_fails_costs_the_exit_code(
    slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Doctor(cluster="slurm", preset="demo", sbatch=("time=3",))() == 1
    out = capsys.readouterr().out
    assert {name for name, word in verdicts(lines(out)).items() if word == "FAIL"} == {
        "MLflow",
        "time limit",
    }
    assert "2 failed" in out.splitlines()[-1]


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    # /proc takes no files, not even root's.
    assert main(["doctor", "--preset", "demo", "--runs", "/proc/colddiff"]) == 1
    found = lines(capsys.readouterr().out)
    assert (
        found["runs folder"][0] == "FAIL" and "/proc cannot be written" in found["runs folder"][1]
    )
    assert "--runs" in found["runs folder"][1]


def test_a_file_in_place_of_the_folder(here: Path) -> None:
    (here / "runs").write_text("")
    found, seconds = checks.check_saving(here / "runs", 1000)
    assert found.verdict == "FAIL" and seconds is None


def test_a_broken_torch_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "LOOK", "raise ImportError('libcudnn.so.9: no such file')")
    assert Doctor()() == 1
    found = lines(capsys.readouterr().out)
    assert list(found) == ["Python"]
    assert "libcudnn.so.9" in found["Python"][1] and "pip install" in found["Python"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnits"], "Did you mean 'mnist'"),
        (["--probe"], "--cluster slurm"),
        (["--cluster", "slurm", "--profile", "nowhere"], "no profile 'nowhere'"),
    ],
)
def test_mistakes_are_the_users(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


# This machine


def test_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    from colddiff.training import train

    short = {"steps": 1, "batch_size": 2, "validate_every": 0, "device": "cpu", "ema_start": 1}
    config = changed(preset("demo"), {"training": short, "optimiser": {"warmup_steps": 0}})
    folder = RunFolder.create(tmp_path, config)
    train(folder)
    (path,) = checkpoints(folder.checkpoints)
    assert checks.state_bytes(config) == pytest.approx(path.stat().st_size, rel=0.03)


def test_saving_is_scaled_to_the_size(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(checks.time, "perf_counter", lambda: next(clock))
    found, seconds = checks.check_saving(here, 4_000_000)  # of which a quarter is written
    assert seconds == 2.0 and "4 MB is saved in 2.0 s" in found.found
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "verdict"), [(10**12, "ok"), (2 * 10**9, "warning"), (10**8, "FAIL")]
)
def test_free_space(here: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: str) -> None:
    usage = SimpleNamespace(total=10**13, used=0, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = checks.check_space(here / "runs", 100_000_000)
    # Two checkpoints, a third one being written, and weights of a quarter's size.
    assert "a run takes up to 0.4 GB" in found.found
    assert found.verdict == verdict and bool(found.mend) == (verdict != "ok")


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        ("print('held', flush=True); import time; time.sleep(60)", "two processes got the same"),
        ("raise NotImplementedError('this disk has no locks')", "this disk has no locks"),
    ],
)
def test_disks_without_locks(
    here: Path, monkeypatch: pytest.MonkeyPatch, holder: str, message: str
) -> None:
    monkeypatch.setattr(checks, "HOLD", holder)
    found = checks.check_locks(here)
    assert found.verdict == "FAIL" and message in found.found
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options", "probed", "verdict"),
    [
        ("nfs4", "rw,vers=4.2", False, "ok"),
        ("lustre", "rw,flock", False, "ok"),
        ("tmpfs", "rw", False, "warning"),
        ("ext4", "rw", False, "warning"),
        ("ext4", "rw", True, "ok"),
        ("nfs", "rw,nolock", True, "warning"),
        ("lustre", "rw,localflock", False, "warning"),
    ],
)
def test_shared_disks(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, probed: bool, verdict: str
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="overlay", opts="rw"),
        SimpleNamespace(mountpoint=str(here), fstype=kind, opts=options),
        SimpleNamespace(mountpoint=f"{here}-too", fstype="proc", opts="rw"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    found = checks.check_sharing(here / "runs", probed=probed)
    assert found.verdict == verdict and f"{here} is {kind}" in found.found


@pytest.mark.parametrize(
    ("visible", "seen", "verdict"),
    [
        ("", [], "ok"),
        ("0,1", ["A100", "A100"], "ok"),
        ("0,1", ["A100"], "FAIL"),
        ("0", [], "FAIL"),
    ],
)
def test_gpus_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch, visible: str, seen: list[str], verdict: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert checks.check_gpus(Torch("2.9", "13.0", seen)).verdict == verdict


def test_code_without_git_and_too_much_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_code(here).verdict == "ok"
    monkeypatch.setattr(checks, "git_sha", lambda: "")
    assert checks.check_code(here).verdict == "warning"
    monkeypatch.setattr("jobs.snapshot.LARGEST_BYTES", 10)
    found = checks.check_code(here)
    assert found.verdict == "FAIL" and ".gitignore" in found.found


# MLflow


@contextmanager
def server(status: int = 404, version: str = "3.17.2") -> Iterator[str]:
    """A tracking server without any experiment, or one that refuses everything but its health."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in ("/health", "/version"):
                self.answer(200, version if self.path == "/version" else "OK")
            elif status == 404:
                self.answer(404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"}))
            else:
                self.answer(status, "Invalid Host header")

        def answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}"
        finally:
            found.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "verdict", "mend"),
    [
        (404, "ok", ""),
        (403, "FAIL", '--allowed-hosts "127.0.0.1,127.0.0.1:*"'),
        (401, "FAIL", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_servers(status: int, verdict: str, mend: str) -> None:
    """All of them say that they are healthy."""
    with server(status) as uri:
        found = check_store(uri, "colddiff")
    assert found.verdict == verdict and mend in found.mend


def test_a_server_of_another_version() -> None:
    with server(version="2.22.0") as uri:
        found = check_store(uri, "colddiff")
    assert found.verdict == "warning" and "2.22.0" in found.found and "2.22.0" in found.mend


@pytest.mark.usefixtures("no_backoff")
def test_a_server_that_is_gone_keeps_the_secret() -> None:
    found = check_store("http://ann:hunter2@127.0.0.1:1", "colddiff")
    assert found.verdict == "FAIL" and "--offline" in found.mend
    assert "refused" in found.found and "hunter2" not in str(found)


def test_databases(here: Path) -> None:
    uri = "sqlite:///mlflow.db"
    found = check_tracking(Launch(tracking_uri=uri))
    assert found.verdict == "ok" and not (here / "mlflow.db").exists()
    experiment = initialise_store(uri, "colddiff")
    assert check_tracking(Launch(tracking_uri=uri)).verdict == "ok"
    open_client(uri).delete_experiment(experiment)
    found = check_tracking(Launch(tracking_uri=uri))
    assert found.verdict == "FAIL" and f"--experiment-id {experiment}" in found.mend
    (here / "file").write_text("")
    assert check_tracking(Launch(tracking_uri="sqlite:///file/mlflow.db")).verdict == "FAIL"


def test_stores_that_jobs_of_a_cluster_cannot_use() -> None:
    found = check_tracking(Launch(cluster="slurm", tracking_uri="sqlite:///mlflow.db"))
    assert found.verdict == "FAIL" and "several nodes" in found.found and "--offline" in found.mend
    with server() as uri:
        found = check_tracking(Launch(cluster="slurm", tracking_uri=uri))
        assert found.verdict == "warning" and "its own node" in found.found
        assert check_tracking(Launch(tracking_uri=uri)).verdict == "ok"


# Slurm


def slurm_lines(capsys: pytest.CaptureFixture[str], *sbatch: str) -> Lines:
    Doctor(cluster="slurm", preset="demo", sbatch=sbatch)()
    return lines(capsys.readouterr().out)


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    found, cluster = check_slurm(Profile())
    assert found.verdict == "FAIL" and "login node" in found.mend and cluster is None


def test_a_slurm_that_does_not_answer(
    slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    program = slurm.state.parent / "bin" / "scontrol"
    program.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact' >&2; exit 1\n")
    found = slurm_lines(capsys)
    assert found["Slurm"][0] == "FAIL" and "Unable to contact" in found["Slurm"][1]
    assert "profile" not in found


def test_requeueing_and_preemption(slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]) -> None:
    found = slurm_lines(capsys)
    assert found["requeue"] == ("ok", "JobRequeue = 1")
    assert found["preemption"] == ("ok", "REQUEUE in partition main")
    slurm.set(JobRequeue="0")
    found = slurm_lines(capsys, "partition=free,main")
    assert found["requeue"][0] == "warning"
    assert found["preemption"][0] == "warning" and "launch.py retry" in found["preemption"][1]
    slurm.set(PreemptType="preempt/none")
    assert slurm_lines(capsys, "partition=free")["preemption"][0] == "ok"


def test_refused_profiles_and_missing_accounting(
    slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.write("test-only", "sbatch: error: Batch job submission failed: Invalid qos\n")
    slurm.write("test-only.rc", "1")
    slurm.write("sacct.rc", "1")
    found = slurm_lines(capsys)
    assert found["profile"][0] == "FAIL" and "Invalid qos" in found["profile"][1]
    assert found["accounting"][0] == "warning"


def cluster(kill_wait: str, grace: str = "0") -> Cluster:
    return Cluster({"KillWait": kill_wait}, [{"PartitionName": "main", "GraceTime": grace}])


@pytest.mark.parametrize(
    ("kill_wait", "grace", "save_s", "verdict"),
    [
        ("30 sec", "0", 3, "ok"),
        ("30 sec", "0", 20, "warning"),
        ("30 sec", "300", 20, "ok"),
        ("30 sec", "0", 200, "warning"),
    ],
)
def test_time_to_save_when_preempted(
    kill_wait: str, grace: str, save_s: float, verdict: str
) -> None:
    assert check_kill_wait(cluster(kill_wait, grace), save_s).verdict == verdict


def test_the_shortest_grace_counts(slurm: SlurmRunner) -> None:
    assert ask(Profile(partition="free")).grace_s == (60, 30)
    assert ask(Profile(partition="free,main")).grace_s == (0, 30)
    slurm.write("partitions", PARTITIONS.replace("GraceTime=0", "GraceTime=UNLIMITED"))
    assert ask(Profile(partition="free,main")).grace_s == (60, 30)


@pytest.mark.parametrize(
    ("delay_s", "save_s", "verdict"), [(120, 2, "ok"), (120, 60, "warning"), (120, 120, "FAIL")]
)
def test_time_to_save_ahead_of_the_limit(delay_s: int, save_s: float, verdict: str) -> None:
    found = check_warning(Profile(signal_delay_s=delay_s), save_s)
    assert found.verdict == verdict
    if verdict != "ok":  # what is advised is enough
        advised = int(found.mend.partition("signal-delay-s=")[2].partition(",")[0])
        assert check_warning(Profile(signal_delay_s=advised), save_s).verdict == "ok"


@pytest.mark.parametrize(("time", "verdict"), [("4:00:00", "ok"), ("10", "warning"), ("3", "FAIL")])
def test_time_to_work(time: str, verdict: str) -> None:
    assert check_time(Profile(time=time, signal_delay_s=120)).verdict == verdict


# The probe


def probed(slurm: SlurmRunner, capsys: pytest.CaptureFixture[str], uri: str, *sbatch: str) -> Lines:
    Doctor(
        cluster="slurm", preset="demo", probe=True, tracking_uri=uri, sbatch=sbatch or ("gpus=0",)
    )()
    return lines(capsys.readouterr().out)


def test_a_job_looks_around(
    here: Path, slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(403) as uri:
        found = probed(slurm, capsys, uri)
    jobs = {name: verdict for name, (verdict, _) in found.items() if name.startswith("job")}
    assert jobs == {
        "job": "ok",
        "job: disk": "ok",
        "job: code": "ok",
        "job: locks": "ok",
        "job: GPUs": "ok",
        "job: MLflow": "FAIL",
    }
    assert "ran on n1" in found["job"][1]
    # Only the copy of the code stays, which the next launch takes.
    assert [path.name for path in (here / "runs").iterdir()] == [".code"]


def test_a_job_without_its_gpu(slurm: SlurmRunner, capsys: pytest.CaptureFixture[str]) -> None:
    found = probed(slurm, capsys, "sqlite:///mlflow.db", "gpus=1")
    assert found["job: GPUs"][0] == "FAIL" and "0 of the 1" in found["job: GPUs"][1]
    assert "job: MLflow" not in found  # a job must not open it


def test_a_job_that_does_not_start(
    here: Path,
    slurm: SlurmRunner,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "QUEUE_S", 1.0)
    slurm.write("full", "")
    found = probed(slurm, capsys, "sqlite:///mlflow.db")
    assert found["job"][0] == "warning"
    assert "Resources" in found["job"][1] and "2030-01-02T03:04:05" in found["job"][1]
    assert slurm.calls("scancel") == ["901"]
    assert [path.name for path in (here / "runs").iterdir()] == [".code"]


def test_a_job_that_dies(
    slurm: SlurmRunner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ARRIVAL_S", 1.0)
    program = slurm.state.parent / "bin" / "srun"
    program.write_text(program.read_text().replace("exec ", "echo no container >$err; exit 1; "))
    found = probed(slurm, capsys, "sqlite:///mlflow.db")
    assert found["job"][0] == "FAIL" and "no container" in found["job"][1]
    assert "job: disk" not in found


SEEN = {
    "answer": "42",
    "host": "n1",
    "python": "3.12.1",
    "code": "/runs/.code/abc",
    "is_locked": True,
    "torch": "2.9",
    "trouble": "",
    "gpus": ["A100", "A100"],
}


@pytest.mark.parametrize(
    ("change", "name", "verdict"),
    [
        ({}, "job", "ok"),
        ({"answer": "41"}, "job: disk", "FAIL"),
        ({"code": "/home/ann/colddiff"}, "job: code", "FAIL"),
        ({"is_locked": False}, "job: locks", "warning"),
        ({"gpus": ["A100"]}, "job: GPUs", "FAIL"),
        ({"torch": "", "trouble": "no libcuda"}, "job: GPUs", "FAIL"),
        (
            {"tracking": {"name": "MLflow", "verdict": "FAIL", "found": "403", "mend": "…"}},
            "job: MLflow",
            "FAIL",
        ),
    ],
)
def test_what_the_report_means(change: dict[str, Any], name: str, verdict: str) -> None:
    judged = probe.judge(SEEN | change, "42", "/runs/.code/abc", Profile(gpus=2))
    found = {each.name: each.verdict for each in judged}
    assert {key: word for key, word in found.items() if word != "ok" or key == name} == {
        name: verdict
    }


def test_a_line_tells_all() -> None:
    assert str(Check("KillWait", "warning", "5 s", "ask for more")) == (
        "warning  KillWait        5 s -> ask for more"
    )
