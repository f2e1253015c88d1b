"""Plan files: all runs of a study in one TOML file, for ``train`` and ``reproduce``.

```toml
reports = ["table1", "figure3"]        # what reproduce makes of them, in this order

[[runs]]
preset = "mnist"                       # or config = "FILE", relative to the plan
name = "mnist-T40"                     # what tables call it; the preset's name by default
seeds = [0, 1, 2]                      # training.seed of the preset by default
set = { "degradation.T" = 40 }         # every setting of `train --help`
generate = [{ n = 2000, start = "real" }]  # sets of images, with the settings of `generate --help`

[generate]                             # such lists by name, for generate = "sampling" of many runs
sampling = [{ n = 2000 }, { n = 2000, algorithm = "algorithm1" }]
```
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colddiff.config import RunConfig
from colddiff.presets import labelled, preset
from colddiff.schema import build, closest

REPORTS = ("table1", "figure3")
"""What ``reproduce`` makes where no plan says otherwise."""
KNOWN_REPORTS = (*REPORTS, "trajectory", "information_floor", "hot_cold", "time_to_quality")
"""Modules of ``analysis`` that need nothing but the experiment."""
ENTRY = ("preset", "config", "name", "seeds", "set", "generate")


@dataclass(frozen=True)
class Plan:
    """The runs of a plan file, one a seed, and the reports on them."""

    runs: tuple[RunConfig, ...]
    reports: tuple[str, ...] = REPORTS


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        ValueError: naming the file, the entry, the value and what is allowed.
    """
    if not path.is_file():
        raise ValueError(f"--plan {str(path)!r} is no file")
    try:
        values = tomllib.loads(path.read_text())
        _check_names(values, ("runs", "reports", "generate"))
        named = values.get("generate", {})
        if not isinstance(named, dict):
            raise ValueError(f"generate = {named!r} is not allowed: it must be a table of lists")
        entries = values.get("runs", [])
        if not isinstance(entries, list) or not entries:
            raise ValueError("it has no [[runs]]")
        runs: dict[str, RunConfig] = {}
        for number, entry in enumerate(entries, start=1):
            for config in _configs(entry, f"runs {number}", path.parent, named):
                if config.run_id in runs:
                    raise ValueError(f"runs {number}: {config.run_id} is there twice")
                runs[config.run_id] = config
        return Plan(tuple(runs.values()), _reports(values))
    except (ValueError, OSError) as error:  # TOML's own errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None


def _configs(entry: Any, where: str, folder: Path, named: dict[str, Any]) -> list[RunConfig]:
    try:
        if not isinstance(entry, dict):
            raise ValueError(f"{entry!r} is no table")
        _check_names(entry, ENTRY)
        config = labelled(_changed(_base(entry, folder), entry.get("set", {})))
        if "name" in entry:
            if not isinstance(entry["name"], str) or not entry["name"].strip():
                raise ValueError(f"name = {entry['name']!r} is not allowed: it must be a text")
            config = dataclasses.replace(config, preset=entry["name"])
        if "generate" in entry:
            sets = _generation(entry["generate"], named)
            config = build(RunConfig, config.to_dict() | {"generation": sets})
        seeds = entry.get("seeds", [config.training.seed])
        if not isinstance(seeds, list) or not seeds:
            raise ValueError(f"seeds = {seeds!r} is not allowed: it must be a list of integers")
        return [_changed(config, {"training.seed": seed}) for seed in seeds]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _generation(value: Any, named: dict[str, Any]) -> list[Any]:
    sets = value
    if isinstance(value, str):
        if value not in named:
            raise ValueError(
                f"generate = {value!r} is no list of [generate].{closest(value, named)}"
            )
        sets = named[value]
    if not isinstance(sets, list):
        raise ValueError(
            f"generate = {sets!r} is not allowed: it must be a list of tables, or the name of one"
        )
    return sets


def _base(entry: dict[str, Any], folder: Path) -> RunConfig:
    if ("preset" in entry) == ("config" in entry):
        raise ValueError("it must have either preset or config")
    if "preset" in entry:
        return preset(str(entry["preset"]))
    file = folder / str(entry["config"])
    if not file.is_file():
        raise ValueError(f"config {str(file)!r} is no file")
    return RunConfig.from_json(file.read_text())


def _changed(config: RunConfig, changes: Any) -> RunConfig:
    if not isinstance(changes, dict):
        raise ValueError(f"set = {changes!r} is not allowed: it must be a table of settings")
    values = config.to_dict()
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if not field or not isinstance(values.get(section), dict):
            sections = (key for key, each in values.items() if isinstance(each, dict))
            raise ValueError(
                f"unknown setting {name!r}: settings have a section's name in front, "
                f"{', '.join(sections)}"
            )
        values[section] = values[section] | {field: value}
    return build(RunConfig, values)


def _reports(values: dict[str, Any]) -> tuple[str, ...]:
    reports = values.get("reports", list(REPORTS))
    unknown = [name for name in reports if name not in KNOWN_REPORTS]
    if unknown or not isinstance(reports, list):
        raise ValueError(
            f"reports = {reports!r} is not allowed: it must be a list of {', '.join(KNOWN_REPORTS)}"
        )
    return tuple(reports)


def _check_names(values: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            raise ValueError(f"unknown entry {name!r}.{closest(name, known)}")
