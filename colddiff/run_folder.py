"""The run folder: one home for its file names, its status and what is recorded of each attempt."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colddiff.config import GenerationConfig, RunConfig
from colddiff.files import read_json, write_atomic, write_json
from colddiff.machine import attempt, git_diff

State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """What ``status.json`` says of a run's training."""

    state: State
    step: int
    steps: int
    message: str = ""
    updated_ms: int = 0


@dataclass(frozen=True)
class RunFolder:
    """``runs/<run-id>/``: the truth about a run; MLflow is a view of it."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The configuration, JSON."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Attempts (command, git, packages, host, device) and data checksum."""
        return self.path / "environment.json"

    @property
    def schedule(self) -> Path:
        """What the blur leaves of an image at each level (information floor), JSON."""
        return self.path / "schedule.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the training state."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """Metrics, one JSON line a record."""
        return self.path / "journal.jsonl"

    @property
    def weights(self) -> Path:
        """Averaged weights of the finished training."""
        return self.path / "ema.safetensors"

    def kept_weights(self, which: Literal["average", "raw"], step: int) -> Path:
        """Weights at a step that training.keep_every names."""
        return self.path / "weights" / f"{which}-{step:08d}.safetensors"

    @property
    def evaluation(self) -> Path:
        """The EvaluationResult."""
        return self.path / "evaluation.json"

    @property
    def samples(self) -> Path:
        """Folder of image grids and arrays."""
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        """Folder of job logs."""
        return self.path / "logs"

    @property
    def profile_trace(self) -> Path:
        """The last profile of training steps, for chrome://tracing or Perfetto."""
        return self.path / "profile" / "trace.json.gz"

    @property
    def profile_table(self) -> Path:
        """The operators that took most of that time, as text; written last."""
        return self.path / "profile" / "operators.txt"

    @property
    def lock(self) -> Path:
        """Held by the process that works on this run."""
        return self.path / ".lock"

    @classmethod
    def create(cls, runs: Path, config: RunConfig) -> RunFolder:
        """The folder of ``config`` below ``runs``, made if it is new.

        In an old one, only fields that do not define the result can differ: the new ones hold.
        """
        folder = cls(runs / config.run_id)
        folder.update(config)
        return folder

    def update(self, config: RunConfig) -> None:
        """Record ``config``, where it is new here."""
        if not self.config_file.exists() or self.config != config:
            write_atomic(self.config_file, config.to_json())

    @classmethod
    def find(cls, path: Path) -> RunFolder:
        """An existing run folder; raises ``ValueError`` where there is none."""
        folder = cls(path)
        if not folder.config_file.is_file():
            raise ValueError(f"{path} is not a run folder: it has no {folder.config_file.name}")
        return folder

    @property
    def config(self) -> RunConfig:
        """The recorded configuration; raises ``ValueError`` naming a file that is not one."""
        try:
            return _read_config(self.config_file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from None

    def status(self) -> Status | None:
        """The recorded status, or None before the first attempt."""
        try:
            return Status(**read_json(self.path / "status.json"))
        except FileNotFoundError:
            return None

    def write_status(self, state: State, step: int, steps: int, message: str = "") -> None:
        """Record where the run stands."""
        now = int(time.time() * 1000)
        value = {"state": state, "step": step, "steps": steps, "message": message}
        write_json(self.path / "status.json", value | {"updated_ms": now})

    @property
    def is_trained(self) -> bool:
        """Whether training is complete."""
        status = self.status()
        return status is not None and status.state == "finished" and self.weights.exists()

    def is_generated(self, settings: GenerationConfig) -> bool:
        """Whether these very images are there, of the training as it is configured."""
        try:
            done = read_json(self.samples / f"{settings.slug}.json")  # written last
        except FileNotFoundError:
            return False
        if self.config.data.has_digits and settings.n > 1:
            if "blank_rate" not in (done.get("quality") or {}):  # from before collapse was measured
                return False
        return bool(done["step"] == (settings.step or self.config.training.steps))

    def record_attempt(
        self,
        *,
        device: str,
        threads: int,
        resumed_from_step: int,
        data_sha256: str,
        data_samples: int,
        world_size: int = 1,
        arithmetic: str = "float32",
    ) -> None:
        """Append this process to ``environment.json``; keep the diff of a dirty working tree.

        Raises:
            ValueError: where the run was begun on other data.
        """
        record = read_json(self.environment) if self.environment.exists() else {"attempts": []}
        if resumed_from_step and record["data_sha256"] != data_sha256:
            raise ValueError(
                f"{self.path.name} was trained to step {resumed_from_step} on other data, checksum "
                f"{record['data_sha256'][:12]}, now {data_sha256[:12]}: bring that back, or "
                "delete the run folder to start it again"
            )
        record |= {"data_sha256": data_sha256, "data_samples": data_samples}
        this = {
            "threads": threads,
            "world_size": world_size,
            "arithmetic": arithmetic,
            "resumed_from_step": resumed_from_step,
        }
        record["attempts"].append(attempt(device) | this)
        write_json(self.environment, record)
        difference = git_diff()
        if difference:
            write_atomic(self.path / "environment.diff", difference)


@functools.lru_cache(maxsize=1024)
def _read_config(text: str) -> RunConfig:
    """Remembered, because ``status`` needs each several times, and checking it takes long."""
    return RunConfig.from_json(text)
