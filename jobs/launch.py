"""The command line: train, evaluate and generate runs, see where they stand, send them to MLflow.

Heavy libraries are imported by the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from colddiff.config import EvaluationConfig, GenerationConfig, RunConfig
from colddiff.interruption import Interrupted
from colddiff.presets import PRESETS, preset
from colddiff.run_folder import RunFolder
from jobs.cluster import Cluster, run_here, submit_locally
from jobs.status import find_runs, row, table
from jobs.tasks import (
    AlreadyRunningError,
    EvaluateTask,
    GenerateTask,
    Task,
    TrainTask,
    is_claimed,
)


@dataclass(frozen=True)
class Place:
    """Where things lie, for every command."""

    runs: Path = Path("runs")
    """Folder of the run folders."""
    experiment: str = "colddiff"
    """MLflow experiment."""
    tracking_uri: str | None = None
    """MLflow store or server; MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here, by default."""

    @property
    def uri(self) -> str:
        """The tracking URI to use."""
        from colddiff.tracking import absolute_uri, default_uri

        return absolute_uri(self.tracking_uri) if self.tracking_uri else default_uri()


@dataclass(frozen=True)
class Launch(Place):
    """Where and how jobs run."""

    cluster: Cluster = "local"
    """local: in the background of this machine, one after the other. debug: here and now."""
    data_root: str | None = None
    """Where data sets lie: short for --data.root, kept in the runs' configurations."""

    def launch(self, tasks: Sequence[Task]) -> int:
        """Carry out or submit; prints what became of it."""
        from colddiff.tracking import initialise_store, mask_secrets

        if not tasks:
            return 0
        initialise_store(self.uri, self.experiment)
        if self.cluster == "debug":
            for made in run_here([dataclasses.replace(task, progress=True) for task in tasks]):
                say(f"done: {made}")
        else:
            job = submit_locally(tasks, (self.runs / "jobs").absolute())
            say(f"submitted job {job.job_id} with {len(tasks)} runs; it writes {job.stderr}")
        say(f"MLflow: mlflow ui --backend-store-uri {mask_secrets(self.uri)}")
        return 0

    def placed(self, config: RunConfig) -> RunConfig:
        """The configuration with the data root of the command line."""
        if self.data_root is None:
            return config
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, root=self.data_root)
        )


@dataclass(frozen=True)
class Train(Launch):
    """Train and evaluate runs, one a seed. A run that exists is resumed, or found complete.

    --preset NAME or --config FILE gives the values that the other options override.
    """

    seeds: tuple[int, ...] = ()
    """Seeds, a run each; training.seed by default."""
    evaluate: bool = True
    """Evaluate after training."""
    download: bool = False
    """Download the data set where it is absent."""
    dry_run: bool = False
    """Only say what would be done."""
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=lambda: preset("demo"))

    def __call__(self) -> int:
        """Submit what is not complete."""
        from colddiff.data import load_images
        from colddiff.optimisation import resolve_device
        from colddiff.tracking import push

        config = self.placed(self.run)
        # Bad news before anything is made or submitted.
        resolve_device(config.training.device)
        load_images(config.data, "train", download=self.download)
        configs = [
            dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
            for seed in self.seeds or (config.training.seed,)
        ]
        tasks: list[Task] = []
        for each in configs:
            folder = self.runs / each.run_id if self.dry_run else None
            found = RunFolder(folder) if folder else RunFolder.create(self.runs, each)
            plan = self.plan(found, each)
            say(f"{each.run_id}: {plan}")
            if plan == "complete" and not self.dry_run:
                push(found.path, self.uri, self.experiment)
            elif plan not in ("complete", "running"):
                path = str(found.path.absolute())
                tasks.append(TrainTask(path, self.uri, self.experiment, evaluate=self.evaluate))
        return 0 if self.dry_run else self.launch(tasks)

    def plan(self, folder: RunFolder, config: RunConfig) -> str:
        """What there is to do for a run."""
        from colddiff.checkpoint import checkpoints
        from colddiff.evaluation import is_evaluated

        if is_claimed(folder):
            return "running"
        if folder.is_trained:
            done = not self.evaluate or is_evaluated(folder, config.evaluation)
            return "complete" if done else "trained, to evaluate"
        saved = checkpoints(folder.checkpoints)
        if saved:
            return f"resume at step {int(saved[-1].stem.removeprefix('step-'))}"
        return "new"


