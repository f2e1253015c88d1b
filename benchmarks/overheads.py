"""What the suite costs beside the computation: records, checkpoints, starts, the command line.

``python benchmarks/overheads.py`` takes some minutes on two cores.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from made_up import MadeUpSlurm, evaluated_run, running_run
from processes import at_most, run_script
from timing import Result, machine, table
from tqdm import tqdm
from trainers import a_trainer, on_digits, with_seed

from colddiff.checkpoint import save_checkpoint
from colddiff.checkpoint_writer import CheckpointWriter
from colddiff.journal import read_records
from colddiff.presets import preset
from colddiff.tracking import BackgroundSync, initialise_store
from colddiff.trainer import Trainer

CPU = torch.device("cpu")
LAUNCHER = "jobs/launch.py"
LOG_EVERY = 50
STEPS_A_LINE = 5
"""When that is measured."""
ALLOWED_SHARE = 0.01
"""Of the time of training, for its record."""
JOURNAL_LINES = 120


def measure_record(seconds: float) -> Iterator[Result]:
    """Journal and MLflow, while a small network trains and its record is sent."""
    config = on_digits("mnist", dim=16, batch=64)
    with tempfile.TemporaryDirectory() as temporary:
        uri = f"sqlite:///{temporary}/mlflow.db"
        initialise_store(uri, "benchmark")  # as the launcher does
        with a_trainer(config) as (trainer, step):
            sync = BackgroundSync(trainer.folder.path, uri, "benchmark")
            sync.start()
            try:
                one, line, sending = _train(trainer, step, sync, seconds)
            finally:
                complete = sync.stop()
            if not complete:
                raise RuntimeError(f"MLflow does not have everything: {sync.error}")
    steps = LOG_EVERY * one
    share = line / steps + sending
    text = f"{share:.2%}, at most {ALLOWED_SHARE:.0%}"
    text += f" ({line / steps:.2%} journal and status, {1000 * line:.1f} ms a line"
    text += f"; {sending:.2%} MLflow; {LOG_EVERY} steps {steps:.2f} s)"
    yield Result("record of a training, mnist at dim 16", ALLOWED_SHARE / share, 1, text)


def _train(
    trainer: Trainer, step: Callable[[], None], sync: BackgroundSync, seconds: float
) -> tuple[float, float, float]:
    """Median seconds of a step and of a line; MLflow's share of the time.

    A line comes more often than asked for, so that there are enough of them, which makes MLflow's
    share rather larger. That share is all processor time of the thread that sends, as if training
    stood still meanwhile; the first time, when it creates the run, is left out.
    """
    bar: tqdm[Any] = tqdm(disable=True)
    while sync.report is None:  # which has the first push, and warms up
        step()
        if sync.error is not None:
            raise sync.error
    trainer.log_interval(1, time.perf_counter(), None, bar)
    steps: list[float] = []
    lines: list[float] = []
    worked, start = _work_of(sync), time.perf_counter()
    while len(lines) < 3 or time.perf_counter() - start < seconds:
        for _ in range(STEPS_A_LINE):
            before = time.perf_counter()
            step()
            steps.append(time.perf_counter() - before)
        before = time.perf_counter()
        trainer.log_interval(1, before, None, bar)
        lines.append(time.perf_counter() - before)
    sending = (_work_of(sync) - worked) / (time.perf_counter() - start)
    return statistics.median(steps), statistics.median(lines), sending


def _work_of(sync: BackgroundSync) -> float:
    """Processor time of the thread that sends, in seconds."""
    (thread,) = (each for each in threading.enumerate() if each.name == "colddiff-tracking")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


class Foreground:
    """A writer for which training waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write, and return then."""
        save_checkpoint(self.folder, step, state)


def measure_checkpoints(repeats: int) -> Iterator[Result]:
    """How long training waits for a checkpoint, of a small network and of the authors'."""
    sizes = {
        "mnist": on_digits("mnist", 32, 2),
        "authors' network": on_digits("mnist-paper", 64, 2),
    }
    for name, config in sizes.items():
        with a_trainer(config) as (trainer, step):
            step()  # the optimiser has a state then
            slow, fast = _wait_for_checkpoints(trainer, repeats)
            (file, *_) = trainer.folder.checkpoints.glob("*.pt")
            size = file.stat().st_size / 1e6
        text = f"training waits {fast:.3f} s, in the foreground {slow:.3f} s ({size:.0f} MB)"
        yield Result(f"checkpoint, {name}", slow / fast, 0, text)


