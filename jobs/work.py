"""The commands that make something: train, evaluate, generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from colddiff.config import EvaluationConfig, GenerationConfig, RunConfig
from colddiff.presets import labelled, preset
from colddiff.run_folder import RunFolder
from colddiff.schema import require
from jobs.options import Launch
from jobs.pack import PackedTask
from jobs.packing import Packing
from jobs.plan_file import read_plan
from jobs.status import find_trained
from jobs.tasks import AnyTask, EvaluateTask, GenerateTask, TrainTask, is_claimed

MOST_PROFILED = 1000
"""Steps: a profile keeps thousands of events of each in memory until it is written."""


@dataclass(frozen=True)
class Seeded(Launch):
    """The runs of one configuration, one a seed."""

    plan: Path | None = None
    """TOML file with all runs of a study (jobs/plan_file.py), in place of --preset, --seeds and
    settings."""
    seeds: tuple[int, ...] = ()
    """Seeds, a run each; training.seed by default."""
    download: bool = False
    """Download the data set where it is absent."""
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=lambda: preset("demo"))

    def configs(self) -> list[RunConfig]:
        """The runs; raises ``ValueError`` for what cannot run, before anything is made."""
        from colddiff.data import load_images
        from colddiff.optimisation import resolve_device

        configs = self.planned_configs()
        self.checked_profile(len(configs))
        for config in configs:
            if self.cluster != "slurm":  # whose login nodes have other devices than its jobs
                resolve_device(config.training.device)
        for data in dict.fromkeys(config.data for config in configs):
            load_images(data, "train", download=self.download)
        return configs

    def planned_configs(self) -> list[RunConfig]:
        """The runs as the plan file or the command line describe them."""
        if self.plan is not None:
            if self.seeds:
                raise ValueError("--seeds is not allowed with --plan: the file has the seeds")
            return [self.placed(config) for config in read_plan(self.plan).runs]
        config = labelled(self.placed(self.run))
        return [
            dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
            for seed in dict.fromkeys(self.seeds or (config.training.seed,))
        ]

    def folders(self, configs: Sequence[RunConfig]) -> list[str]:
        """Their folders' absolute paths; made, unless this is a dry run."""
        if self.dry_run:
            return [str((self.runs / config.run_id).absolute()) for config in configs]
        return [str(RunFolder.create(self.runs, config).path.absolute()) for config in configs]


@dataclass(frozen=True)
class Train(Packing, Seeded):
    """Train and evaluate runs, one a seed. A run that exists is resumed, or found complete.

    --preset NAME or --config FILE gives the values that the other options override; --plan FILE
    names the runs of a whole study.
    """

    evaluate: bool = True
    """Evaluate after training."""
    profile_steps: int = 0
    """Profile so many training steps, 0..1000, of the first run: profile/trace.json.gz (for
    chrome://tracing or Perfetto) and profile/operators.txt. The run's results stay the same."""

    def __call__(self) -> int:
        """Submit what is not complete."""
        allowed = 0 <= self.profile_steps <= MOST_PROFILED
        require(allowed, "--profile-steps", self.profile_steps, f"in 0..{MOST_PROFILED}")
        configs = self.configs()
        tasks = [
            TrainTask(folder, self.jobs_uri, self.experiment, evaluate=self.evaluate)
            for folder in self.folders(configs)
        ]
        code = self.launch(tasks, configs={config.run_id: config for config in configs})
        if not (self.dry_run or self.offline):
            self.send_finished([RunFolder(Path(task.folder)) for task in tasks])
        return code

    def grouped(self, tasks: Sequence[AnyTask]) -> Sequence[AnyTask | PackedTask]:
        """As packed; the first one that trains is profiled, where that is asked for."""
        each = list(tasks)
        for number, task in enumerate(tasks):
            if isinstance(task, TrainTask) and not RunFolder(Path(task.folder)).is_trained:
                each[number] = dataclasses.replace(task, profile_steps=self.profile_steps)
                break
        return super().grouped(each)

    def send_finished(self, folders: Sequence[RunFolder]) -> None:
        """Runs that were complete may be new to this tracking store, or changed since."""
        from colddiff.tracking import push

        with self.tolerated():
            for folder in folders:
                if folder.is_trained and not is_claimed(folder):
                    push(folder.path, self.uri, self.experiment)


@dataclass(frozen=True)
class Evaluate(Launch):
    """Measure trained runs: degraded, direct and sampled images against the originals.

    A plan file's sets of images are generated too, where they are not there yet.
    """

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is given replaces the runs' own settings."""

    given: Annotated[tuple[str, ...], Suppress] = ()
    """The fields of ``evaluation`` that the command line names."""

    def __call__(self) -> int:
        """Evaluate what was not evaluated with these settings."""
        changes = {name: getattr(self.evaluation, name) for name in self.given}
        folders = find_trained(self.runs, self.names)
        tasks = []
        for folder in folders:
            config = folder.config
            settings = dataclasses.replace(config.evaluation, **changes)
            dataclasses.replace(config, evaluation=settings)  # refuses levels that do not fit
            path = str(folder.path.absolute())
            tasks.append(EvaluateTask(path, self.jobs_uri, self.experiment, evaluation=settings))
        if not self.dry_run:
            for folder in folders:  # once all of them are good
                folder.update(self.placed(folder.config))
        return self.launch(tasks)


@dataclass(frozen=True)
class Generate(Launch):
    """Generate images from trained runs."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""
    generation: Annotated[GenerationConfig, arg(name="")] = field(default_factory=GenerationConfig)

    def __call__(self) -> int:
        """Generate what is not there, for every named run."""
        folders = find_trained(self.runs, self.names)
        for folder in folders:
            self.generation.check_for(folder.config.degradation, folder.config.training)
        tasks = []
        for folder in folders:
            if not self.dry_run:
                folder.update(self.placed(folder.config))
            path = str(folder.path.absolute())
            settings = self.generation
            tasks.append(GenerateTask(path, self.jobs_uri, self.experiment, settings=settings))
        return self.launch(tasks)
