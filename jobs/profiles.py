"""Site profiles: the resources of Slurm jobs and a site's ways, from small TOML files.

``--profile NAME`` is NAME.toml in the user's folder, else in the project's, ``jobs/profiles``.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from colddiff.schema import closest, require
from jobs.profile_values import (
    KINDS,
    MAIL_TYPES,
    REFUSED,
    SPELLINGS,
    gpus_of,
    is_memory,
    long_name,
    to_minutes,
    with_one_gpu,
)

Option = str | int | Literal[True]
PROJECT_FOLDER = Path(__file__).parent / "profiles"
LEAST = {
    "gpus": 0,
    "cpus": 1,
    "nodes": 1,
    "tasks_per_node": 0,
    "array_parallelism": 1,
    "signal_delay_s": 1,
    "max_requeues": 0,
}


@dataclass(frozen=True)
class Profile:
    """What a Slurm job asks for. An empty text leaves the choice to the site."""

    partition: str = ""
    """One, or several with commas."""
    account: str = ""
    """Which account pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have, e.g. "a100|h100"."""
    exclude: str = ""
    """Nodes not to use, e.g. "node[03,17]"."""
    nodelist: str = ""
    """Nodes to use."""
    gpus: int = 1
    """GPUs of each node, at least 0; each gets one process."""
    gres: str = ""
    """Generic resources of each node. GPUs among them, e.g. "gpu:a100:2", replace gpus."""
    cpus: int = 8
    """Processor cores of each process, at least 1."""
    mem: str = "32G"
    """Memory of each node, with K, M (which is meant without), G or T; 0 is all of it."""
    time: str = "4:00:00"
    """Time limit, as Slurm writes it: "90" and "90:00" (minutes), "4:00:00", "2-12" (days-hours),
    "2-12:30", "2-12:30:00"; at least a minute."""
    nodes: int = 1
    """Nodes of each job, at least 1."""
    tasks_per_node: int = 0
    """Processes of each node without GPUs; 0 is one. With GPUs there is one for each."""
    array_parallelism: int = 64
    """Most elements of a job array that run at once, at least 1."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job proper: modules, conda."""
    python: str = ""
    """Command that runs Python, e.g. "apptainer exec --nv image.sif python"; empty is this one."""
    mail_user: str = ""
    """Whom Slurm writes to."""
    mail_type: str = ""
    """About what, with commas: END, FAIL, TIME_LIMIT, …"""
    signal_delay_s: int = 120
    """Seconds before the time limit at which Slurm warns, so that the job saves and is requeued:
    1..65535, less than the time limit. Slurm may warn up to 60 s earlier."""
    max_requeues: int = 1000
    """Most requeueings of a job at its time limit, at least 0. On limits up to ten minutes those
    after preemption count too."""
    sbatch: dict[str, Option] = field(default_factory=dict, hash=False)
    """Other options of sbatch by their long names: text, whole number, or true for a flag."""
    srun_args: tuple[str, ...] = ()
    """Further arguments of srun."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            fits, allowed = KINDS[str(item.type)]
            require(fits(value), item.name, value, allowed)
        self._check_sizes()
        self._check_time()
        for kind in self.mail_type.upper().split(",") if self.mail_type else ():
            allowed = f"some of {', '.join(MAIL_TYPES)}.{closest(kind, MAIL_TYPES)}"
            require(kind in MAIL_TYPES, "mail_type", self.mail_type, allowed)
        for name in self.sbatch:
            _check_option(name)

    def _check_sizes(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            require(value >= least, name, value, f"at least {least}")
        require(not self.mem or is_memory(self.mem), "mem", self.mem, 'a size such as "32G"')
        if self.gpus_per_node:
            allowed = f"0 or {self.gpus_per_node}: each GPU has one process"
            tasks = self.tasks_per_node
            require(tasks in (0, self.gpus_per_node), "tasks_per_node", tasks, allowed)

    def _check_time(self) -> None:
        allowed = 'at least a minute, as "90" (minutes), "4:00:00" or "2-12" (days-hours)'
        require(self.minutes > 0, "time", self.time, allowed)
        most = min(self.minutes * 60 - 1, 65535)
        allowed = f"at most {most} with time = {self.time!r}"
        require(self.signal_delay_s <= most, "signal_delay_s", self.signal_delay_s, allowed)

    @property
    def minutes(self) -> int:
        """The time limit."""
        return to_minutes(self.time) or 0

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node, whether gpus or gres says so."""
        return gpus_of(self.gres) or self.gpus

    @property
    def processes_per_node(self) -> int:
        """One for each GPU, at least one."""
        return max(1, self.gpus_per_node, self.tasks_per_node)

    @property
    def single(self) -> Profile:
        """The same for work that several processes cannot share: one of them, with one GPU."""
        return dataclasses.replace(
            self, nodes=1, tasks_per_node=0, gpus=min(1, self.gpus), gres=with_one_gpu(self.gres)
        )

    def parameters(self, job_name: str) -> dict[str, Any]:
        """What ``submitit.SlurmExecutor.update_parameters`` takes.

        ``python`` and ``max_requeues`` are not among it: they go to the executor's constructor.
        """
        # srun does not inherit sbatch's cores per task; a dead process must end the others.
        srun = [f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=1", *self.srun_args]
        other_memory = "mem-per-cpu" in self.sbatch or "mem-per-gpu" in self.sbatch
        values = {
            "job_name": job_name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "nodelist": self.nodelist,
            "gpus_per_node": 0 if gpus_of(self.gres) else self.gpus,
            "gres": self.gres,
            "cpus_per_task": self.cpus,
            "mem": "" if other_memory else self.mem,
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": self.processes_per_node,
            "array_parallelism": self.array_parallelism,
            "setup": list(self.setup),
            "mail_user": self.mail_user,
            "mail_type": self.mail_type,
            "signal_delay_s": self.signal_delay_s,
            "srun_args": srun,
            "additional_parameters": {"requeue": True, **self.sbatch},
        }
        # submitit's own wckey would be refused where a site keeps account of them.
        return {name: value for name, value in values.items() if value} | {"wckey": None}

    def overridden(self, options: Sequence[str]) -> Profile:
        """This profile with ``KEY=VALUE`` or flags, by this class's names or by sbatch's.

        What is no field goes to ``sbatch``; ``KEY=`` takes it out of there.

        Raises:
            ValueError: naming the option, and what is allowed.
        """
        given: dict[str, Any] = {}
        table = dict(self.sbatch)
        for option in options:
            key, equals, text = option.partition("=")
            name = _field_name(key)
            if name is None:
                table[long_name(key)] = text if equals else True
            elif not equals:
                raise ValueError(f"--sbatch {option} needs a value: {option}=…")
            else:
                given[name] = _converted(name, text, given.get(name, ()))
        given["sbatch"] = {key: value for key, value in table.items() if value != ""}
        try:
            profile = dataclasses.replace(self, **given)
            _check_gpus(given, profile)
        except ValueError as error:
            raise ValueError(f"--sbatch: {error}") from None
        return profile

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Profile:
        """A profile from plain values; fields left out have their defaults.

        Raises:
            ValueError: naming key and value, and what is allowed.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}.{closest(_field_name(key) or key, names)} Options of "
                    "sbatch that are no key of a profile go into its table [sbatch]"
                )
        lists: dict[str, Any] = {key: tuple(v) for key, v in values.items() if isinstance(v, list)}
        return cls(**values | lists)


def user_folder() -> Path:
    """Where users keep their profiles."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "colddiff" / "profiles"


def load_profile(name: str, overrides: Sequence[str] = ()) -> Profile:
    """The profile of a name or file, with ``--sbatch`` overrides; the default one for no name.

    Raises:
        ValueError: naming the file, key and value, and what is allowed.
    """
    profile = _read(_find(name)) if name else Profile()
    return profile.overridden(overrides)


def _find(name: str) -> Path:
    if "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"--profile {name!r} is no file")
        return path
    folders = (user_folder(), PROJECT_FOLDER)
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")})
    raise ValueError(
        f"no profile {name!r}.{closest(name, known)} Known are {', '.join(known)}, "
        f"in {folders[0]} and {folders[1]}"
    )


def _read(path: Path) -> Profile:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))  # its error names the line
        if isinstance(values.get("sbatch"), dict):
            values["sbatch"] = {long_name(key): value for key, value in values["sbatch"].items()}
        profile = Profile.from_dict(values)
        _check_gpus(values, profile)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return profile


