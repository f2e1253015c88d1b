"""What the keys of a profile may hold, and how Slurm spells them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

SPELLINGS = {
    "A": "account",
    "C": "constraint",
    "N": "nodes",
    "c": "cpus",
    "cpus-per-task": "cpus",
    "gpu": "gpus",
    "gpus-per-node": "gpus",
    "max-num-timeout": "max_requeues",
    "memory": "mem",
    "ntasks-per-node": "tasks_per_node",
    "num-gpus": "gpus",
    "num-nodes": "nodes",
    "p": "partition",
    "q": "qos",
    "queue": "partition",
    "signal-delay": "signal_delay_s",
    "t": "time",
    "time-limit": "time",
    "timelimit": "time",
    "timeout": "time",
    "timeout-min": "time",
    "w": "nodelist",
    "walltime": "time",
    "x": "exclude",
}
"""What Slurm, submitit and people call a profile's fields that are named otherwise here."""

_LOGS = "the launcher says where logs go, to find them again"
_ANSWER = "the launcher relies on what sbatch does and answers"
_REQUEUE = "interrupted jobs are requeued; max-requeues=0 ends them at their time limit instead"
REFUSED = {
    "array": "the launcher makes the arrays; array-parallelism=N limits how much of one runs",
    "cpus-per-gpu": "cpus=N is for each process, and each GPU has one",
    "dependency": "the launcher chains jobs itself",
    "error": _LOGS,
    "gpus-per-socket": "gpus=N is for each node",
    "gpus-per-task": "gpus=N is for each node, and each GPU has one process",
    "job-name": "jobs are named after their work; comment=TEXT marks yours",
    "no-requeue": _REQUEUE,
    "ntasks": "nodes=N says it, and tasks-per-node=N on processors",
    "ntasks-per-gpu": "each GPU has one process",
    "open-mode": "a requeued job goes on in the same log",
    "output": _LOGS,
    "parsable": _ANSWER,
    "quiet": _ANSWER,
    "requeue": _REQUEUE,
    "signal": "signal-delay-s=SECONDS says how long before the time limit Slurm warns",
    "test-only": _ANSWER,
    "wait": _ANSWER,
    "wrap": _ANSWER,
}
"""Options of sbatch that the launcher itself needs, and what to use instead."""

MAIL_TYPES = (
    "NONE BEGIN END FAIL REQUEUE ALL INVALID_DEPEND STAGE_OUT TIME_LIMIT TIME_LIMIT_90 "
    "TIME_LIMIT_80 TIME_LIMIT_50 ARRAY_TASKS"
).split()

_TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"  # 2-12, 2-12:30, 2-12:30:00
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)"  # 4:00:00
    r"|(?P<m>\d+)(:(?P<s>\d+))?",  # 90, 90:00
    re.ASCII,
)
_MEMORY = re.compile(r"\d+([KMGT]B?)?", re.ASCII | re.IGNORECASE)


def is_text(value: Any) -> bool:
    """Whether it is text that a line of a batch script can hold."""
    return isinstance(value, str) and value.isprintable()


def is_option(value: Any) -> bool:
    """Whether an option of sbatch can have it as a value; True is a flag's."""
    return value is True or type(value) is int or (is_text(value) and value != "")


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int, "a whole number"),
    "str": (is_text, "a text in quotes, of one line"),
    "tuple[str, ...]": (
        lambda value: isinstance(value, tuple) and all(map(is_text, value)),
        "a list of texts of one line each",
    ),
    "dict[str, Option]": (
        lambda value: isinstance(value, dict) and all(map(is_option, value.values())),
        "a table of texts, whole numbers, and true for flags",
    ),
}
"""What a field of each type takes, also in a user's words."""


def long_name(name: str) -> str:
    """An option's name as ``sbatch --help`` has it: dashes, not underscores."""
    return name.strip().lstrip("-").replace("_", "-")


def to_minutes(time: str) -> int | None:
    """A time limit in minutes, seconds rounded up as Slurm does; None where it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    parts = {name: int(text or 0) for name, text in match.groupdict().items()}
    whole = (parts["d"] * 24 + parts["dh"] + parts["h"]) * 60
    whole += parts["dm"] + parts["hm"] + parts["m"]
    return whole - -(parts["ds"] + parts["hs"] + parts["s"]) // 60


def is_memory(text: str) -> bool:
    """Whether sbatch takes it as a size: a whole number and K, M, G, T or nothing."""
    return _MEMORY.fullmatch(text) is not None


def with_one_gpu(gres: str) -> str:
    """The same list with one GPU where it asks for several."""
    return re.sub(r"(^|,)(gpu(?::[^:,]+)?):\d+(?=,|$)", r"\1\2:1", gres)


def gpus_of(gres: str) -> int:
    """How many GPUs a list like ``gpu:a100:2,lscratch:100`` asks for."""
    entries = [entry.split(":") for entry in gres.split(",")]
    counts = [parts[-1] for parts in entries if parts[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in counts)