@dataclass(frozen=True)
class Evaluate(Launch):
    """Measure trained runs: degraded, direct and sampled images against the originals."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Values other than the defaults replace those of the runs."""

    def __call__(self) -> int:
        """Evaluate what was not evaluated with these settings."""
        default = EvaluationConfig()
        changed = {
            f.name: getattr(self.evaluation, f.name)
            for f in dataclasses.fields(default)
            if getattr(self.evaluation, f.name) != getattr(default, f.name)
        }
        tasks = []
        for folder in trained(self.runs, self.names):
            config = self.placed(folder.config)
            settings = dataclasses.replace(config.evaluation, **changed)
            config = dataclasses.replace(config, evaluation=settings)
            folder = RunFolder.create(folder.path.parent, config)
            path = str(folder.path.absolute())
            tasks.append(EvaluateTask(path, self.uri, self.experiment))
        return self.launch(tasks)


@dataclass(frozen=True)
class Generate(Launch):
    """Generate images from trained runs."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""
    generation: Annotated[GenerationConfig, arg(name="")] = field(default_factory=GenerationConfig)

    def __call__(self) -> int:
        """Generate for every named run."""
        from colddiff.levels import check_levels, parse_levels

        tasks = []
        for folder in trained(self.runs, self.names):
            config = self.placed(folder.config)
            if self.generation.levels:
                check_levels(parse_levels(self.generation.levels), config.degradation.T)
            folder = RunFolder.create(folder.path.parent, config)
            path = str(folder.path.absolute())
            tasks.append(GenerateTask(path, self.uri, self.experiment, settings=self.generation))
        return self.launch(tasks)


@dataclass(frozen=True)
class Status(Place):
    """Show where runs stand."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""

    def __call__(self) -> int:
        """Print the table."""
        rows = [row(folder) for folder in find_runs(self.runs, self.names)]
        say(table(rows) if rows else f"no runs below {self.runs}")
        return 0


@dataclass(frozen=True)
class Sync(Place):
    """Send to MLflow whatever of the runs is not there yet."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""

    def __call__(self) -> int:
        """Push every named run; idempotent."""
        from colddiff.tracking import initialise_store, push

        initialise_store(self.uri, self.experiment)
        for folder in find_runs(self.runs, self.names):
            report = push(folder.path, self.uri, self.experiment)
            sent = f"{report.metrics} metric values and {len(report.artifacts)} artifacts sent"
            say(f"{folder.path.name}: {sent}; {report.link}")
        return 0


def trained(runs: Path, names: Sequence[str]) -> list[RunFolder]:
    """The named runs that are trained; raises ``ValueError`` for a named one that is not."""
    found = find_runs(runs, names)
    if names:
        for folder in found:
            if not folder.is_trained:
                raise ValueError(
                    f"{folder.path.name} is not trained yet: see python jobs/launch.py status"
                )
    found = [folder for folder in found if folder.is_trained]
    if not found:
        raise ValueError(f"no trained run below {runs}: make one with python jobs/launch.py train")
    return found


def base_config(arguments: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The configuration that --preset or --config names, and the other arguments.

    They are taken out before parsing, because they give the other options their defaults.

    Raises:
        ValueError: for an unknown preset, or a file that is no configuration.
    """
    rest: list[str] = []
    config = preset("demo")
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--preset", "--config"):
            rest.append(word)
            continue
        value = value or next(words, "")
        if name == "--preset":
            config = preset(value)
        elif not Path(value).is_file():
            raise ValueError(f"--config {value!r} is no file")
        else:
            config = RunConfig.from_json(Path(value).read_text())
    return config, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and carry out; the exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config, rest = base_config(sys.argv[1:] if arguments is None else arguments)
        train = subcommand("train", default=Train(run=config), description=_train_help())
        commands = (
            Annotated[Train, train]
            | Annotated[Evaluate, subcommand("evaluate")]
            | Annotated[Generate, subcommand("generate")]
            | Annotated[Status, subcommand("status")]
            | Annotated[Sync, subcommand("sync")]
        )
        command = tyro.cli(commands, args=rest, prog="launch.py", config=(OmitSubcommandPrefixes,))
        return command()
    except ValueError as error:
        return _fail(f"error: {error}", 2)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        sys.stdout = None  # nothing is left to flush into
        return 0
    except Interrupted as interruption:
        return _fail(f"{interruption}; saved. The same command goes on from there", 130)
    except KeyboardInterrupt:
        return _fail("interrupted. The same command goes on from the last checkpoint", 130)
    except AlreadyRunningError as error:
        return _fail(f"error: {error}", 1)


def say(text: str) -> None:
    """Print, at once even into a pipe."""
    print(text, flush=True)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def _train_help() -> str:
    lines = [Train.__doc__ or "", "", "Presets:"]
    lines += [f"  {name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
