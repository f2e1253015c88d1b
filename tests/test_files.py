"""Whole-file writes: the old file or the new, never a part, whatever happens."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colddiff.files import read_json, sync_folder, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "status.json"
    path.write_bytes(b"old")
    return path


def test_bytes_and_text(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"\x00\xff")
    write_atomic(tmp_path / "b", "größer\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "größer\n".encode()
    assert names(tmp_path) == ["a", "b"]


def test_folders_are_made_and_files_replaced(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x" / "config.json"
    write_atomic(path, "long first content")
    write_atomic(path, "short")
    assert path.read_text() == "short"
    assert names(path.parent) == ["config.json"]


def assert_unchanged(target: Path) -> None:
    assert target.read_bytes() == b"old"
    assert names(target.parent) == [target.name]


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_an_error_before_the_end_leaves_the_old_file(
    step: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"new")
    assert_unchanged(target)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_ctrl_c_leaves_the_old_file(
    step: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, b"new")
    assert_unchanged(target)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 kB: a write then fails halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_halfway_leaves_the_old_file(target: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        write_atomic(target, bytes(200_000))
    assert_unchanged(target)


def test_the_content_is_on_disk_before_the_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, then the rename, then fsync of the folder."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        size = os.fstat(descriptor).st_size if kind == "file" else 0
        events.append(f"fsync {kind} {size}")
        fsync(descriptor)

    def watched_replace(self: Path, other: Path) -> Path:
        events.append(f"replace {self.parent == other.parent}")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomic(target, b"new content")
    assert events == ["fsync file 11", "replace True", "fsync folder 0"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_link_is_replaced_not_followed(target: Path) -> None:
    link = target.parent / "link"
    link.symlink_to(target)
    write_atomic(link, b"new")
    assert not link.is_symlink()
    assert (link.read_bytes(), target.read_bytes()) == (b"new", b"old")


def test_many_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    contents = {bytes([65 + i]) * 50_000 for i in range(4)}
    seen: set[bytes] = set()

    def write(content: bytes) -> None:
        for _ in range(10):
            write_atomic(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    write_atomic(path, min(contents))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    assert seen <= contents
    assert names(tmp_path) == ["status.json"]


def test_killed_writers_leave_one_of_the_two_files(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    code = (
        "import sys; from pathlib import Path; from colddiff.files import write_atomic\n"
        "for i in range(10**9): write_atomic(Path(sys.argv[1]), 'ab'[i % 2] * 3_000_000)"
    )
    root = str(Path(__file__).parent.parent)
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": root}
        )
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = path.read_text()
        assert len(text) == 3_000_000
        assert text in ("a" * len(text), "b" * len(text))


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "größer"}, "nan": math.nan, "inf": math.inf}
    write_json(tmp_path / "x.json", value)
    read = read_json(tmp_path / "x.json")
    assert math.isnan(read.pop("nan"))
    assert read == {k: v for k, v in value.items() if k != "nan"}
    text = (tmp_path / "x.json").read_text()
    assert text.startswith('{\n  "a": [')
    assert text.endswith("}\n")


def test_what_is_no_json_leaves_the_old_file(target: Path) -> None:
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    assert_unchanged(target)
    with pytest.raises(ValueError, match="Expecting value"):
        read_json(target)
    with pytest.raises(FileNotFoundError):
        read_json(target.parent / "absent")


def test_sync_folder_needs_a_folder(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "absent")
