"""Whether two runs computed the same, bit for bit."""

from __future__ import annotations

import torch

from colddiff.checkpoint import load_checkpoint
from colddiff.journal import read_records
from colddiff.run_folder import RunFolder


def essence(folder: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """The journal without clocks: steps and what was computed, in order."""
    records, _ = read_records(folder.journal)
    return [
        (r.step, {k: v for k, v in r.metrics.items() if not k.startswith(("speed/", "system/"))})
        for r in records
    ]


def assert_identical(a: RunFolder, b: RunFolder) -> None:
    """Two finished runs: weights, average, optimiser and journal."""
    assert a.weights.read_bytes() == b.weights.read_bytes()
    cpu = torch.device("cpu")
    left, right = load_checkpoint(a.checkpoints, cpu), load_checkpoint(b.checkpoints, cpu)
    assert left is not None and right is not None
    assert left["step"] == right["step"] == a.config.training.steps
    for part in ("model", "average"):
        assert left[part].keys() == right[part].keys()
        for name in left[part]:
            assert torch.equal(left[part][name], right[part][name]), name
    assert left["optimiser"]["state"].keys() == right["optimiser"]["state"].keys()
    for index, slots in left["optimiser"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, right["optimiser"]["state"][index][name]), (index, name)
    assert essence(a) == essence(b)
