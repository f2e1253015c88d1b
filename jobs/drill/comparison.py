"""Whether two finished runs of one configuration are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from colddiff.checkpoint import load_checkpoint, load_weights
from colddiff.journal import MEASURED, read_records, same_bits
from colddiff.run_folder import RunFolder

Points = dict[tuple[int, str], float]
SHOWN = 3
"""Differences of one kind that are named."""


def differences(a: RunFolder, b: RunFolder) -> list[str]:
    """How ``b`` differs from ``a``, for people; empty where they are identical.

    Compared are the weights' file, all of the last checkpoint, and the journals without what
    measures the machine; a journal must also have each of its records once.
    """
    return [*_weights(a, b), *_checkpoints(a, b), *_journals(a, b)]


def _weights(a: RunFolder, b: RunFolder) -> Iterator[str]:
    if a.weights.read_bytes() == b.weights.read_bytes():
        return
    left, right = load_weights(a.weights)[0], load_weights(b.weights)[0]
    if left.keys() != right.keys():
        yield f"{a.weights.name} has other parameters"
        return
    largest = max(_distance(left[name], right[name]) for name in left)
    yield f"{a.weights.name} differs, by at most {largest:.3g}"


def _checkpoints(a: RunFolder, b: RunFolder) -> Iterator[str]:
    cpu = torch.device("cpu")
    left, right = (dict(_leaves(load_checkpoint(each.checkpoints, cpu), "")) for each in (a, b))
    other = left.keys() ^ right.keys()
    if other:
        yield f"the checkpoints have other contents: {_some(sorted(other))}"
        return
    unequal = [name for name in left if not _same(left[name], right[name])]
    if unequal:
        yield f"{len(unequal)} of the checkpoint's {len(left)} values differ: {_some(unequal)}"


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is in nested dictionaries and lists, each with its path."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{path}/{name}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}/{index}")
    else:
        yield path, node


def _same(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return bool(left == right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # As bytes, for which -0 is not 0, and a NaN is itself.
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)]
    return torch.equal(*bits)


def _distance(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float((left.double() - right.double()).abs().max()) if left.numel() else 0.0


def _journals(a: RunFolder, b: RunFolder) -> Iterator[str]:
    left, repeated = _points(a)
    right, again = _points(b)
    if repeated or again:
        yield f"the journal has records twice: {_some(_named(repeated + again))}"
    if lost := sorted(left.keys() - right.keys()):
        yield f"the journal lacks records: {_some(_named(lost))}"
    if added := sorted(right.keys() - left.keys()):
        yield f"the journal has records of its own: {_some(_named(added))}"
    shared = sorted(left.keys() & right.keys())
    if unequal := [point for point in shared if not same_bits(left[point], right[point])]:
        yield f"{len(unequal)} of the journal's records differ: {_some(_named(unequal))}"
    if list(right) != sorted(right, key=lambda point: point[0]):
        yield "the journal's steps are not in order"


def _points(folder: RunFolder) -> tuple[Points, list[tuple[int, str]]]:
    """What the journal says of the model, and what it says more than once."""
    points: Points = {}
    repeated = []
    for record in read_records(folder.journal)[0]:
        for key, value in record.metrics.items():
            if key.startswith(MEASURED):
                continue
            if (record.step, key) in points:
                repeated.append((record.step, key))
            points[record.step, key] = value
    return points, repeated


def _named(points: list[tuple[int, str]]) -> list[str]:
    return [f"{key} at step {step}" for step, key in points]


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
