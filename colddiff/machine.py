"""This process and the machine it runs on: what is recorded of them, and which device to use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from colddiff.uris import mask_secrets

PACKAGES = ("torch", "torchvision", "numpy", "mlflow", "submitit", "optuna", "scikit-learn")
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
)


def attempt(device: str) -> dict[str, Any]:
    """What there is to know about this process: time, command, code, packages, machine."""
    return {
        "started_ms": int(time.time() * 1000),
        "command": mask_secrets(shlex.join(["python", *sys.orig_argv[1:]])),
        "git_sha": git_sha(),
        "git_dirty": git_dirty(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": device,
        "slurm": {
            name.removeprefix("SLURM_").lower(): os.environ[name]
            for name in SLURM_VARIABLES
            if name in os.environ
        },
    }


def git_sha() -> str:
    """The source tree's commit, empty outside a repository."""
    return git("rev-parse", "HEAD").strip()


def git_dirty() -> bool:
    """Whether tracked files differ from that commit."""
    return bool(git("status", "--porcelain", "--untracked-files=no"))


def git(*arguments: str) -> str:
    """Output of a git command on the source tree, empty where there is no git or repository."""
    source = Path(__file__).parent.parent
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=source,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
