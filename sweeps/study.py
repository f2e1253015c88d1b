"""A study: what it is, created once, opened by every worker."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock

from colddiff.config import GenerationConfig, RunConfig
from colddiff.files import read_json, write_atomic, write_json
from colddiff.schema import Checked, added, build, elsewhere, identity, require
from colddiff.uris import mask_secrets
from sweeps.objective import RESTORING, Metric, ObjectiveName, directions, value_names
from sweeps.samplers import PrunerName, SamplerName, build_pruner, build_sampler
from sweeps.space import SpaceName, check_base, check_keep, grid, reference
from sweeps.storage import absolute_storage, check_storage, storage_of

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["StudyConfig", "create_study", "open_study", "read_study", "storage_of"]


@dataclass(frozen=True)
class StudyConfig(Checked):
    """One study: what is varied, what is optimised, and how."""

    name: str = "study"
    """Of the study, and of its folder below ``runs/studies``."""
    space: SpaceName = "schedule"
    """What is varied around the base, see :func:`sweeps.space.suggest`."""
    keep: tuple[str, ...] = added(())
    """Parameters of a recipe that are not varied: they stay the base's."""
    objective: ObjectiveName = "restoration"
    """What is optimised, see :mod:`sweeps.objective`."""
    metric: Metric = "rmse"
    """Of restoration and direct."""
    sampler: SamplerName = "auto"
    """tpe: with a constant liar for parallel workers, multivariate for one objective. gp: a
    Gaussian process. nsga2: evolution. random and grid: baselines. auto: nsga2 for pareto, else
    tpe."""
    pruner: PrunerName = "none"
    """What stops hopeless trials by their validations while they train."""
    trials: int = elsewhere(30)
    """So many trials are wanted in all."""
    seed: int = 0
    """Of the sampler; the runs have the base's."""
    base: RunConfig = field(default_factory=RunConfig)
    """Where the space lies; trial 0 is this run itself."""
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(n=1000))
    """Of generation and pareto: how digits are generated; the levels are the trial's."""
    runs: str = elsewhere("runs")
    """Folder of the run folders; made absolute."""
    storage: str = elsewhere("")
    """Where trials are kept: empty for a journal file in the study's folder, a path of one, or
    postgresql://host/database, grpc://host:port, or, on one machine, sqlite:///file."""
    one_machine: bool = elsewhere(False)
    """Whether all workers run on one machine, which alone makes SQLite safe."""

    def check(self) -> None:
        """Ranges, and what goes together; see the fields."""
        object.__setattr__(self, "runs", str(Path(self.runs).absolute()))
        object.__setattr__(self, "storage", absolute_storage(self.storage))
        if self.sampler == "auto":
            sampler = "nsga2" if self.objective == "pareto" else "tpe"
            object.__setattr__(self, "sampler", sampler)
        named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None
        require(named, "name", self.name, "up to 100 letters, digits, dots, dashes or underlines")
        require(self.trials >= 1, "trials", self.trials, "at least 1")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in 0..2147483647")
        check_base(self.space, self.base)
        check_keep(self.space, self.base, self.keep)
        in_order = (name for name in reference(self.space, self.base) if name in self.keep)
        object.__setattr__(self, "keep", tuple(in_order))
        self._check_objective()
        self._check_pruner()
        check_storage(self.storage_url, one_machine=self.one_machine)

    def _check_objective(self) -> None:
        data, objective = self.base.data, self.objective
        if objective in RESTORING:
            allowed = f"at least 1 for the objective {objective}, which spares the test split"
            require(data.validation >= 1, "base.data.validation", data.validation, allowed)
        else:
            allowed = f"digits or mnist for the objective {objective}"
            require(data.has_digits, "base.data.name", data.name, allowed)
            require(self.generation.n >= 2, "generation.n", self.generation.n, "at least 2")
            levels = self.generation.levels
            require(not levels, "generation.levels", levels, "empty: the trial's levels hold")
        varied = not (objective == "pareto" and self.space == "recipe")
        require(varied, "space", self.space, "one that varies the network calls, for pareto")
        sampled = not (objective == "direct" and self.space == "levels")
        require(sampled, "space", self.space, "one that trains networks, for direct")

    def _check_pruner(self) -> None:
        if self.pruner == "none":
            return
        for possible, why in (
            (self.objective != "pareto", "pareto: Optuna prunes with one objective only"),
            (self.space != "levels", "the space levels: its trials do not train"),
            (self.base.data.validation > 0, "a base without data.validation images"),
            (self.base.training.validate_every > 0, "a base with training.validate_every = 0"),
        ):
            require(possible, "pruner", self.pruner, f"none for {why}")

    @property
    def folder(self) -> Path:
        """The study's own folder, below the runs."""
        return Path(self.runs) / "studies" / self.name

    @property
    def file(self) -> Path:
        """This configuration, JSON."""
        return self.folder / "study.json"

    @property
    def storage_url(self) -> str:
        """:attr:`storage`, or the journal file that stands for none."""
        return self.storage or f"journal://{self.folder / 'journal.log'}"

    def to_json(self) -> str:
        """Indented JSON; :meth:`from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read :meth:`to_json`'s output; raises ``ValueError`` for what is no such study."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a study: {error}") from None
        return build(cls, values)


def read_study(runs: Path, name: str) -> StudyConfig:
    """The study of that name below the runs; raises ``ValueError`` where there is none."""
    path = runs / "studies" / name / "study.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(f"there is no study {name!r} in {runs}: {path} is missing") from None
    return StudyConfig.from_json(text)


def create_study(config: StudyConfig) -> Study:
    """Create the study before its workers start, or find it; with the reference as trial 0.

    One process at a time: databases do not survive a race for their first tables. More trials may
    be wanted than before, and the study's folder may have moved.

    Raises:
        ValueError: where a different study has that name, saying what differs; where the study is
            kept in another storage, or belongs to another folder of runs, whose leases say who
            works on which trial; for fewer trials than were wanted before.
    """
    import optuna

    if config.sampler == "grid":
        axes = grid(config.space, config.base, config.keep).values()
        points = math.prod(map(len, axes))
        allowed = f"at most {points + 1}: the grid's {points} points and the reference"
        require(config.trials <= points + 1, "trials", config.trials, allowed)
    wanted = defining(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(config.folder / ".lock"):
        if config.file.exists():
            before = StudyConfig.from_json(config.file.read_text())
            _require_same(config, defining(before), wanted)
            _require_extension(config, before)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage_of(config.storage_url, one_machine=config.one_machine),
            directions=directions(config.objective, config.metric),
            load_if_exists=True,
        )
        if study.user_attrs or study.get_trials(deepcopy=False):
            _require_same(config, study.user_attrs.get("config", {}), wanted)
        own_id = study_id(config)
        if study.user_attrs.get("study_id", own_id) != own_id:
            raise ValueError(
                f"the study {config.name!r} in {mask_secrets(config.storage_url)} belongs to "
                f"another folder of runs than {config.runs}: give this one another name, or the "
                "--runs of that one"
            )
        attributes = {
            "config": wanted,
            "study_id": own_id,
            "value_names": value_names(config.objective, config.metric),
        }
        for key, value in attributes.items():
            if study.user_attrs.get(key) != value:
                study.set_user_attr(key, value)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(reference(config.space, config.base, config.keep))
        write_atomic(config.file, config.to_json())
    return study


def study_id(config: StudyConfig) -> str:
    """What tells this study from another of its name; kept in its folder."""
    path = config.folder / "tracking.json"
    if not path.exists():
        write_json(path, {"study_id": secrets.token_hex(8)})
    return str(read_json(path)["study_id"])


def open_study(config: StudyConfig, worker: int) -> Study:
    """The study as worker number ``worker`` sees it, with a sampler of its own.

    Its seed also depends on how many trials there are: a worker that starts again would otherwise
    repeat what it sampled first.

    Raises:
        ValueError: where the study was not created.
    """
    import optuna

    storage = storage_of(config.storage_url, one_machine=config.one_machine)
    try:
        study = optuna.load_study(
            study_name=config.name, storage=storage, pruner=build_pruner(config)
        )
    except KeyError:
        raise ValueError(
            f"there is no study {config.name!r} in its storage: create it before its workers start"
        ) from None
    begun = len(study.get_trials(deepcopy=False))
    digest = hashlib.blake2b(f"{config.seed}/{worker}/{begun}".encode(), digest_size=4).digest()
    study.sampler = build_sampler(config, int.from_bytes(digest, "little"))
    return study


def defining(config: StudyConfig) -> dict[str, Any]:
    """What makes it this study, as JSON gives it back."""
    what = identity(config)
    if config.space == "recipe":  # the one space that samples as the base does
        what["sampled"] = config.base.evaluation.levels[:1]
    values: dict[str, Any] = json.loads(json.dumps(what))
    return values


def _require_extension(config: StudyConfig, before: StudyConfig) -> None:
    if config.storage_url != before.storage_url:
        raise ValueError(
            f"storage = {mask_secrets(config.storage_url)!r} is not allowed: the trials of the "
            f"study {config.name!r} are in {mask_secrets(before.storage_url)}"
        )
    if config.trials < before.trials:
        raise ValueError(
            f"trials = {config.trials} is not allowed: {before.trials} are wanted of the study "
            f"{config.name!r}, and it can only be more; cancel stops it earlier"
        )


def _require_same(config: StudyConfig, known: Any, wanted: Mapping[str, Any]) -> None:
    there, here = _flat(known), _flat(wanted)
    differing = [
        f"{name}: {there.get(name, 'nothing')!r} there, {here.get(name, 'nothing')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"there is a different study {config.name!r} already ({'; '.join(differing)}): give "
            "this one another name"
        )


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{path}.{name}".lstrip("."))
    return flat
