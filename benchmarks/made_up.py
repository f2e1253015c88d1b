"""Run folders as training leaves them, without training; and a Slurm of shell scripts."""

from __future__ import annotations

import dataclasses
import math
import random
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colddiff.config import RunConfig
from colddiff.files import write_json
from colddiff.journal import Journal
from colddiff.run_folder import RunFolder
from jobs.ledger import Entry, Ledger
from jobs.profiles import load_profile
from jobs.tasks import TrainTask

KINDS = ("degraded", "direct", "sampled", "sampled[20-10-0]", "sampled[20-4-3-2-1-0]")
ARRAY = 900
"""The made-up Slurm's first job."""
ANSWER = '#!/bin/sh\ncat "{state}/$(basename "$0")" 2>/dev/null\nexit 0\n'
SBATCH = f"""#!/bin/sh
test "$1" = --test-only && echo "sbatch: Job 1 to start at now" >&2 && exit 0
echo "Submitted batch job {ARRAY}"
"""


def evaluation_of(number: int) -> dict[str, Any]:
    """The kinds and samples of an ``evaluation.json``: made-up values, others for each number."""
    draws = random.Random(number)
    names = ("rmse", "ssim", "fid_digits")
    kinds = {kind: {name: draws.random() for name in names} for kind in KINDS}
    return {"samples": 10_000, "kinds": {k: v | {"fid_inception": None} for k, v in kinds.items()}}


def trained_to(folder: RunFolder, config: RunConfig, step: int, records: int) -> None:
    """What is recorded of a training up to ``step``, with at most ``records`` lines of journal."""
    folder.record_attempt(
        device="cpu",
        threads=1,
        resumed_from_step=0,
        data_sha256="0" * 64,
        data_samples=60_000,
    )
    every = math.ceil(step / records / config.training.log_every) * config.training.log_every
    with Journal.open(folder.journal) as journal:
        for k in range(every, step + 1, every):
            values = {"train/loss": 1 / k, "train/gradient_norm": 0.1, "train/learning_rate": 1e-3}
            system = ("cpu_utilization_percentage", "system_memory_usage_megabytes")
            measured = {
                "speed/images_per_second": 700.0,
                **{f"system/{name}": k for name in system},
            }
            journal.append(k, values | measured)
        journal.append(step, {"validation/rmse": 0.13, "validation/ssim": 0.77})


def evaluated_run(
    runs: Path, config: RunConfig, *, seed_of_results: int, records: int
) -> RunFolder:
    """A finished and evaluated run."""
    folder, steps = RunFolder.create(runs, config), config.training.steps
    trained_to(folder, config, steps, records)
    folder.weights.write_bytes(b"")
    folder.write_status("finished", steps, steps)
    facts = {"split": "test", "step": steps, "git_sha": "0" * 40, "git_dirty": False}
    settings = {"settings": dataclasses.asdict(config.evaluation)}
    write_json(folder.evaluation, evaluation_of(seed_of_results) | facts | settings)
    return folder


def running_run(runs: Path, config: RunConfig, *, records: int) -> RunFolder:
    """A run in the middle of its training."""
    folder, half = RunFolder.create(runs, config), config.training.steps // 2
    trained_to(folder, config, half, records)
    folder.write_status("running", half, config.training.steps)
    return folder


class MadeUpSlurm:
    """Slurm's commands as shell scripts in ``folder``, which takes in what it is given."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.state = folder / "bin", folder / "slurm"
        self.programs.mkdir()
        self.state.mkdir()
        for name in ("squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "sbatch"):
            program = self.programs / name
            program.write_text(SBATCH if name == "sbatch" else ANSWER.format(state=self.state))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (self.state / "scontrol").write_text("MaxArraySize            = 1001\n")

    def knows(self, runs: Path, running: Sequence[RunFolder], ended: Sequence[RunFolder]) -> None:
        """The ledger has one array of all; squeue tells of those that run, sacct of the others."""
        profile, logs = load_profile("cpu").to_dict(), runs / "jobs"
        logs.mkdir()
        entries, queue, accounts = [], [], []
        for number, folder in enumerate([*running, *ended]):
            job = f"{ARRAY}_{number}"
            out, err = (logs / f"{job}_0_log.{end}" for end in ("out", "err"))
            err.write_text("2030-01-01 00:00:00 train\n")
            task = TrainTask(str(folder.path.absolute())).to_dict()
            entries.append(
                Entry(
                    run=folder.path.name,
                    kind="train",
                    cluster="slurm",
                    job_id=job,
                    stdout=str(out),
                    stderr=str(err),
                    task=task,
                    profile=profile,
                )
            )
            times = "2030-01-01T00:00:00|2030-01-01T00:00:00"
            if number < len(running):
                queue.append(f"{job}|RUNNING|None|node{number}|{times}\n")
            else:
                end = f"node{number}|01:00:00|8G|04:00:00|None"
                accounts.append(f"{job}|COMPLETED|0:0|{end}\n")
        Ledger(runs).append(entries)
        (self.state / "squeue").write_text("".join(queue))
        (self.state / "sacct").write_text("".join(accounts))
