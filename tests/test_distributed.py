"""Several ranks train one run: the same as one process does, and resumable like it.

All ranks are real processes that meet over gloo.
"""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rank_processes import TRAIN, Ended, interrupt, run_ranks, start_ranks, wait
from run_comparison import assert_identical, essence
from tiny import replaced, tiny
from torch import Tensor

from colddiff.checkpoint import checkpoints, load_checkpoint
from colddiff.config import RunConfig
from colddiff.files import read_json
from colddiff.ranks import Ranks
from colddiff.run_folder import RunFolder
from colddiff.training import train

TOLERANCE = 1e-5
"""Relative, of whole vectors. Sums in another order differ by float32's 6e-8 a few times over:
measured 1e-7 to 9e-7, in the gradient norm up to 3e-6. A wrong share differs by 1e-3 and more."""
WORLD_SIZE = 3
"""In the tests of resuming: from three ranks on, sums depend on the order that they are made in."""


def both_kinds() -> list[RunConfig]:
    """Cold and hot diffusion, with accumulation, crops, flips and clipping."""
    cold = tiny(steps=6, accumulation=2, log_every=1, validate_every=3, own_states=0.5)
    assert cold.data.flip and cold.data.preparation == "crop" and cold.optimiser.clip_norm
    return [cold, replaced(cold, "degradation", kind="noise")]


def make(path: Path, configs: list[RunConfig]) -> list[RunFolder]:
    return [RunFolder.create(path, config) for config in configs]


def differences(a: RunFolder, b: RunFolder) -> dict[str, float]:
    """Relative, of what two runs have computed."""
    left, right = (load_checkpoint(f.checkpoints, torch.device("cpu")) for f in (a, b))
    assert left is not None and right is not None and left["step"] == right["step"]

    def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
        x, y = (torch.cat([v.double().flatten() for v in values]) for values in (ours, theirs))
        return ((x - y).norm() / x.norm()).item()

    found = {
        part: relative(list(left[part].values()), list(right[part].values()))
        for part in ("model", "average")
    }
    slots = [list(state["optimiser"]["state"].values()) for state in (left, right)]
    # Adam's first moment is the sum of the gradients, the last ones counting most.
    found["gradients"] = relative(*([slot["exp_avg"] for slot in each] for each in slots))
    records = [dict(essence(folder)) for folder in (a, b)]
    assert records[0].keys() == records[1].keys()
    for key in ("train/loss", "train/gradient_norm", "validation/rmse"):
        ours, theirs = ([m[key] for m in each.values() if key in m] for each in records)
        found[key] = relative([torch.tensor(ours)], [torch.tensor(theirs)])
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    folders = make(tmp_path_factory.mktemp("one"), both_kinds())
    for folder in folders:
        train(folder)
    return folders


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_compute_what_one_process_computes(
    world_size: int, tmp_path: Path, one_process: list[RunFolder]
) -> None:
    shared = make(tmp_path, both_kinds())
    run_ranks(world_size, *shared)
    for ours, expected in zip(shared, one_process, strict=True):
        assert ours.path.name == expected.path.name  # the run id does not know of ranks
        assert ours.is_trained
        found = differences(ours, expected)
        assert all(value < TOLERANCE for value in found.values()), found
        attempts = read_json(ours.environment)["attempts"]
        assert [attempt["world_size"] for attempt in attempts] == [world_size]


def test_the_comparison_sees_ranks_that_take_the_same_share(
    tmp_path: Path, one_process: list[RunFolder]
) -> None:
    """What if every rank took the first share? Then nothing above would be close."""
    wrong = """
import colddiff.trainer
from colddiff.batches import Order
colddiff.trainer.Order = lambda n, batch, seed, rank, world: Order(n, batch, seed, 0, world)
"""
    folders = make(tmp_path, both_kinds())
    run_ranks(2, *folders, script=wrong + TRAIN)
    for ours, expected in zip(folders, one_process, strict=True):
        assert all(value > 50 * TOLERANCE for value in differences(ours, expected).values())


def long_run() -> RunConfig:
    """Its records, checkpoints and validations fall together only sometimes."""
    return tiny(steps=40, batch_size=6, log_every=3, checkpoint_every=10, validate_every=15)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder.create(tmp_path_factory.mktemp("uninterrupted"), long_run())
    run_ranks(WORLD_SIZE, folder)
    return folder


def assert_resumes(ended: list[Ended]) -> None:
    assert "resuming" in ended[0].output
    assert "not deterministic" not in ended[0].output


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    tmp_path: Path, uninterrupted: RunFolder
) -> None:
    folder = RunFolder.create(tmp_path, long_run())
    ended = interrupt(folder, WORLD_SIZE, 12, {1: signal.SIGUSR2})
    stopped = [re.findall(r"Interrupted: stopped by (\w+) at step (\d+)", r.output) for r in ended]
    status = folder.status()
    assert status is not None and status.state == "interrupted"
    assert stopped == [[("SIGUSR2", str(status.step))]] * WORLD_SIZE, ended
    assert 12 <= status.step < 40
    state = load_checkpoint(folder.checkpoints, torch.device("cpu"))
    assert state is not None and state["step"] == status.step
    assert_resumes(run_ranks(WORLD_SIZE, folder))
    assert_identical(folder, uninterrupted)


