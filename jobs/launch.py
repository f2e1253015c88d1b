"""The command line: make runs, see where they stand, mend what failed, send them to MLflow.

Heavy libraries are imported by the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from colddiff.config import RunConfig
from colddiff.presets import PRESETS, preset
from jobs.command_line import carry_out
from jobs.doctor.command import Doctor
from jobs.drill.command import Drill
from jobs.reproduce import Reproduce
from jobs.watch import Cancel, Logs, Retry, Status, Sync
from jobs.work import Evaluate, Generate, Train

CONFIGURED = ("train", "reproduce")
"""Commands that take --preset or --config."""


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
    sections = tuple(f"--{field.name}." for field in dataclasses.fields(RunConfig))
    overrides = [word for word in rest if word.startswith(sections)]
    if any(word.partition("=")[0] == "--plan" for word in rest) and (named or overrides):
        given = overrides[0].partition("=")[0] if overrides else "--preset or --config"
        raise ValueError(f"{given} is not allowed with --plan: the file has all settings")
    config = named[0] if named else preset("demo")
    return config, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and carry out; the exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    return carry_out(_parse, arguments)


def _parse(words: Sequence[str]) -> Callable[[], int]:
    configured = words[:1] and words[0] in CONFIGURED
    config, rest = base_config(words) if configured else (preset("demo"), list(words))
    train = subcommand("train", default=Train(run=config), description=_train_help())
    reproduce = subcommand("reproduce", default=Reproduce(run=config))
    commands = (
        Annotated[Train, train]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Reproduce, reproduce]
        | Annotated[Status, subcommand("status")]
        | Annotated[Logs, subcommand("logs")]
        | Annotated[Cancel, subcommand("cancel")]
        | Annotated[Retry, subcommand("retry")]
        | Annotated[Sync, subcommand("sync")]
        | Annotated[Doctor, subcommand("doctor")]
        | Annotated[Drill, subcommand("drill")]
    )
    command: Callable[[], int] = tyro.cli(
        commands, args=rest, prog="launch.py", config=(OmitSubcommandPrefixes,)
    )
    if isinstance(command, Evaluate):
        command = dataclasses.replace(command, given=_given(rest, "--evaluation."))
    return command


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
