"""What the configuration's dataclasses share: checked types and ranges, and reading from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal, TypeVar, cast

Node = TypeVar("Node")


def elsewhere(default: Any) -> Any:
    """A field that does not define the result and so is no part of the run id."""
    return field(default=default, metadata={"identity": False})


def added(default: Any) -> Any:
    """A field newer than the first runs: part of the run id only where it is not at its default."""
    return field(default=default, metadata={"identity": "changed"})


def is_added(item: dataclasses.Field[Any]) -> bool:
    """Whether a field is an :func:`added` one."""
    return item.metadata.get("identity") == "changed"


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the field, its value and what is allowed."""
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed: it must be {allowed}")


class Checked:
    """Checks every field against its annotation; subclasses add ranges in :meth:`check`."""

    SECTION = ""

    def __post_init__(self) -> None:
        hints = _hints(cast(Any, type(self)))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{self.SECTION}.{item.name}".lstrip(".")
            value, hint = getattr(self, item.name), hints[item.name]
            _check_type(name, value, hint)
            if hint is float:
                # 7 and 7.0, 0.0 and -0.0 are the same setting: one JSON text, one run id.
                object.__setattr__(self, item.name, float(value) + 0.0)
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` where a value is out of range."""

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """:func:`require` for one of this section's fields."""
        require(condition, f"{self.SECTION}.{name}", getattr(self, name), allowed)


def closest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean …?``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def identity(node: Any) -> Any:
    """Nested dictionaries of the fields that define the result."""
    if not dataclasses.is_dataclass(node):
        return node
    kept = (f for f in dataclasses.fields(node) if f.metadata.get("identity", True))
    values = {
        f.name: identity(getattr(node, f.name))
        for f in kept
        if not (is_added(f) and getattr(node, f.name) == f.default)
    }
    return {name: value for name, value in values.items() if value != {}}


def build(cls: type[Node], values: Any, path: str = "") -> Node:
    """A dataclass tree from nested dictionaries, as JSON gives them.

    Raises:
        ValueError: for unknown fields, with the nearest known one, and for bad values.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or 'configuration'} = {values!r} must be an object")
    hints = _hints(cast(Any, cls))  # mypy takes types for unhashable
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        dotted = f"{path}.{name}".lstrip(".")
        if name not in names:
            raise ValueError(f"unknown field {dotted!r}.{closest(name, names)}")
        items = typing.get_args(hints[name])
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = build(cast(type[Any], hints[name]), value, dotted)
        elif items and dataclasses.is_dataclass(items[0]) and isinstance(value, list | tuple):
            arguments[name] = tuple(
                build(cast(type[Any], items[0]), each, f"{dotted} {number}")
                for number, each in enumerate(value, start=1)
            )
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_type(name: str, value: Any, hint: Any) -> None:
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")
    elif origin is tuple:
        item = typing.get_args(hint)[0]
        require(isinstance(value, tuple), name, value, f"a list of {item.__name__}")
        for entry in value:
            _check_type(name, entry, item)
    elif hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        finite = number and abs(value) <= sys.float_info.max
        require(finite, name, value, "a finite number")
    else:
        # bool is a subclass of int, but True is no number of steps.
        exact = type(value) is hint if hint in (int, bool) else isinstance(value, hint)
        require(exact, name, value, f"of type {hint.__name__}")