def _field_name(key: str) -> str | None:
    """The field that a key means, by its own name or another's; None for none."""
    name = long_name(key)
    own = {item.name.replace("_", "-"): item.name for item in dataclasses.fields(Profile)}
    return (own | SPELLINGS).get(name)


def _converted(name: str, text: str, before: tuple[str, ...]) -> Any:
    """The text as this field's type; what is no number is left for the field's check to refuse."""
    kind = next(str(item.type) for item in dataclasses.fields(Profile) if item.name == name)
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            return text
    if kind.startswith("tuple"):
        return (*before, text) if text else ()
    return text


def _check_option(name: str) -> None:
    """Refuse, in the table of sbatch's options, what the launcher or a field sets."""
    known = _field_name(name)
    if known is not None:
        raise ValueError(f"sbatch's option {name} is the profile's {known}: give it there")
    if name in REFUSED:
        raise ValueError(f"sbatch's option {name} cannot be given: {REFUSED[name]}")
    if len(name) < 2 or name != long_name(name):
        raise ValueError(f"sbatch's option {name!r} is to be given by its long name, with dashes")


def _check_gpus(given: dict[str, Any], profile: Profile) -> None:
    allowed = f"left out, because gres = {profile.gres!r} has the GPUs: change that"
    require(not ("gpus" in given and gpus_of(profile.gres)), "gpus", profile.gpus, allowed)