def test_kill_9_of_all_ranks_changes_nothing(tmp_path: Path, uninterrupted: RunFolder) -> None:
    folder = RunFolder.create(tmp_path, long_run())
    ended = interrupt(folder, WORLD_SIZE, 15, dict.fromkeys(range(WORLD_SIZE), signal.SIGKILL))
    assert [rank.code for rank in ended] == [-signal.SIGKILL] * WORLD_SIZE
    assert_resumes(run_ranks(WORLD_SIZE, folder))
    assert_identical(folder, uninterrupted)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_with_fewer(tmp_path: Path) -> None:
    """Also what a run records is the mean over the ranks, however many they are now."""
    folder = RunFolder.create(tmp_path, long_run())
    ended = interrupt(folder, 2, 12, {1: signal.SIGKILL})
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    status = folder.status()
    assert status is not None and (status.state, status.step >= 12) == ("failed", True)
    train(folder)
    alone = RunFolder.create(tmp_path / "alone", long_run())
    train(alone)
    found = differences(folder, alone)
    assert found["train/loss"] < TOLERANCE, found
    assert [a["world_size"] for a in read_json(folder.environment)["attempts"]] == [2, 1]


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    before = contents(folder)
    for rank in range(3):  # no rendezvous is tried either: nobody listens there
        with pytest.raises(ValueError, match=r"training.batch_size = 8 .*world size 3"):
            train(folder, ranks=Ranks(rank, 3, rank, "127.0.0.1:1"))
    assert contents(folder) == before


def contents(folder: RunFolder) -> dict[str, tuple[bytes, int]]:
    """Every file below, with its time."""
    return {
        str(path.relative_to(folder.path)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.path.rglob("*")
        if path.is_file()
    }


def twin(folder: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    """Each rank gets a folder of its own, as if no disk were shared: what it writes stays there."""
    first = RunFolder.create(tmp_path / "first", tiny())
    second = twin(first, tmp_path / "second")
    before = contents(second)
    ended = wait(start_ranks(2, [[first.path], [second.path]]))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert first.is_trained
    assert contents(second) == before
    assert "step 30/30" in ended[0].output and "INFO" not in ended[1].output
    # Resumed from the last but one checkpoint, beside what a killed save leaves behind.
    last = checkpoints(first.checkpoints)[-1]
    assert last.name == "step-00000030.pt"
    last.unlink()
    (first.checkpoints / ".step.pt.0.tmp").write_bytes(b"torn")
    shutil.rmtree(second.path)
    second = twin(first, tmp_path / "second")
    before = contents(second)
    ended = wait(start_ranks(2, [[first.path], [second.path]]))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "at step 28" in ended[0].output and last.exists()
    assert not list(first.checkpoints.glob(".*.tmp"))
    assert contents(second) == before


def test_ranks_at_different_checkpoints_refuse_to_go_on(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "first", tiny(steps=14, validate_every=0))
    train(first)
    second = twin(first, tmp_path / "second")
    checkpoints(second.checkpoints)[-1].unlink()
    before = contents(second)
    ended = wait(start_ranks(2, [[first.path], [second.path]]))
    expected = "the ranks differ in the step of their checkpoint: rank 0 has 14, rank 1 has 7"
    assert all(f"RuntimeError: {expected}" in rank.output for rank in ended), ended
    status = first.status()
    assert status is not None and (status.state, status.message) == (
        "failed",
        f"RuntimeError: {expected}",
    )
    assert contents(second) == before


def test_all_ranks_see_that_the_loss_is_not_finite(tmp_path: Path) -> None:
    """Only rank 1's batch is poisoned, and what it computes there reaches nobody's weights."""
    poisoned = """
import colddiff.trainer
from colddiff.optimisation import Interval
add = Interval.add
def poison(self, loss, norm):
    add(self, loss * float("nan") if sys.argv[1] == "1" and self.steps == 2 else loss, norm)
Interval.add = poison
"""
    folder = RunFolder.create(tmp_path, tiny(log_every=4, checkpoint_every=3))
    script = "import sys" + poisoned + TRAIN
    ended = wait(start_ranks(2, [[folder.path]] * 2, script))
    for rank in ended:
        assert "NonFiniteError: loss nan" in rank.output and "steps 1..3" in rank.output, rank
    assert not checkpoints(folder.checkpoints)
    status = folder.status()
    assert status is not None and status.state == "failed"
