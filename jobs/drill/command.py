"""The drill: that interruptions lose nothing, proven here before a run depends on it.

Two jobs train one small configuration. One of them is hit twice, as by a time limit and as by a
preemption; it must end as the other one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import UseAppendAction, arg

from colddiff.config import (
    DataConfig,
    DegradationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrainingConfig,
)
from colddiff.files import read_json, write_json
from colddiff.run_folder import RunFolder
from jobs.drill.hosts import DrillError, Host, LocalHost, SlurmHost
from jobs.drill.runs import DrilledRun, Hit, TooQuickError
from jobs.options import say
from jobs.profiles import Profile, load_profile
from jobs.scratch import scratch_folder, shortened
from jobs.tasks import TrainTask

STEPS = (1_500, 6_000, 24_000, 96_000)
"""The first takes half a minute on two cores; the others are for machines that are too quick."""
MINUTES = 30
"""Time limit of the jobs, unless the profile has less."""
RECORDS = 50
"""Of the journal; the run's position is seen by them."""
HIT_AT = (0.2, 0.6)
"""Parts of the training after which the run is hit."""


@dataclass(frozen=True)
class DrillTask(TrainTask):
    """Training that also tells which GPU it is on."""

    kind: ClassVar[str] = "drill"

    evaluate: bool = False

    def introduce(self, folder: RunFolder) -> None:
        """Also add the GPU's name to ``gpus.json``, which has one for each attempt."""
        import torch

        super().introduce(folder)
        path = folder.path / "gpus.json"
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        write_json(path, [*(read_json(path) if path.exists() else []), name])


@dataclass(frozen=True)
class Drill:
    """Prove that a time limit and a preemption lose nothing here, with this profile.

    Takes some minutes, needs no MLflow, and leaves nothing behind but the copy of the code that the
    next launch takes. Exit code 0 if the interrupted run ends as the other one, bit for bit.
    """

    runs: Path = Path("runs")
    """Folder of the run folders; the drill works in a folder of its own in it."""
    cluster: Literal["local", "slurm"] = "local"
    """Where to try."""
    profile: str = ""
    """Slurm resources: name or path of a TOML file."""
    sbatch: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Overrides of the profile; may be repeated."""
    patience: float = 15.0
    """Minutes to wait where nothing moves, as in the queue."""
    keep: bool = False
    """Keep the two runs and the jobs' logs."""

    def __call__(self) -> int:
        """Carry it out, with more steps where it was over too soon; 0 where nothing was lost."""
        if self.patience <= 0:
            raise ValueError(f"--patience {self.patience} is not allowed: it must be positive")
        profile = load_profile(self.profile, self.sbatch)
        for steps in STEPS:
            try:
                return self.try_with(steps, shortened(profile, MINUTES))
            except TooQuickError:
                say(f"{steps} steps were over before they could be hit: again, with more")
            except DrillError as error:
                say(f"the drill failed, nothing is proven: {error}")
                return 1
        say("the drill failed, nothing is proven: this machine is too quick for it")
        return 1

    def try_with(self, steps: int, profile: Profile) -> int:
        """One drill; raises ``TooQuickError`` and ``DrillError``."""
        from jobs.snapshot import snapshot

        code = snapshot(self.runs).path
        with scratch_folder(self.runs, "drill", keep=self.keep) as place:
            on_slurm = self.cluster == "slurm"
            ranks = profile.nodes * profile.processes_per_node if on_slurm else 1
            host: Host = LocalHost(place, code)
            if on_slurm:
                host = SlurmHost(profile, place / "jobs", code)
            config = drill_config(steps, ranks)
            several = f", {ranks} processes each" if ranks > 1 else ""
            say(f"drill in {place}: two runs of {steps} steps{several}")
            try:
                return self.carry_out(host, place, config)
            finally:
                say("cleaning up" if not self.keep else f"ending the jobs; {place} is kept")
                host.end()

    def carry_out(self, host: Host, place: Path, config: RunConfig) -> int:
        """Run, hit, wait, compare; the exit code."""
        names = ("drilled", "reference")  # which has to wait where one runs at a time
        tasks = [DrillTask(str(RunFolder.create(place / name, config).path)) for name in names]
        drilled, reference = (
            DrilledRun(name, task, job, host, self.patience * 60)
            for name, task, job in zip(names, tasks, host.submit(tasks), strict=True)
        )
        hits = []
        orders: tuple[Callable[..., None], ...] = (host.warn, host.preempt)
        for part, name, order in zip(HIT_AT, host.orders, orders, strict=True):
            drilled.reach(round(part * config.training.steps))
            hits.append(drilled.strike(name, order))
        for run in (drilled, reference):
            run.finish()
        return verdict(reference.folder, drilled.folder, hits)


def drill_config(steps: int, ranks: int) -> RunConfig:
    """Digits at 16 pixels and a network of the smallest; only interruptions save before the end."""
    every = max(1, steps // RECORDS)
    return RunConfig(
        preset="drill",
        data=DataConfig(image_size=16, validation=16, flip=True, preparation="crop"),
        degradation=DegradationConfig(T=4, kernel_size=5, sigma=2.0),
        model=ModelConfig(dim=4, mults=(1,), patch=2),
        optimiser=OptimiserConfig(lr=1e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0),
        training=TrainingConfig(
            steps=steps,
            batch_size=ranks * max(1, 8 // ranks),
            accumulation=1,
            ema_start=steps // 10,
            ema_every=2,
            ema_decay=0.99,
            log_every=every,
            validate_every=0,
            checkpoint_every=steps,
        ),
    )


def verdict(reference: RunFolder, drilled: RunFolder, hits: list[Hit]) -> int:
    """Compare the runs, say what was found; the exit code."""
    from jobs.drill.comparison import differences

    found = differences(reference, drilled)
    machines = [each for folder in (reference, drilled) for each in attempts(folder)]
    lost = sum(hit.lost for hit in hits)
    if found:
        say(f"DIFFERENT: {len(hits)} interruptions changed the result: {'; '.join(found)}")
    else:
        more = f", {lost} steps were computed again" if lost else " and cost no step"
        say(f"IDENTICAL: {len(hits)} interruptions changed nothing, bit for bit{more}")
    for hit in hits:
        say(f"  {hit}")
    for folder, name in ((reference, "reference"), (drilled, "drilled")):
        say(f"  {name} ran on {', then '.join(attempts(folder))}")
    if found and len({each.partition(": ")[2] for each in machines}) > 1:
        say(
            "  The attempts ran on different kinds of machines, whose last bits differ: that alone "
            "can explain it. Repeat it on equal ones, e.g. with --sbatch constraint=…"
        )
    if any(hit.saved_s is None for hit in hits):
        say(
            "  Not every interruption left time to save, so the run went on from an older "
            "checkpoint: see KillWait and signal_delay_s in python jobs/launch.py doctor"
        )
    return 1 if found else 0


def attempts(folder: RunFolder) -> list[str]:
    """The machine of each attempt: node, then the kind of its device."""
    record: list[dict[str, Any]] = read_json(folder.environment)["attempts"]
    gpus: list[str] = read_json(folder.path / "gpus.json")
    named = zip(record, gpus[-len(record) :], strict=False)
    return [
        f"{each['host']}: {gpu if each['device'].startswith('cuda') else each['processor']}"
        for each, gpu in named
    ]
