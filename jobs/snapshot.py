"""A copy of the code for the jobs, which an edit of the working tree does not change.

It lies in ``<runs>/.code/<digest>/``, named after its content, so equal code is copied once; its
``code.json`` has the commit and the local changes, which jobs report as theirs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colddiff.files import read_json, write_json
from colddiff.machine import CODE_RECORD, git, git_diff, git_dirty, git_sha

LARGEST_BYTES = 100_000_000
PACKAGES = ("colddiff", "jobs", "analysis", "sweeps")
State = dict[str, str | bool]
Files = dict[str, Path]
"""Where each file lies, by its path in the snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code."""

    digest: str
    path: Path
    """Its folder, absolute."""


def snapshot(runs: Path) -> Snapshot:
    """The snapshot of the code as it is now, made if there is none.

    Raises:
        ValueError: naming the biggest files, where the source tree is larger than 100 MB; or the
            snapshot, where its files were changed or removed since.
    """
    files = source_files(runs)
    state: State = {"git_sha": git_sha(), "git_dirty": git_dirty(), "diff": git_diff()}
    path = _place(runs, _digest(files))
    if not path.is_dir():
        path = _copy(files, path.parent, state)
    elif _digest({name: path / name for name in files}) != path.name:
        raise ValueError(
            f"{path} is no longer the code it was: delete it, and this makes it again. Jobs in "
            "the queue need it"
        )
    elif not state["git_dirty"] and read_json(path / CODE_RECORD)["git_dirty"]:
        # The same code, committed since: its commit says it all.
        write_json(path / CODE_RECORD, state | {"digest": path.name})
    return Snapshot(path.name, path)


def code_path(runs: Path) -> Path:
    """Where the snapshot of the code as it is now lies, or would; raises as :func:`snapshot`."""
    return _place(runs, _digest(source_files(runs)))


def link(run_folder: Path, code: Snapshot) -> None:
    """Point ``code`` in the run folder to the snapshot, in place of an older one."""
    target = os.path.relpath(code.path.resolve(), run_folder.resolve())
    temporary = run_folder / f".code.{secrets.token_hex(8)}.tmp"
    temporary.symlink_to(target)
    temporary.replace(run_folder / "code")


def source_files(runs: Path) -> Files:
    """What a snapshot consists of: the source tree without ignored files and runs.

    Where git does not know the code, it is the packages as they are imported.

    Raises:
        ValueError: where that is too much, or ``runs`` has the source tree in it.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / CODE_RECORD).is_file():  # a snapshot itself: a job submits others
        found = {name: path for name, path in _below(root, "") if name != CODE_RECORD}
    else:
        found = _tracked(root, runs) or dict(_imported())
    files = {name: found[name] for name in sorted(found)}
    sizes = {name: path.lstat().st_size for name, path in files.items()}
    if sum(sizes.values()) > LARGEST_BYTES:
        biggest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in biggest)
        raise ValueError(
            f"the source tree {root} has {sum(sizes.values()) / 1e6:.0f} MB, and jobs get a copy "
            f"of at most {LARGEST_BYTES / 1e6:.0f}: add what is no code to .gitignore. The "
            f"biggest files: {listed}"
        )
    return files


def _tracked(root: Path, runs: Path) -> Files:
    """The source tree's files that git does not ignore; none where it does not know the code."""
    selection = ("--cached", "--others", "--exclude-standard", "-z")
    names = git("ls-files", *selection, errors="surrogateescape").split("\0")
    if "jobs/snapshot.py" not in names:
        return {}
    named = runs.absolute()
    folders = (named.resolve(), named.parent.resolve() / named.name)  # it can be a link
    if root.is_relative_to(folders[0]):
        raise ValueError(f"--runs {runs} has the source tree in it: give a folder of its own")
    files = {name: root / name for name in names if name}
    return {
        name: path
        for name, path in files.items()
        # Not what was deleted, nor repositories inside this one.
        if (path.is_symlink() or path.is_file())
        and not any(path.is_relative_to(folder) for folder in folders)
    }


def _imported() -> Iterator[tuple[str, Path]]:
    """The packages' files, wherever they are installed."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            yield from _below(Path(place), f"{package}/")


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if "__pycache__" not in name.parts and (path.is_symlink() or path.is_file()):
            yield f"{prefix}{name.as_posix()}", path


def _digest(files: Files) -> str:
    """SHA-256 of names, kinds and contents, as git has them: permissions are x or none."""
    total = hashlib.sha256()
    for name, path in files.items():
        kind, content = _content(path)
        head = f"{kind} {len(content)} ".encode() + os.fsencode(name) + b"\0"
        total.update(head)
        total.update(content)
    return total.hexdigest()


def _content(path: Path) -> tuple[str, bytes]:
    try:
        if path.is_symlink():
            return "link", os.fsencode(path.readlink())
        return ("program" if path.stat().st_mode & stat.S_IXUSR else "file"), path.read_bytes()
    except FileNotFoundError:
        return "absent", b""


def _place(runs: Path, digest: str) -> Path:
    return runs.absolute() / ".code" / digest


def _copy(files: Files, folder: Path, state: State) -> Path:
    """Copy beside the final place and rename: what is there under its name is complete."""
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        for name, source in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
        # Of the copies, because a file can be edited in between.
        digest = _digest({name: temporary / name for name in files})
        write_json(temporary / CODE_RECORD, state | {"digest": digest})
        path = folder / digest
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
        return path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
