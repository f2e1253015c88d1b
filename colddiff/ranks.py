"""Several processes train one run: who they are, and the few things they tell each other.

A process knows its :class:`Ranks` from whoever launched it. The gradients are averaged by torch;
all else that the ranks exchange (signals, sums of losses) is a few numbers and goes between their
CPUs, so no rank waits for a GPU to hear of it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colddiff.interruption import Interrupted, strongest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TIMEOUT = datetime.timedelta(minutes=30)
"""How long ranks wait for each other: rank 0 validates and saves alone, on disks that may stall.

A rank that dies is not waited for: its connections close, and the others fail at once.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one run together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Which of its node's processes this is: chooses the GPU."""
    address: str = ""
    """``host:port`` where rank 0 waits for the others; needed where there are others."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank = {self.rank} is not allowed: it must be in 0..world_size - 1")
        if self.world_size > 1 and not self.address:
            raise ValueError(f"{self.world_size} ranks need the address of rank 0, host:port")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.rank == 0


ALONE = Ranks()


class Group:
    """What training needs of the other ranks; this one has none, so nothing costs anything."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device

    def agree(self, signum: int | None) -> int | None:
        """The strongest signal that any rank has had; the same on all of them."""
        return signum

    def gather(self, values: Tensor) -> Tensor:
        """Float64 ``world_size …`` on the CPU of every rank; waits for the device."""
        return values.detach().cpu().double()[None]

    def require_same(self, what: str, value: object) -> None:
        """Raise ``RuntimeError`` on all ranks, naming each one's value, where these differ."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def wrap(self, module: nn.Module, *example: Tensor) -> nn.Module:
        """The module with gradients averaged over the ranks; ``example`` is any input of it."""
        return module

    def no_sync(self, module: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
        """Where ``skip``, gradients made inside stay on this rank, until some made outside."""
        return contextlib.nullcontext()


class ProcessGroup(Group):
    """Several ranks: torch's default process group, which :func:`open_group` opens and closes."""

    def agree(self, signum: int | None) -> int | None:
        """The strongest signal that any rank has had; the same on all of them."""
        import torch

        signums = self.gather(torch.tensor(signum or 0)).long().tolist()
        return strongest([number or None for number in signums])

    def gather(self, values: Tensor) -> Tensor:
        """Float64 ``world_size …`` on the CPU of every rank; waits for the device."""
        import torch

        mine = values.detach().cpu().double()
        gathered = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        torch.distributed.all_gather(gathered, mine)
        return torch.stack(gathered)

    def require_same(self, what: str, value: object) -> None:
        """Raise ``RuntimeError`` on all ranks, naming each one's value, where these differ."""
        import torch

        values: list[object] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            each = ", ".join(f"rank {rank} has {other}" for rank, other in enumerate(values))
            raise RuntimeError(f"the ranks differ in {what}: {each}")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree(None)

    def wrap(self, module: nn.Module, *example: Tensor) -> nn.Module:
        """The module with gradients averaged over the ranks; ``example`` is any input of it.

        DistributedDataParallel lays its buckets out anew after the first backward, and the layout
        decides in which order three or more ranks are added up. One backward without effect comes
        first, or a resumed run would round its first step differently from an uninterrupted one.
        """
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            # torch 2.14 gives the option another name, which older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            wrapped = DistributedDataParallel(module, broadcast_buffers=False)
        wrapped(*example).sum().backward()
        wrapped.zero_grad(set_to_none=True)
        return wrapped

    def no_sync(self, module: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
        """Where ``skip``, gradients made inside stay on this rank, until some made outside."""
        from torch.nn.parallel import DistributedDataParallel

        if skip and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()


_openings = itertools.count()


@functools.cache
def _meeting_point(ranks: Ranks) -> Any:
    """The store where ranks learn each other's addresses: one for all groups of a process.

    Rank 0 keeps it. Closing it with its group would not do: torch keeps it while anything refers
    to the group, and the next group's ranks would find old addresses there and call in vain.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = ranks.address.rsplit(":", 1)
    return TCPStore(host, int(port), ranks.world_size, ranks.is_main, TIMEOUT)


@contextlib.contextmanager
def open_group(ranks: Ranks, device: torch.device) -> Iterator[Group]:
    """Meet the other ranks, and part from them at the end; alone, do nothing of the kind.

    A rank that fails takes the others along: what they wait for does not come.
    """
    if ranks.world_size == 1:
        yield Group(ranks, device)
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"group {next(_openings)}", _meeting_point(ranks)),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=TIMEOUT,
    )
    together = False
    try:
        yield ProcessGroup(ranks, device)
        together = True
    except Interrupted:
        together = True  # all ranks have agreed on it
        raise
    finally:
        # NCCL parts only together: a failing rank would wait there for ranks that wait for it.
        # With the process its connections end anyway.
        if together or device.type != "cuda":
            dist.destroy_process_group()
