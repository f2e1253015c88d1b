"""Slurm's commands as small scripts on PATH, which answer what a test laid down for them."""

from __future__ import annotations

import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from jobs.ledger import Entry, Ledger
from jobs.profiles import Profile
from jobs.tasks import TrainTask

ANSWER = """#!/bin/sh
echo "$(basename "$0") $*" >> "{state}/calls"
test -f "{state}/$(basename "$0").err" && cat "{state}/$(basename "$0").err" >&2 && exit 1
cat "{state}/$(basename "$0").out" 2>/dev/null
exit 0
"""
SBATCH = """#!/bin/sh
echo "sbatch $*" >> "{state}/calls"
test "$1" = --test-only && echo "sbatch: Job 1 to start at now" >&2 && exit 0
number=$(($(cat "{state}/next" 2>/dev/null || echo 900) + 1))
echo $number > "{state}/next"
cp "$1" "{state}/script-$number.sh"
echo "Submitted batch job $number"
"""


class FakeSlurm:
    """What the commands will say, and how they were called."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def queue(self, *lines: str) -> None:
        """``id|state|reason|nodes|start|submitted``, as squeue 22.05 writes them."""
        (self.state / "squeue.out").write_text("".join(f"{line}\n" for line in lines))

    def account(self, *lines: str) -> None:
        """``id|state|code:signal|nodes|elapsed|memory|limit|reason``, as sacct writes them."""
        (self.state / "sacct.out").write_text("".join(f"{line}\n" for line in lines))

    def fail(self, command: str, message: str) -> None:
        (self.state / f"{command}.err").write_text(f"{message}\n")

    def recover(self, command: str) -> None:
        (self.state / f"{command}.err").unlink()

    def calls(self, command: str) -> list[str]:
        """The arguments of each call so far."""
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split(" ")[0] == command]

    def scripts(self) -> list[str]:
        """The submitted batch scripts."""
        paths = sorted(self.state.glob("script-*.sh"), key=lambda path: path.name)
        return [path.read_text() for path in paths]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put the commands first on PATH."""
    programs, state = folder / "bin", folder / "slurm"
    programs.mkdir()
    state.mkdir()
    for name in ("squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "sbatch"):
        program = programs / name
        program.write_text((SBATCH if name == "sbatch" else ANSWER).format(state=state))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (state / "scontrol.out").write_text("MaxArraySize            = 1001\n")
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return FakeSlurm(state)


def submitted(folder: RunFolder, job_id: str = "12", **changes: Any) -> Entry:
    """The ledger has a Slurm job that trains the run."""
    logs = folder.path.parent / "jobs"
    logs.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "run": folder.path.name,
        "kind": "train",
        "cluster": "slurm",
        "job_id": job_id,
        "stdout": str(logs / f"{job_id}_0_log.out"),
        "stderr": str(logs / f"{job_id}_0_log.err"),
        "task": TrainTask(str(folder.path)).to_dict(),
        "profile": Profile(gpus=0, cpus=1, mem="32G", time="4:00:00").to_dict(),
        "time_ms": 1000,
    }
    entry = Entry(**(values | changes))
    Ledger(folder.path.parent).append([entry])
    return entry


def finished(folder: RunFolder, config: RunConfig, *, evaluated: bool = False) -> None:
    """The folder as a complete training leaves it, as far as ``status`` looks."""
    import json

    folder.write_status("finished", config.training.steps, config.training.steps)
    folder.weights.write_bytes(b"")
    if evaluated:
        kinds = {kind: {"rmse": 0.1, "ssim": 0.9, "fid_inception": None} for kind in KINDS}
        settings = asdict(config.evaluation)
        done = {"settings": settings, "step": config.training.steps, "kinds": kinds}
        folder.evaluation.write_text(json.dumps(done))
        folder.samples.mkdir(exist_ok=True)
        (folder.samples / "trajectory.npz").touch()


KINDS = ("degraded", "direct", "sampled")
