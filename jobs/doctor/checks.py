"""Preflight checks of this machine: Python, GPUs, the runs folder's disk, the code."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from colddiff.config import RunConfig
from colddiff.files import write_atomic
from colddiff.machine import git_dirty, git_sha
from jobs.local.slots import find_slots
from jobs.snapshot import source_files

Verdict = Literal["ok", "warning", "FAIL"]
MEASURED_BYTES = 256_000_000
"""A larger state's time to save is worked out from this much of it."""
ENOUGH_RUNS = 10
"""With room for fewer, it is time to look for more."""
FILES_BYTES = 50_000_000
"""What a run keeps beside its checkpoints: journal, samples, logs."""
ONE_MACHINE = frozenset(
    "aufs bcachefs btrfs ecryptfs ext2 ext3 ext4 f2fs jfs overlay ramfs tmpfs ufs xfs zfs".split()
)
"""File systems of one machine, as a rule."""
LOCAL_LOCKS = frozenset(("nolock", "local_lock=all", "local_lock=flock", "localflock"))
"""Mount options of NFS and Lustre with which a file lock holds on its own node only."""
LOOK = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "gpus": names}))
"""
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1], timeout=5):
    print("held", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    verdict: Verdict
    found: str
    mend: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        line = f"{self.verdict:8} {self.name:15} {self.found}"
        return f"{line} -> {self.mend}" if self.mend else line


@dataclass(frozen=True)
class Torch:
    """What torch says of itself, and of the GPUs it sees."""

    torch: str
    cuda: str
    gpus: list[str]


def check_torch() -> tuple[Check, Torch | None]:
    """Whether torch can be imported; asked in a process of its own, which may crash."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    name, python = "Python", ".".join(map(str, sys.version_info[:3]))
    if done.returncode:
        found = f"{python} at {sys.executable} cannot import torch: {last_line(done.stderr)}"
        return Check(name, "FAIL", found, "pip install -e . in the environment of the jobs"), None
    seen = Torch(**json.loads(done.stdout))
    return Check(name, "ok", f"{python}, torch {seen.torch}"), seen


def check_gpus(seen: Torch) -> Check:
    """Whether torch sees the GPUs that local jobs would be given."""
    name, wanted = "GPUs", len([slot for slot in find_slots() if slot.device])
    if len(seen.gpus) < wanted:
        build = f"CUDA {seen.cuda}" if seen.cuda else "the CPU only"
        found = f"{wanted} there, but torch {seen.torch}, built for {build}, sees {len(seen.gpus)}"
        mend = "install the torch for this driver, see https://pytorch.org/get-started"
        return Check(name, "FAIL", found, mend)
    return Check(name, "ok", ", ".join(seen.gpus) or "none here: jobs run on the CPU, one at once")


def state_bytes(config: RunConfig) -> int:
    """The size of a checkpoint: float32 weights, their average and Adam's two moments."""
    from colddiff.restorer import build_restorer

    return 4 * 4 * sum(each.numel() for each in build_restorer(config).parameters())


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = folder.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def check_saving(runs: Path, size: int) -> tuple[Check, float | None]:
    """Whether the runs folder can be written, and the seconds that a checkpoint there takes."""
    folder, part = existing(runs), min(size, MEASURED_BYTES)
    path = folder / f".doctor-{secrets.token_hex(8)}"
    content = os.urandom(part)  # which no file system makes small
    start = time.perf_counter()
    try:
        write_atomic(path, content)
    except OSError as error:
        mend = "give another folder with --runs, with rights and room to write"
        return Check("runs folder", "FAIL", f"{folder} cannot be written: {error}", mend), None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    seconds = (time.perf_counter() - start) * size / part
    found = f"{folder}: a checkpoint of {size / 1e6:.0f} MB is saved in {seconds:.1f} s"
    return Check("runs folder", "ok", found), seconds


def check_space(runs: Path, size: int) -> Check:
    """Whether the disk has room for runs: checkpoints, one being written, weights, the rest."""
    from colddiff.checkpoint import KEPT

    run = (KEPT + 1) * size + size // 4 + FILES_BYTES
    free = shutil.disk_usage(existing(runs)).free
    found = f"{free / 1e9:.1f} GB free, a run takes up to {run / 1e9:.1f} GB"
    mend = "make room, or give another folder with --runs"
    if free >= ENOUGH_RUNS * run:
        return Check("free space", "ok", found)
    return Check("free space", "FAIL" if free < run else "warning", found, mend)


def check_locks(runs: Path) -> Check:
    """Whether a file lock on the runs folder's disk keeps another process out."""
    path = existing(runs) / f".doctor-{secrets.token_hex(8)}.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            trouble = _lock_trouble(holder, path)
        finally:
            holder.kill()
            path.unlink(missing_ok=True)
    if not trouble:
        return Check("file locks", "ok", "keep two processes from working on one run")
    mend = "runs and their ledger need them: mount the disk with locks (NFS 4, Lustre with flock)"
    return Check("file locks", "FAIL", trouble, mend)


def _lock_trouble(holder: subprocess.Popen[str], path: Path) -> str:
    assert holder.stdout and holder.stderr
    if holder.stdout.readline() != "held\n":
        return f"cannot be taken: {last_line(holder.stderr.read())}"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0).lock.release()
        return "two processes got the same one"
    except Timeout:
        pass
    holder.kill()
    holder.wait()
    try:
        lock.acquire(timeout=5).lock.release()
    except Timeout:
        return "stay held when their process has ended"
    return ""


def check_sharing(runs: Path, *, probed: bool) -> Check:
    """Whether the runs folder's disk looks like one that all nodes share."""
    folder = existing(runs).resolve()
    mounts = [
        each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)
    ]
    # The last of equal ones lies over those before it.
    mount = max(reversed(mounts), key=lambda each: len(each.mountpoint), default=None)
    name, kind = "shared disk", mount.fstype if mount else "unknown"
    alone = LOCAL_LOCKS & set(mount.opts.split(",")) if mount else set()
    if alone:
        found = f"{folder} is {kind}, mounted with {', '.join(sorted(alone))}"
        mend = "two nodes can hold one lock there: never work on one run with two launchers"
        return Check(name, "warning", found, mend)
    if kind in ONE_MACHINE and not probed:
        mend = "jobs on other nodes will not see it: take a shared disk, or make sure with --probe"
        return Check(name, "warning", f"{folder} is {kind}, a disk of one machine as a rule", mend)
    return Check(name, "ok", f"{folder} is {kind}")


def check_code(runs: Path) -> Check:
    """Whether the code can be copied for jobs, and whether they will know its commit."""
    try:
        files = source_files(runs)
    except ValueError as error:
        return Check("code", "FAIL", str(error), "or launch from an installed package")
    size = sum(path.lstat().st_size for path in files.values())
    found, sha = f"{len(files)} files, {size / 1e6:.1f} MB", git_sha()
    if not sha:
        mend = "work in a git clone, so that the runs record their commit"
        return Check("code", "warning", f"{found}, no git repository", mend)
    changes = ", with local changes, which runs keep as a diff" if git_dirty() else ""
    return Check("code", "ok", f"{found}, commit {sha[:12]}{changes}")


def last_line(text: str) -> str:
    """What an error's output ends with."""
    return (text.strip().splitlines() or ["no word of why"])[-1]
