"""Where a study stands: its trials by state, who works on which, and what is best so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colddiff.run_folder import RunFolder
from jobs.ledger import Ledger
from jobs.planning import aligned
from jobs.states import Job
from jobs.survey import Survey, survey
from sweeps.desk import Counts
from sweeps.lease import Lease, Leases
from sweeps.objective import directions, value_names
from sweeps.study import StudyConfig, read_study
from sweeps.workers import is_at_work, is_worker, number_of, storage_errors

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

COLUMNS = ("trial", "run", "step", "turn", "worker", "job", "renewed")


@dataclass(frozen=True)
class Work:
    """A trial that is neither finished nor failed."""

    trial: int
    run: str
    step: int
    steps: int
    turn: int
    """How many workers have held it so far."""
    worker: str
    job: str
    renewed_s: float | None
    """Seconds since its holder was last heard of."""
    released: str
    """Why its holder gave it back; it waits for the next."""

    def cells(self) -> tuple[str, ...]:
        """Texts for the table."""
        renewed = "" if self.renewed_s is None else f"{self.renewed_s:.0f} s ago"
        return (
            str(self.trial),
            self.run,
            f"{self.step}/{self.steps}" if self.steps else "",
            str(self.turn),
            self.worker,
            self.job,
            f"free: {self.released}" if self.released else renewed,
        )


@dataclass(frozen=True)
class Best:
    """A trial than which none is better in every value."""

    trial: int
    values: tuple[float, ...]
    params: dict[str, Any]
    run: str


@dataclass(frozen=True)
class Standing:
    """Where a study stands."""

    config: StudyConfig
    counts: Counts
    complete: int
    pruned: int
    work: tuple[Work, ...]
    best: tuple[Best, ...]
    """One; with several objectives the Pareto front."""
    errors: dict[int, str]
    """What the failed trials failed of."""
    workers: tuple[Job, ...]
    """Living ones."""
    trouble: str = ""
    """Why Slurm cannot be asked."""

    @property
    def is_complete(self) -> bool:
        """Whether as many trials are finished as are wanted."""
        return self.counts.finished >= self.config.trials

    def summary(self) -> str:
        """All of it in one line."""
        counts = self.counts
        states = {
            "complete": self.complete,
            "pruned": self.pruned,
            "running": counts.running,
            "enqueued": counts.waiting,
            "failed": counts.failed,
        }
        listed = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        phases = [job.phase if is_at_work(job) else "saving" for job in self.workers]
        alive = ", ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases))
        return (
            f"{self.config.name}: {counts.finished} of {self.config.trials} trials finished"
            f" ({listed or 'none begun'}); workers: {alive or 'none'}"
        )

    def text(self) -> str:
        """For people."""
        config = self.config
        names = value_names(config.objective, config.metric)
        ways = directions(config.objective, config.metric)
        goals = ", ".join(f"{way} {name}" for way, name in zip(ways, names, strict=True))
        kept = f" but {', '.join(config.keep)}" if config.keep else ""
        head = f"space {config.space}{kept}, {config.sampler}; {goals}"
        parts = ["\n".join([self.summary(), head])]
        if self.trouble:
            parts[0] += f"\nwarning: Slurm cannot be asked: {self.trouble}"
        if self.work:
            parts.append(aligned([COLUMNS, *(each.cells() for each in self.work)]))
        if self.best:
            rows = [("best", *names, "run", "parameters")]
            for each in self.best:
                params = " ".join(f"{key}={_short(value)}" for key, value in each.params.items())
                values = (f"{value:.4g}" for value in each.values)
                rows.append((f"trial {each.trial}", *values, each.run, params))
            parts.append(aligned(rows))
        if self.errors:
            parts.append("\n".join(f"trial {n} failed: {e}" for n, e in self.errors.items()))
        if not (self.is_complete or self.workers or self.trouble):
            parts.append(f"go on: python sweeps/launch.py resume --study {config.name}")
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "study": self.config.name,
            "trials": self.config.trials,
            "is_complete": self.is_complete,
            "counts": dataclasses.asdict(self.counts)
            | {"complete": self.complete, "pruned": self.pruned},
            "work": [dataclasses.asdict(each) for each in self.work],
            "best": [dataclasses.asdict(each) for each in self.best],
            "errors": self.errors,
            "workers": [
                {"worker": job.entry.run, "job": job.entry.job_id, "phase": job.phase}
                for job in self.workers
            ],
            "trouble": self.trouble,
        }


def studies(runs: Path, name: str = "") -> list[StudyConfig]:
    """The named study, or all; raises ``ValueError`` where there is none of that name."""
    if name:
        return [read_study(runs, name)]
    return [
        read_study(runs, path.parent.name) for path in sorted(runs.glob("studies/*/study.json"))
    ]


def stored(config: StudyConfig) -> Study:
    """The study to look at; raises ``ValueError`` where it is gone from its storage."""
    import optuna

    from sweeps.study import open_study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with storage_errors():
        return open_study(config, 0)


def standing(runs: Path, config: StudyConfig, study: Study) -> Standing:
    """Where a study stands now."""
    with storage_errors():
        trials = study.get_trials(deepcopy=False)
    names = [trial.state.name for trial in trials]
    now = survey_workers(runs, config.name)
    return Standing(
        config=config,
        counts=Counts.of(trials),
        complete=names.count("COMPLETE"),
        pruned=names.count("PRUNED"),
        work=tuple(_work(config, trials)),
        best=tuple(_best(study)) if "COMPLETE" in names else (),
        errors={
            trial.number: str(trial.user_attrs.get("error", "of an unknown cause"))
            for trial in trials
            if trial.state.name == "FAIL"
        },
        workers=tuple(sorted(living(now), key=lambda job: number_of(job.entry))),
        trouble=now.trouble,
    )


def survey_workers(runs: Path, study: str) -> Survey:
    """The last job of each worker of a study."""
    entries = Ledger(runs).latest().values()
    return survey(runs, {entry.run for entry in entries if is_worker(entry, study)}, nudge=True)


def living(now: Survey) -> list[Job]:
    """Those that are queued or run."""
    return [job for job in now.jobs if job.is_living]


def _work(config: StudyConfig, trials: Sequence[FrozenTrial]) -> list[Work]:
    running = {trial.number: trial for trial in trials if trial.state.name == "RUNNING"}
    leases = Leases(config.folder / "leases")
    held = leases.current(running)
    ages_s = leases.ages_s(held.values())
    return [
        _one(config, trial, held.get(number), ages_s.get(number))
        for number, trial in running.items()
    ]


def _one(config: StudyConfig, trial: FrozenTrial, lease: Lease | None, age_s: float | None) -> Work:
    run = str(trial.user_attrs.get("run", ""))
    status = RunFolder(Path(config.runs) / run).status() if run else None
    return Work(
        trial=trial.number,
        run=run,
        step=status.step if status else 0,
        steps=status.steps if status else 0,
        turn=lease.turn if lease else 0,
        worker=lease.holder.worker if lease else "",
        job=lease.holder.where if lease else "",
        renewed_s=age_s,
        released=lease.released if lease else "",
    )


def _best(study: Study) -> list[Best]:
    return [
        Best(
            trial.number,
            tuple(trial.values),
            dict(trial.params),
            str(trial.user_attrs.get("run", "")),
        )
        for trial in study.best_trials
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
