"""What the suite's command lines share: how a command's end becomes a message and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from colddiff.interruption import Interrupted
from colddiff.tracking import TrackingError
from jobs.slurm import SlurmError
from jobs.tasks import AlreadyRunningError

FAILURES: tuple[type[Exception], ...] = (AlreadyRunningError, SlurmError, TrackingError, OSError)
"""What may go wrong without being anybody's mistake: a message says enough."""


def carry_out(
    parse: Callable[[Sequence[str]], Callable[[], int]],
    arguments: Sequence[str] | None,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Parse and carry out; the exit code: 0 done, 1 it failed, 2 bad input, 128 + signal.

    Args:
        parse: makes a command of the words of the command line.
        arguments: these words; the process's own for None.
        failures: further exceptions that are told as one line, beside :data:`FAILURES`.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("colddiff").setLevel(logging.INFO)
    try:
        return parse(list(sys.argv[1:] if arguments is None else arguments))()
    except ValueError as error:
        return _fail(f"error: {error}", 2)
    except BrokenPipeError:  # the reader, head or less, has seen enough
        sys.stdout = None  # nothing is left to flush into
        return 0
    except Interrupted as interruption:
        code = 128 + interruption.signum
        return _fail(f"{interruption}; saved. The same command goes on from there", code)
    except KeyboardInterrupt:
        return _fail("interrupted. The same command takes it up again", 130)
    except FAILURES + failures as error:
        return _fail(f"error: {error}", 1)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
