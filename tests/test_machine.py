"""What is recorded of a process: packages, machine, and the code with its local changes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny

from colddiff import machine
from colddiff.machine import attempt, processor, system_metrics
from colddiff.run_folder import RunFolder


def test_an_attempt_says_what_ran_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "jobs/launch.py", "train"])
    value = attempt("cuda")
    value["packages"]["torch"] = value["packages"]["torch"].split("+")[0]
    assert value["packages"] == {
        "torch": torch.__version__.split("+")[0],
        "no-such-package": "",
    }
    assert value["device"] == "cuda"
    assert value["python"] == ".".join(map(str, sys.version_info[:3]))
    assert value["host"] == os.uname().nodename
    assert value["command"] == "python jobs/launch.py train"
    assert abs(value["started_ms"] / 1000 - time.time()) < 60
    assert value["cores"] == os.cpu_count()
    assert isinstance(value["processor"], str)
    assert "code" not in value
    json.dumps(value)


def test_an_attempt_on_a_gpu_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt("cpu")["gpu"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"cuda:0": "NVIDIA A100", "cuda:1": "NVIDIA H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert [attempt(device)["gpu"] for device in ("cuda:1", "cpu")] == ["NVIDIA H100", ""]


def test_an_attempt_on_slurm_says_which_job_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURMD_NODENAME": "c1",
    }
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    assert attempt("cpu")["slurm"] == {}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = {"job_id": "12", "job_num_nodes": "2", "ntasks": "4", "slurmd_nodename": "c1"}
    assert attempt("cpu")["slurm"] == expected
    # Several nodes of a test cluster are one host, and a site's names for nodes are Slurm's.
    assert attempt("cpu")["host"] == "c1"


def test_processor_is_the_platforms_word_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(platform, "processor", lambda: "abacus")
    assert processor() == "abacus"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", tiny())


def record(folder: RunFolder) -> None:
    folder.record_attempt(
        device="cpu", threads=1, resumed_from_step=0, data_sha256="ab", data_samples=1
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the package believes to lie in."""
    source = tmp_path / "source"
    (source / "colddiff").mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(source / "colddiff" / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return source


@pytest.fixture
def repository(source: Path) -> Path:
    git(source, "init", "--quiet")
    # The last lines are blank, so a diff ends with lines of a single space.
    (source / "colddiff" / "code.py").write_text("a = 1\nb = 2\n\n\n")
    (source / "notes.txt").write_bytes(b"caf\xe9 latin-1\n")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "-m", "first")
    return source


@pytest.mark.usefixtures("source")
def test_git_is_absent_outside_a_repository(folder: RunFolder) -> None:
    record(folder)
    assert (attempt("cpu")["git_sha"], attempt("cpu")["git_dirty"]) == ("", False)
    assert not (folder.path / "environment.diff").exists()


@pytest.mark.usefixtures("repository")
def test_git_need_not_be_installed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    record(folder)
    assert (attempt("cpu")["git_sha"], attempt("cpu")["git_dirty"]) == ("", False)


def test_a_clean_tree(folder: RunFolder, repository: Path) -> None:
    (repository / "untracked.txt").write_text("no part of the code")
    record(folder)
    value = attempt("cpu")
    assert value["git_sha"] == git(repository, "rev-parse", "HEAD").strip()
    assert value["git_dirty"] is False
    assert not (folder.path / "environment.diff").exists()


def test_a_repository_around_the_code_is_not_its_own(repository: Path) -> None:
    """The package may be installed into an ignored environment of another project."""
    git(repository, "rm", "-r", "--quiet", "--cached", "colddiff")
    (repository / ".gitignore").write_text("/colddiff/\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "no code of ours")
    (repository / "notes.txt").write_text("edited")
    assert (machine.git_sha(), machine.git_dirty(), machine.git_diff()) == ("", False, "")


def test_a_snapshot_reports_what_it_was_made_of(repository: Path) -> None:
    (repository / "notes.txt").write_text("edited")
    assert machine.git_dirty()
    said = {"git_sha": "abc", "git_dirty": False, "diff": "", "digest": "0123"}
    (repository / "code.json").write_text(json.dumps(said))
    value = attempt("cpu")
    assert (value["git_sha"], value["git_dirty"], value["code"]) == ("abc", False, "0123")
    assert machine.git_diff() == ""
    said |= {"git_dirty": True, "diff": "--- a\n"}
    (repository / "code.json").write_text(json.dumps(said))
    assert (machine.git_dirty(), machine.git_diff()) == (True, "--- a\n")


def test_the_diff_of_a_dirty_tree_can_be_applied(folder: RunFolder, repository: Path) -> None:
    git(repository, "config", "color.ui", "always")
    code = repository / "colddiff" / "code.py"
    code.write_text("a = 1\nb = 3  # größer\n\n\n")
    record(folder)
    assert attempt("cpu")["git_dirty"] is True
    git(repository, "checkout", "--quiet", "--", ".")
    git(repository, "apply", str(folder.path / "environment.diff"))
    assert code.read_text() == "a = 1\nb = 3  # größer\n\n\n"


def test_a_diff_in_another_encoding_is_no_error(folder: RunFolder, repository: Path) -> None:
    (repository / "notes.txt").write_bytes(b"caf\xe9\n")
    record(folder)
    assert "caf\ufffd" in (folder.path / "environment.diff").read_text()


def test_system_metrics_are_percentages_and_megabytes() -> None:
    metrics = system_metrics()
    assert set(metrics) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
    }
    for name, value in metrics.items():
        assert 0 <= value <= (100 if name.endswith("percentage") else 1e9)


PAGES = """
import resource, sys, torch
from colddiff.optimisation import resolve_device
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    resolve_device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(10_000_000).sum()
before = faults()
for _ in range(10):
    torch.ones(10_000_000).sum()  # 40 MB, 10,000 pages
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_work_on_a_cpu_keeps_freed_memory() -> None:
    found = {}
    for way in ("given back", "kept"):
        command = [sys.executable, "-c", PAGES, way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = int(done.stdout)
    # Of huge pages there would be fewer faults, but more than of memory that is there.
    assert found["kept"] < 20 <= found["given back"]
