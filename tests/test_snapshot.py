"""The code that jobs run: a copy that stays as it was, and knows what it was."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import jobs.snapshot
from colddiff import machine
from jobs.snapshot import Snapshot, code_path, link, snapshot

PROJECT = Path(__file__).parent.parent


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def commit(folder: Path, message: str = "work") -> str:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of this code without git, which the code believes to lie in."""
    source = tmp_path / "source"
    without = shutil.ignore_patterns("__pycache__")
    for package in ("colddiff", "jobs"):
        shutil.copytree(PROJECT / package, source / package, ignore=without)
    monkeypatch.setattr(machine, "__file__", str(source / "colddiff" / "machine.py"))
    monkeypatch.setattr(jobs.snapshot, "__file__", str(source / "jobs" / "snapshot.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return source


@pytest.fixture
def source(plain: Path) -> Path:
    """The same as a repository; its runs are not ignored."""
    git(plain, "init", "--quiet")
    (plain / ".gitignore").write_text("__pycache__/\n*.secret\n/data/\n")
    (plain / "script.sh").write_text("#!/bin/sh\n")
    (plain / "script.sh").chmod(0o755)
    (plain / "notes.txt").write_text("first\n")
    (plain / "latest").symlink_to("notes.txt")
    (plain / "folder").symlink_to("colddiff")
    commit(plain, "first")
    return plain


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below: its bytes, or where it links to."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def record(code: Snapshot) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((code.path / "code.json").read_text())
    return value


def test_it_has_the_files_as_they_are_on_disk(source: Path) -> None:
    (source / "notes.txt").write_text("edited\n")
    (source / "größe\n.txt").write_text("untracked, with a trying name")
    (source / os.fsdecode(b"caf\xe9")).write_text("no UTF-8")
    (source / "jobs" / "status.py").unlink()
    expected = contents(source)
    (source / "key.secret").write_text("ignored")
    (source / "data").mkdir()
    (source / "data" / "images").write_text("ignored")
    (source / "colddiff" / "__pycache__").mkdir()
    (source / "colddiff" / "__pycache__" / "a.pyc").write_text("ignored")
    (source / "runs" / "run-1").mkdir(parents=True)
    (source / "runs" / "run-1" / "config.json").write_text("no code, though not ignored")
    code = snapshot(source / "runs")
    assert code.path == source / "runs" / ".code" / code.digest
    copied = contents(code.path)
    copied.pop("code.json")
    git_files = {name for name in expected if name.startswith(".git/")}
    assert copied == {name: value for name, value in expected.items() if name not in git_files}
    assert os.access(code.path / "script.sh", os.X_OK)
    assert not (code.path / "notes.txt").stat().st_mode & 0o111
    assert [path.name for path in code.path.parent.iterdir()] == [code.digest]


def test_runs_that_are_a_link_are_left_out(source: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch" / "run-1").mkdir(parents=True)
    (tmp_path / "scratch" / "run-1" / "config.json").write_text("{}")
    before = code_path(source / "runs")
    (source / "runs").symlink_to(tmp_path / "scratch")
    code = snapshot(source / "runs")
    assert code.digest == before.name
    assert not (code.path / "runs").is_symlink()
    (source / "runs").unlink()
    (source / "inside").mkdir()
    (source / "inside" / "config.json").write_text("{}")
    (tmp_path / "runs").symlink_to(source / "inside")
    assert snapshot(tmp_path / "runs").digest == code.digest


def test_runs_below_a_linked_tree_are_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line may name the tree by one path, and Python by another."""
    before = code_path(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(source)
    monkeypatch.chdir(tmp_path / "linked")
    (source / "runs").mkdir()
    (source / "runs" / "a.json").write_text("{}")
    linked = str(tmp_path / "linked" / "jobs" / "snapshot.py")
    monkeypatch.setattr(jobs.snapshot, "__file__", linked)
    assert snapshot(Path("runs")).digest == before.name
    assert snapshot(tmp_path / "linked" / "runs").digest == before.name
    (source / "runs").rename(tmp_path / "scratch")
    (source / "runs").symlink_to(tmp_path / "scratch")
    assert snapshot(tmp_path / "linked" / "runs").digest == before.name


@pytest.mark.parametrize("runs", [".", "..", "source"])
def test_runs_must_not_contain_the_tree(
    runs: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source if runs.startswith(".") else source.parent)
    with pytest.raises(ValueError, match=r"--runs .* has the source tree in it"):
        snapshot(Path(runs))
    assert not (source / ".code").exists()


def test_an_edit_changes_no_snapshot(source: Path, tmp_path: Path) -> None:
    first = snapshot(tmp_path / "runs")
    before = contents(first.path)
    (source / "notes.txt").write_text("second\n")
    (source / "new.py").write_text("")
    (source / "script.sh").chmod(0o644)
    second = snapshot(tmp_path / "runs")
    assert contents(first.path) == before
    assert (second.path / "notes.txt").read_text() == "second\n"
    assert os.access(first.path / "script.sh", os.X_OK)
    assert first.digest != second.digest


def test_equal_code_is_copied_once(source: Path, tmp_path: Path) -> None:
    first = snapshot(tmp_path / "runs")
    said = record(first)
    (first.path / "mark").write_text("of the first")
    os.utime(source / "notes.txt", (1, 1))
    (source / "key.secret").write_text("ignored")
    commit(source)
    assert snapshot(tmp_path / "runs") == first
    assert code_path(tmp_path / "runs") == first.path
    assert (first.path / "mark").exists()
    assert record(first) == said
    assert len(list(first.path.parent.iterdir())) == 1


def rename(source: Path) -> None:
    (source / "notes.txt").rename(source / "nodes.txt")


def retarget(source: Path) -> None:
    (source / "latest").unlink()
    (source / "latest").symlink_to("script.sh")


def unlink_but_same_content(source: Path) -> None:
    (source / "latest").unlink()
    (source / "latest").write_text("notes.txt")


@pytest.mark.parametrize(
    "change",
    [
        lambda source: (source / "notes.txt").write_text("First\n"),
        lambda source: (source / "notes.txt").unlink(),
        lambda source: (source / "notes.txt").chmod(0o755),
        lambda source: (source / "untracked").write_text(""),
        rename,
        retarget,
        unlink_but_same_content,
    ],
)
def test_every_change_gives_another_digest(change: Any, source: Path, tmp_path: Path) -> None:
    before = code_path(tmp_path / "runs")
    change(source)
    assert code_path(tmp_path / "runs") != before
    assert snapshot(tmp_path / "runs").path == code_path(tmp_path / "runs")


def test_bytes_cannot_move_between_files_unnoticed(source: Path, tmp_path: Path) -> None:
    seen = set()
    for a, b in (("x", "yz"), ("xy", "z"), ("xyz", ""), ("", "xyz")):
        (source / "a").write_text(a)
        (source / "b").write_text(b)
        seen.add(code_path(tmp_path / "runs"))
    assert len(seen) == 4


def test_asking_for_the_path_makes_nothing(source: Path) -> None:
    assert code_path(source / "runs").parent == source / "runs" / ".code"
    assert not (source / "runs").exists()


def test_the_record_is_that_of_the_code(source: Path, tmp_path: Path) -> None:
    sha = git(source, "rev-parse", "HEAD").strip()
    clean = snapshot(tmp_path / "runs")
    assert record(clean) == {
        "git_sha": sha,
        "git_dirty": False,
        "diff": "",
        "digest": clean.digest,
    }
    (source / "notes.txt").write_text("größer\n")
    dirty = snapshot(tmp_path / "runs")
    assert record(dirty)["git_sha"] == sha
    assert record(dirty)["git_dirty"] is True
    (tmp_path / "a.diff").write_text(record(dirty)["diff"])
    git(source, "checkout", "--quiet", "--", ".")
    git(source, "apply", str(tmp_path / "a.diff"))
    assert (source / "notes.txt").read_text() == "größer\n"


def test_code_that_was_committed_since_is_clean(source: Path, tmp_path: Path) -> None:
    (source / "notes.txt").write_text("edited\n")
    code = snapshot(tmp_path / "runs")
    assert record(code)["git_dirty"] is True
    sha = commit(source)
    assert snapshot(tmp_path / "runs") == code
    assert record(code) == {
        "git_sha": sha,
        "git_dirty": False,
        "diff": "",
        "digest": code.digest,
    }
    (source / "other.txt").write_text("")
    commit(source)
    (source / "other.txt").unlink()  # the same code again, as a change of a later commit
    assert snapshot(tmp_path / "runs") == code
    assert record(code)["git_sha"] == sha


def test_without_git_it_has_the_imported_packages(plain: Path, tmp_path: Path) -> None:
    code = snapshot(tmp_path / "runs")
    assert plain.is_dir()
    names = set(contents(code.path))
    assert {path.name for path in code.path.iterdir()} == {
        "colddiff",
        "jobs",
        "analysis",
        "sweeps",
        "code.json",
    }
    assert {"colddiff/__init__.py", "colddiff/py.typed", "jobs/profiles/gpu.toml"} <= names
    assert any(name.startswith("colddiff/assets/") for name in names)
    assert not [name for name in names if "__pycache__" in name]
    assert record(code) == {"git_sha": "", "git_dirty": False, "diff": "", "digest": code.digest}
    assert snapshot(tmp_path / "runs") == code


def test_a_repository_around_installed_code_is_not_its_own(plain: Path, tmp_path: Path) -> None:
    git(plain, "init", "--quiet")
    (plain / ".gitignore").write_text("/colddiff/\n/jobs/\n")
    (plain / "thesis.tex").write_text("")
    commit(plain)
    code = snapshot(tmp_path / "runs")
    assert record(code)["git_sha"] == ""
    assert not (code.path / "thesis.tex").exists()
    assert (code.path / "colddiff" / "machine.py").exists()


def test_too_much_is_refused_with_its_names(source: Path) -> None:
    with (source / "weights.bin").open("wb") as file:
        file.truncate(90_000_000)
    with (source / "images.npz").open("wb") as file:
        file.truncate(10_000_001)
    words = r"101 MB.*\.gitignore.*: weights\.bin \(90\.0 MB\), images\.npz \(10\.0 MB\)"
    with pytest.raises(ValueError, match=words):
        snapshot(source / "runs")
    assert not (source / "runs").exists()
    (source / ".gitignore").write_text("weights.bin\nimages.npz\n")
    assert not (snapshot(source / "runs").path / "weights.bin").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("edited")])
def test_a_damaged_snapshot_is_not_used(damage: Any, source: Path, tmp_path: Path) -> None:
    assert source.is_dir()
    code = snapshot(tmp_path / "runs")
    damage(code.path / "colddiff" / "files.py")
    with pytest.raises(ValueError, match=re.escape(f"{code.path} is no longer the code it was")):
        snapshot(tmp_path / "runs")
    shutil.rmtree(code.path)
    assert snapshot(tmp_path / "runs") == code


def test_those_made_at_once_agree(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source.is_dir()
    together = threading.Barrier(4, timeout=60)
    move = Path.rename

    def all_at_once(self: Path, target: Path) -> Path:
        together.wait()  # every one has a complete copy before the first is put in its place
        return move(self, target)

    monkeypatch.setattr(Path, "rename", all_at_once)
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(snapshot, [tmp_path / "runs"] * 4))
    assert len(made) == 1
    code = made.pop()
    assert [path.name for path in code.path.parent.iterdir()] == [code.digest]
    assert snapshot(tmp_path / "runs") == code


@pytest.mark.parametrize("step", ["shutil.copy", "pathlib.Path.rename"])
def test_a_full_disk_leaves_nothing(
    step: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert source.is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OSError, match="No space left"):
            snapshot(tmp_path / "runs")
    folder = tmp_path / "runs" / ".code"
    assert not folder.exists() or list(folder.iterdir()) == []
    assert snapshot(tmp_path / "runs").path.is_dir()


def test_an_edit_while_copying_does_not_mix_up_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "notes.txt").write_text("edited just before\n")
    expected = code_path(tmp_path / "runs")
    (source / "notes.txt").write_text("first\n")
    copy = shutil.copy

    def edited(path: Path, target: Path, **options: Any) -> None:
        if path.name == "notes.txt":
            path.write_text("edited just before\n")
        copy(path, target, **options)
        if path.name == "notes.txt":
            path.write_text("edited just after\n")

    monkeypatch.setattr(shutil, "copy", edited)
    code = snapshot(tmp_path / "runs")
    assert (code.path / "notes.txt").read_text() == "edited just before\n"
    assert code == Snapshot(expected.name, expected)
    assert record(code)["digest"] == code.digest


# Links


def test_a_run_points_to_its_code(source: Path, tmp_path: Path) -> None:
    runs, run = tmp_path / "runs", tmp_path / "runs" / "run-1"
    run.mkdir(parents=True)
    first = snapshot(runs)
    link(run, first)
    assert str((run / "code").readlink()) == f"../.code/{first.digest}"
    (source / "notes.txt").write_text("second\n")
    second = snapshot(runs)
    link(run, second)
    link(run, second)
    assert str((run / "code").readlink()) == f"../.code/{second.digest}"
    assert [path.name for path in run.iterdir()] == ["code"]
    runs.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "run-1" / "code" / "notes.txt").read_text() == "second\n"


def test_a_run_folder_that_is_a_link_points_there_too(source: Path, tmp_path: Path) -> None:
    assert source.is_dir()
    (tmp_path / "far" / "away" / "run-1").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run-1").symlink_to(tmp_path / "far" / "away" / "run-1")
    code = snapshot(tmp_path / "runs")
    link(tmp_path / "runs" / "run-1", code)
    assert (tmp_path / "runs" / "run-1" / "code").resolve() == code.path.resolve()


def test_links_below_linked_runs_stay_short(source: Path, tmp_path: Path) -> None:
    assert source.is_dir()
    (tmp_path / "scratch" / "run-1").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    code = snapshot(tmp_path / "runs")
    link(tmp_path / "runs" / "run-1", code)
    assert str((tmp_path / "scratch" / "run-1" / "code").readlink()) == f"../.code/{code.digest}"


# Jobs


def job(code: Snapshot, cwd: Path, program: str) -> Any:
    """What a process like a job prints, as JSON."""
    environment = os.environ | {"PYTHONPATH": str(code.path), "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # jobs leave their caches in the snapshot
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


REPORT = """
import json, colddiff.files, jobs.profiles
from colddiff.machine import attempt, git_diff
print(json.dumps([colddiff.files.__file__, jobs.profiles.__file__, attempt("cpu"), git_diff()]))
"""


@pytest.mark.parametrize("runs", ["runs", "ignored"])
def test_a_job_runs_the_snapshot_and_reports_its_commit(runs: str, source: Path) -> None:
    with (source / ".gitignore").open("a") as file:
        file.write("/ignored/\n")
    sha = commit(source)
    (source / "notes.txt").write_text("edited\n")
    difference = git(source, "diff", "HEAD")
    code = snapshot(source / runs)
    (source / "colddiff" / "files.py").write_text("raise SystemExit('not the snapshot')")
    assert commit(source) != sha
    (source / "notes.txt").write_text("edited again\n")
    where, profiles, attempt, diff = job(code, source, REPORT)
    assert Path(where) == code.path / "colddiff" / "files.py"
    assert Path(profiles) == code.path / "jobs" / "profiles.py"
    assert (attempt["git_sha"], attempt["git_dirty"]) == (sha, True)
    assert attempt["code"] == code.digest
    assert diff == difference


@pytest.mark.parametrize("folder", ["runs", "../elsewhere"])
def test_a_job_can_submit_others_with_its_own_code(folder: str, source: Path) -> None:
    (source / "notes.txt").write_text("edited\n")
    code = snapshot(source / "runs")
    expected = record(code)
    (source / "notes.txt").write_text("edited again\n")
    commit(source)
    runs = source / folder
    program = (
        "import json; from pathlib import Path; from jobs.snapshot import snapshot\n"
        f"print(json.dumps(str(snapshot(Path({str(runs)!r})).path)))"
    )
    path = Path(job(code, source, program))
    assert path == runs / ".code" / code.digest
    assert record(Snapshot(code.digest, path)) == expected
