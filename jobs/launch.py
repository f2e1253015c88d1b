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
from tyro.conf import OmitSubcommandPrefixes, Positional, Suppress, arg, subcommand

from colddiff.config import EvaluationConfig, GenerationConfig, RunConfig
from colddiff.interruption import Interrupted
from colddiff.presets import PRESETS, labelled, preset
from colddiff.run_folder import RunFolder
from colddiff.tracking import TrackingError
from jobs.options import Launch, Place, say
from jobs.status import find_runs, find_trained, row, settle, table
from jobs.tasks import (
    AlreadyRunningError,
    EvaluateTask,
    GenerateTask,
    Task,
    TrainTask,
    is_claimed,
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

        config = labelled(self.placed(self.run))
        # Bad news before anything is made or submitted.
        resolve_device(config.training.device)
        load_images(config.data, "train", download=self.download)
        configs = [
            dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
            for seed in dict.fromkeys(self.seeds or (config.training.seed,))
        ]
        tasks: list[Task] = []
        for each in configs:
            folder = self.runs / each.run_id if self.dry_run else None
            found = RunFolder(folder) if folder else RunFolder.create(self.runs, each)
            plan = self.plan(found, each)
            say(f"{each.run_id}: {plan}")
            if plan == "complete" and not self.dry_run:
                with self.tolerated():
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
            tasks.append(EvaluateTask(path, self.uri, self.experiment, evaluation=settings))
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
        """Generate for every named run."""
        from colddiff.levels import check_levels, parse_levels

        folders = find_trained(self.runs, self.names)
        if self.generation.levels:
            for folder in folders:
                levels = parse_levels(self.generation.levels)
                check_levels(levels, folder.config.degradation.T)
        tasks = []
        for folder in folders:
            folder.update(self.placed(folder.config))
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
        from colddiff.tracking import push

        folders = find_runs(self.runs, self.names)
        if not folders:
            say(f"no runs below {self.runs}")
            return 0
        self.initialise()
        for folder in folders:
            if not folder.environment.exists():
                say(f"{folder.path.name}: not started yet")
                continue
            settle(folder)
            report = push(folder.path, self.uri, self.experiment)
            sent = f"{report.metrics} metric values and {len(report.artifacts)} artifacts sent"
            say(f"{folder.path.name}: {sent}; {report.link}")
        return 0


def base_config(arguments: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The configuration that --preset or --config names, and the other arguments.

    They are taken out before parsing, because they give the other options their defaults.

    Raises:
        ValueError: for an unknown preset, or a file that is no configuration.
    """
    rest: list[str] = []
    named: list[RunConfig] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--preset", "--config"):
            rest.append(word)
            continue
        value = value or next(words, "")
        named.append(preset(value) if name == "--preset" else _read_config(Path(value)))
    if len(named) > 1:
        raise ValueError("--preset and --config name one configuration: give one of them, once")
    config = named[0] if named else preset("demo")
    return config, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and carry out; the exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("colddiff").setLevel(logging.INFO)
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        config, rest = base_config(words) if "train" in words[:1] else (preset("demo"), words)
        train = subcommand("train", default=Train(run=config), description=_train_help())
        commands = (
            Annotated[Train, train]
            | Annotated[Evaluate, subcommand("evaluate")]
            | Annotated[Generate, subcommand("generate")]
            | Annotated[Status, subcommand("status")]
            | Annotated[Sync, subcommand("sync")]
        )
        command = tyro.cli(commands, args=rest, prog="launch.py", config=(OmitSubcommandPrefixes,))
        if isinstance(command, Evaluate):
            command = dataclasses.replace(command, given=_given(rest, "--evaluation."))
        return command()
    except ValueError as error:
        return _fail(f"error: {error}", 2)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        sys.stdout = None  # nothing is left to flush into
        return 0
    except Interrupted as interruption:
        code = 128 + interruption.signum
        return _fail(f"{interruption}; saved. The same command goes on from there", code)
    except KeyboardInterrupt:
        return _fail("interrupted. The same command takes it up again", 130)
    except (AlreadyRunningError, TrackingError, OSError) as error:
        return _fail(f"error: {error}", 1)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def _read_config(path: Path) -> RunConfig:
    if not path.is_file():
        raise ValueError(f"--config {str(path)!r} is no file")
    try:
        return RunConfig.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _given(words: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Names of the fields that options with this prefix set."""
    options = (word.partition("=")[0] for word in words if word.startswith(prefix))
    return tuple(option.removeprefix(prefix).replace("-", "_") for option in options)


def _train_help() -> str:
    lines = [Train.__doc__ or "", "", "Presets:"]
    lines += [f"  {name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