def _wait_for_checkpoints(trainer: Trainer, repeats: int) -> tuple[float, float]:
    """Median seconds in the foreground and as it is."""
    background, foreground = trainer.writer, Foreground(trainer.folder.checkpoints)
    times: dict[CheckpointWriter | Foreground, list[float]] = {foreground: [], background: []}
    with background:
        for _ in range(repeats):
            for writer, measured in times.items():
                trainer.writer = writer  # type: ignore[assignment]  # as far as save() knows
                before = time.perf_counter()
                trainer.save()
                measured.append(time.perf_counter() - before)
                background.wait()
    return statistics.median(times[foreground]), statistics.median(times[background])


def measure_start() -> Iterator[Result]:
    """From the start of a process to the first step of its training, on a new store and again."""
    words = "train --preset demo --cluster debug --no-evaluate --training.steps 1".split()
    words += "--optimiser.warmup-steps 1 --training.log-every 1 --runs runs".split()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, store in enumerate(("new", "existing")):
            done = run_script(LAUNCHER, *words, "--seeds", str(seed), folder=folder)
            (journal,) = folder.glob(f"runs/*-seed{seed}-*/journal.jsonl")
            first = read_records(journal)[0][0]
            seconds = first.timestamp_ms / 1000 - done.began
            yield Result(f"start to first step, {store} MLflow store", 0, 0, f"{seconds:.1f} s")


def measure_launcher(runs: int, repeats: int) -> Iterator[Result]:
    """The command line's answers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slurm = MadeUpSlurm(folder)
        helped = [run_script(LAUNCHER, "--help", folder=folder) for _ in range(repeats)]
        yield at_most("launch.py --help", 1, helped)
        submitted = []
        seeds = [str(seed) for seed in range(runs)]
        words = "train --preset demo --cluster slurm --profile cpu --offline".split()
        for repeat in range(repeats):
            place = f"runs{repeat}"
            options = (*words, "--runs", place, "--seeds", *seeds)
            done = run_script(LAUNCHER, *options, folder=folder, programs=slurm.programs)
            ledger = folder / place / "jobs.jsonl"
            _require(ledger.read_text().count("\n") == runs, f"{ledger} has not {runs} jobs")
            submitted.append(done)
        yield at_most(f"submitting {runs} runs", 10, submitted)
        yield from measure_status(folder, slurm, runs, repeats)


def measure_status(folder: Path, slurm: MadeUpSlurm, number: int, repeats: int) -> Iterator[Result]:
    """Of as many evaluated runs as running ones, all of one Slurm array."""
    place = folder / "status"
    configs = [with_seed(preset("mnist"), seed) for seed in range(number)]
    half = number // 2
    running = [running_run(place, config, records=JOURNAL_LINES) for config in configs[:half]]
    ended = [
        evaluated_run(place, config, seed_of_results=0, records=JOURNAL_LINES)
        for config in configs[half:]
    ]
    slurm.knows(place, running, ended)
    found = []
    for _ in range(repeats):
        words = ("status", "--runs", str(place))
        found.append(run_script(LAUNCHER, *words, folder=folder, programs=slurm.programs))
        states = [line.split()[2] for line in found[-1].output.splitlines()[1:]]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        wanted = {"running": len(running), "evaluated": len(ended)}
        _require(counts == wanted, f"status says {counts}, not {wanted}")
    yield at_most(f"status of {number} runs", 2, found)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


def measure(seconds: float = 60.0, runs: int = 256, repeats: int = 5) -> Iterator[Result]:
    """All of them."""
    yield from measure_record(seconds)
    yield from measure_checkpoints(repeats)
    yield from measure_start()
    yield from measure_launcher(runs, repeats)


def main(seconds: float = 60.0, runs: int = 256, repeats: int = 5) -> None:
    """Print the table.

    Args:
        seconds: of training, whose record is measured.
        runs: that are submitted, and shown.
        repeats: of everything else but the start of a job; medians are shown.
    """
    print(machine(), end="\n\n")
    table(measure(seconds, runs, repeats))


if __name__ == "__main__":
    tyro.cli(main)
