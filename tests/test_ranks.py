"""What ranks tell each other, in real processes; and one rank alone, which tells nobody."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from rank_processes import ROOT, start_ranks, wait

from colddiff.interruption import strongest
from colddiff.optimisation import resolve_device
from colddiff.ranks import ALONE, Group, Ranks, open_group

CPU = torch.device("cpu")
USR2, TERM, INT = signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


def test_ranks_are_checked() -> None:
    assert Ranks().is_main and Ranks(0, 2, 0, "host:1").is_main
    assert not Ranks(1, 2, 1, "host:1").is_main
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank = {rank} is not allowed"):
            Ranks(rank, world_size, 0, "host:1")
    with pytest.raises(ValueError, match="2 ranks need the address"):
        Ranks(0, 2)


def test_usr2_is_told_before_term_before_int() -> None:
    """Slurm sends USR2 where the job must requeue itself: no other signal may hide that."""
    for signals in itertools.permutations((None, INT, TERM, USR2)):
        assert strongest(list(signals)) == USR2
    for signals in itertools.permutations((None, INT, TERM)):
        assert strongest(list(signals)) == TERM
    assert strongest([None, INT, None]) == INT
    assert strongest([None, None]) is None


def test_a_rank_alone_opens_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    with open_group(ALONE, CPU) as group:
        assert type(group) is Group
        assert not torch.distributed.is_initialized()
        assert [group.agree(signum) for signum in (None, INT, 12345)] == [None, INT, 12345]
        assert torch.equal(group.gather(torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 2.0]]))
        assert group.gather(torch.zeros(2)).dtype == torch.float64
        assert group.wrap(module, torch.zeros(1, 2)) is module
        group.require_same("anything", object())


TALK = """
import json, sys, torch
from colddiff.ranks import Ranks, open_group

rank, world_size = int(sys.argv[1]), int(sys.argv[2])
signals = json.loads(sys.argv[4])
with open_group(Ranks(rank, world_size, rank, sys.argv[3]), torch.device("cpu")) as group:
    agreed = [group.agree(row[rank]) for row in signals]
    gathered = group.gather(torch.tensor([rank + 1 / 3, -rank], dtype=torch.float64)).tolist()
    group.require_same("what is equal", ("a", 1))
    try:
        group.require_same("height", 10 * (rank // 2))
    except RuntimeError as error:
        print(json.dumps([agreed, gathered, str(error)]))
assert not torch.distributed.is_initialized()
"""


def test_all_ranks_hear_the_same() -> None:
    signals = [
        [None, None, None],
        [None, None, int(INT)],
        [int(INT), int(TERM), None],
        [int(TERM), None, int(USR2)],
    ]
    ended = wait(start_ranks(3, [[json.dumps(signals)]] * 3, TALK))
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    heard = [json.loads(rank.output.splitlines()[-1]) for rank in ended]
    assert heard[0] == heard[1] == heard[2]
    agreed, gathered, error = heard[0]
    assert agreed == [None, INT, TERM, USR2]
    assert gathered == [[1 / 3, 0.0], [1 + 1 / 3, -1.0], [2 + 1 / 3, -2.0]]
    assert error == "the ranks differ in height: rank 0 has 0, rank 1 has 0, rank 2 has 10"


FAIL = """
import sys, torch
from colddiff.ranks import Ranks, open_group

rank = int(sys.argv[1])
with open_group(Ranks(rank, 2, rank, sys.argv[3]), torch.device("cpu")) as group:
    group.barrier()
    if rank == 1:
        raise KeyError("the disk")
    group.barrier()
"""


def test_a_failing_rank_takes_the_others_along_at_once() -> None:
    """Far below the half hour that ranks have patience with slow ones."""
    start = time.monotonic()
    ended = wait(start_ranks(2, [[], []], FAIL))
    assert time.monotonic() - start < 60
    assert [rank.code for rank in ended] == [1, 1]
    assert "KeyError: 'the disk'" in ended[1].output
    assert "RuntimeError" in ended[0].output and "the disk" not in ended[0].output


AVERAGE = """
import sys, torch
from colddiff.ranks import Ranks, open_group

rank, world_size = int(sys.argv[1]), int(sys.argv[2])
module = torch.nn.Linear(2, 1, bias=False)
with torch.no_grad():
    module.weight.zero_()
with open_group(Ranks(rank, world_size, rank, sys.argv[3]), torch.device("cpu")) as group:
    wrapped = group.wrap(module, torch.ones(1, 2))
    assert module.weight.grad is None
    with group.no_sync(wrapped, skip=True):
        wrapped(torch.tensor([[rank + 1.0, 0.0]])).sum().backward()
    print("own", module.weight.grad.tolist())
    with group.no_sync(wrapped, skip=False):
        wrapped(torch.tensor([[0.0, 10.0 * rank]])).sum().backward()
    print("mean", module.weight.grad.tolist())
"""


def test_gradients_are_averaged_where_not_skipped() -> None:
    """Rank r's gradients are (r + 1, 0) and (0, 10 r): their means are (2, 0) and (0, 10)."""
    ended = wait(start_ranks(3, [[]] * 3, AVERAGE))
    for number, rank in enumerate(ended):
        assert f"own [[{number + 1.0}, 0.0]]" in rank.output, rank
        assert "mean [[2.0, 10.0]]" in rank.output, rank
        assert "Warning" not in rank.output, rank


def test_the_command_line_may_name_ranks_without_waiting_for_torch() -> None:
    code = "import sys, colddiff.ranks; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "False\n"


def test_the_gpu_is_the_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm may show each of a node's ranks all GPUs, or only its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for seen, expected in ((4, [0, 1, 2, 3]), (1, [0, 0, 0, 0])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        chosen = [resolve_device("auto", local_rank) for local_rank in range(4)]
        assert chosen == [torch.device("cuda", index) for index in expected]
    assert resolve_device("cpu", 3) == CPU
