"""This process and the machine it runs on: what is recorded of them, and which device to use."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from colddiff.files import read_json
from colddiff.uris import mask_secrets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES = ("torch", "torchvision", "numpy", "mlflow", "submitit", "optuna", "scikit-learn")
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURMD_NODENAME",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
CODE_RECORD = "code.json"
"""Beside the packages in a snapshot: ``git_sha``, ``git_dirty``, ``diff`` and ``digest``."""


def attempt(device: str) -> dict[str, Any]:
    """What there is to know about this process: time, command, code, packages, machine."""
    record = _code_record()
    return {
        "started_ms": int(time.time() * 1000),
        "command": mask_secrets(shlex.join(["python", *sys.orig_argv[1:]])),
        "git_sha": git_sha(),
        "git_dirty": git_dirty(),
        **({"code": record["digest"]} if record else {}),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": gpu(device),
        "slurm": {
            name.removeprefix("SLURM_").lower(): os.environ[name]
            for name in SLURM_VARIABLES
            if name in os.environ
        },
    }


def git_sha() -> str:
    """The code's commit, empty outside a repository; a snapshot's is that of its making."""
    record = _code_record()
    return str(record["git_sha"]) if record else _git_of_code("rev-parse", "HEAD").strip()


def git_dirty() -> bool:
    """Whether tracked files differ from that commit."""
    record = _code_record()
    if record:
        return bool(record["git_dirty"])
    return bool(_git_of_code("status", "--porcelain", "--untracked-files=no"))


def git_diff() -> str:
    """How tracked files differ from that commit, for ``git apply``."""
    record = _code_record()
    if record:
        return str(record["diff"])
    return _git_of_code("diff", "--no-color", "--no-ext-diff", "HEAD")


def git(*arguments: str, errors: str = "replace") -> str:
    """Output of a git command on the source tree, empty where there is no git or repository.

    Args:
        arguments: the command.
        errors: what becomes of bytes that are no UTF-8, as in ``bytes.decode``.
    """
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=_source(),
            capture_output=True,
            encoding="utf-8",
            errors=errors,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _git_of_code(*arguments: str) -> str:
    """As :func:`git`, but empty in a repository that only happens to be around the code.

    The code can be installed into an ignored environment inside a repository of other things.
    """
    return git(*arguments) if git("ls-files", "--", "colddiff") else ""


def _code_record() -> dict[str, Any] | None:
    """What a snapshot says of itself; None for code that is not one."""
    try:
        record: dict[str, Any] = read_json(_source() / CODE_RECORD)
    except FileNotFoundError:
        return None
    return record


def _source() -> Path:
    return Path(__file__).parent.parent


def system_metrics() -> dict[str, float]:
    """Load and memory now, under the names MLflow's own monitor uses.

    They go through the journal like every metric, so they survive a dead tracking server.
    """
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def gpu(device: str) -> str:
    """The name of a CUDA device; empty for others."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name(device))


def computes_bfloat16(device: str) -> bool:
    """Whether a device of this type (``cpu``, ``cuda``) has units for bfloat16.

    Elsewhere PyTorch converts back and forth, or falls back to plain loops: convolutions of a CPU
    with AVX2 alone take seven times as long as in float32 (docs/experiments.md).
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    units = torch.cpu.get_capabilities()
    return any(has and name.endswith("bf16") for name, has in units.items())


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors; nothing with another C library.

    It would give it back to the system, and each training step on a CPU would begin with thousands
    of page faults (docs/experiments.md). The process stays as large as it ever was.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """The host's tensor on ``device``; a GPU gets it from pinned memory, which nobody waits for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
