"""The command line of sweeps: start a study's workers, see where it stands, go on with it.

Heavy libraries are imported by the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from colddiff.presets import preset
from jobs.command_line import carry_out
from jobs.launch import base_config
from sweeps.desk import TooManyFailuresError
from sweeps.start import Resume, Start
from sweeps.watch import Cancel, Report, Serve, Status, Sync
from sweeps.workers import StorageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and carry out; the exit code: 0 done, 1 it failed, 2 bad input, 130 interrupted."""
    return carry_out(_parse, arguments, (StorageError, TooManyFailuresError))


def _parse(words: Sequence[str]) -> Callable[[], int]:
    config, rest = base_config(words) if words[:1] == ["start"] else (preset("demo"), list(words))
    # With a default for the base alone: the study's name must be given.
    start = subcommand("start", default=Start(study=tyro.MISSING, run=config))
    commands = (
        Annotated[Start, start]
        | Annotated[Resume, subcommand("resume")]
        | Annotated[Status, subcommand("status")]
        | Annotated[Cancel, subcommand("cancel")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Sync, subcommand("sync")]
        | Annotated[Serve, subcommand("serve")]
    )
    command: Callable[[], int] = tyro.cli(
        commands, args=rest, prog="sweeps/launch.py", config=(OmitSubcommandPrefixes,)
    )
    if isinstance(command, Resume):
        options = (word.partition("=")[0] for word in rest if word.startswith("--"))
        given = tuple(option[2:].replace("-", "_") for option in options)
        command = dataclasses.replace(command, given=given)
    return command


if __name__ == "__main__":
    sys.exit(main())
