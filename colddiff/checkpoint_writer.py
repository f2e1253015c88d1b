"""Checkpoints written while training goes on: it waits for the copy of its state, not for the disk.

Serialising, checksum and fsync take seconds for a large network, more on a busy shared disk.
"""

from __future__ import annotations

import concurrent.futures
import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from colddiff.checkpoint import save_checkpoint

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves a folder's checkpoints in a thread of its own, never two at once.

    As a context manager it leaves no write behind. One that failed is raised there, unless the
    block failed itself: then it is logged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` and begin to write the copy, once the write before it is done.

        Raises:
            OSError: where the write before it failed, as on a full disk; this one is not begun.
        """
        self.wait()
        copied = on_host(state)
        self._pending = self._thread.submit(save_checkpoint, self._folder, step, copied)

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            OSError: where it could not be written; earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])  # which a second Ctrl-C may interrupt
        written, self._pending = self._pending, None
        written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()  # waits
        failure = self._pending.exception() if self._pending else None
        if failure is None:
            return
        if error is None:
            raise failure
        log.error("the last checkpoint was not written: %s: %s", type(failure).__name__, failure)


def on_host(value: Any) -> Any:
    """A copy of nested values in the host's memory; none of its tensors is a view of the others'.

    On the CPU ``tensor.cpu()`` is the tensor itself, which the next step changes.
    """
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            copied = copy.copy(value)  # a state_dict has its modules' versions as an attribute
            copied.update({key: on_host(item) for key, item in value.items()})
            return copied
        case list() | tuple():
            return type(value)(on_host(item) for item in value)
    return value
