"""What the tests on the real cluster share: real commands, real faults, and what must be equal."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import run_comparison
from slurm_cluster import SlurmCluster
from tiny import replaced, tiny
from tracking_helpers import assert_exactly_the_journal

from colddiff.config import RunConfig
from colddiff.files import read_json
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
PATIENCE_S = 400.0
PROFILE = """
partition = "low"
gpus = 0
cpus = 1
mem = "1800M"
time = "0:30:00"
signal_delay_s = 60
setup = ["export OMP_NUM_THREADS=1"]
"""


def config(steps: int = 900, **training: int) -> RunConfig:
    """A run of about ten seconds that hardly ever saves by itself."""
    settings = {"log_every": 20, "validate_every": 300, "checkpoint_every": 100_000}
    made = tiny(steps=steps, **(settings | training))
    return replaced(made, "evaluation", samples=20, images=12)


def wait_for(what: str, condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.1)


@dataclass
class Site:
    """A user's working folder on the cluster."""

    place: Path
    slurm: SlurmCluster
    uri: str
    experiment: str = "cluster"
    source: Path = ROOT
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "site.toml").write_text(PROFILE)

    @property
    def runs(self) -> Path:
        return self.place / "runs"

    @property
    def environment(self) -> dict[str, str]:
        values = {**os.environ, **self.slurm.environment, **self.extra, "OMP_NUM_THREADS": "1"}
        values["MLFLOW_TRACKING_URI"] = self.uri
        return values

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.source / "jobs" / "launch.py"), *words]
        return subprocess.Popen(
            command,
            cwd=self.place,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, *words: str, code: int = 0) -> str:
        """A command of the suite, to its end; what it said."""
        process = self.start(*words)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == code, f"{words}: exit code {process.returncode}\n{said}"
        return said

    def train(self, run: RunConfig, *words: str, code: int = 0) -> str:
        (self.place / "run.json").write_text(run.to_json())
        return self.launch(
            "train", "--config", "run.json", "--cluster", "slurm", "--profile", "site.toml",
            "--experiment", self.experiment, *words, code=code,
        )  # fmt: skip

    def command(self, *words: str) -> str:
        """One of Slurm's own commands."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def folder(self, run: RunConfig) -> RunFolder:
        return RunFolder(self.runs / run.run_id)

    def job(self, folder: RunFolder) -> str:
        return str(read_json(folder.path / "submission-train.json")["job_id"])

    def node(self, folder: RunFolder) -> str:
        return self.command("squeue", "-h", "-o", "%N", "-j", self.job(folder)).strip()

    def state(self, folder: RunFolder) -> str:
        """Slurm's state of the run's job, also of one that has ended."""
        job = self.job(folder)
        living = subprocess.run(
            ["squeue", "-h", "--array", "-o", "%T", "-j", job],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        states = living.stdout.split() or self.command(
            "sacct", "-X", "-n", "-P", "-o", "State", "-j", job
        ).split("\n")
        return states[0].split(" ")[0]

    def preempt(self, folder: RunFolder) -> None:
        """A job of a higher partition takes the run's nodes, for a moment."""
        nodes = self.node(folder)
        count = len(self.command("scontrol", "show", "hostnames", nodes).split())
        self.command(
            "sbatch", "-p", "high", f"--nodelist={nodes}", f"-N{count}", "--exclusive",
            "--output=/dev/null", "--wrap", "sleep 1",
        )  # fmt: skip
        wait_for("the preemption", lambda: self.state(folder) != "RUNNING")

    def wait_step(self, folder: RunFolder, step: int) -> None:
        """Until the run's journal has come past ``step``."""
        wait_for(f"{folder.path.name} to reach step {step}", lambda: last_step(folder) >= step)

    def wait_running(self, folder: RunFolder) -> None:
        """Until the run's job runs again; ``status`` skips Slurm's two minutes."""

        def running() -> bool:
            if self.state(folder) == "PENDING":
                self.launch("status")
                time.sleep(1)
            return self.state(folder) == "RUNNING"

        wait_for("the job to run again", running)

    def wait_ended(self, folder: RunFolder, state: str = "COMPLETED") -> None:
        """Until the job has ended so; on the way it may look lost, or preempted, for a moment."""

        def ended() -> bool:
            now = self.state(folder)
            if now == "PENDING":
                self.launch("status")
                time.sleep(1)
            return now == state

        wait_for(f"the job to end as {state}", ended)


def last_step(folder: RunFolder) -> int:
    if not folder.journal.exists():
        return -1
    records, _ = read_records(folder.journal)
    return records[-1].step if records else -1


def steps_in(seconds: float, folder: RunFolder) -> int:
    """How many hundreds of steps take at least so long, going by the run in the folder."""
    records, _ = read_records(folder.journal)
    first, last = records[0], records[-1]
    rate = (last.step - first.step) / (last.timestamp_ms - first.timestamp_ms) * 1000
    return 100 * math.ceil(seconds * rate / 100)


def attempts(folder: RunFolder) -> list[dict[str, object]]:
    found: list[dict[str, object]] = read_json(folder.environment)["attempts"]
    return found


def assert_identical(folder: RunFolder, reference: RunFolder) -> None:
    """Weights, training state and journal, bit for bit; the journal without gap or repeat."""
    run_comparison.assert_identical(folder, reference)
    settings = folder.config.training
    logged = [s for s, metrics in run_comparison.essence(folder) if "train/loss" in metrics]
    assert logged == list(range(settings.log_every, settings.steps + 1, settings.log_every))


def assert_tracked(folder: RunFolder, site: Site, status: str = "FINISHED") -> None:
    """MLflow has one run for it, with exactly the journal."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=site.uri)
    experiment = client.get_experiment_by_name(site.experiment)
    assert experiment is not None
    tag = f"tags.`colddiff.run_id` = '{folder.path.name}'"
    (run,) = client.search_runs([experiment.experiment_id], tag)
    assert run.info.status == status
    assert_exactly_the_journal(folder.path, site.uri, run.info.run_id)
