"""The commands that look after runs: status, logs, cancel, retry, sync."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from colddiff.run_folder import RunFolder
from jobs.cancelling import cancel_jobs
from jobs.diagnosis import diagnose
from jobs.job_logs import Growth, end_of, log_files
from jobs.ledger import Ledger
from jobs.options import Place, say
from jobs.retrying import Retrial
from jobs.slurm import SlurmError
from jobs.standing import settle
from jobs.states import Job
from jobs.status import find_names, find_runs, rows, table
from jobs.survey import is_done, last_process, survey
from jobs.tasks import is_claimed

CLEAR = "\033[2J\033[H"
ASK_S = 5.0
"""How often a scheduler is asked about a job whose log is followed."""
LOOK_S = 0.5


@dataclass(frozen=True)
class Status(Place):
    """Show where runs stand, and what went wrong with those that failed."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""
    watch: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Look again at this interval, until Ctrl-C."""
    json: bool = False
    """For programs: a list with one object a run."""

    def __call__(self) -> int:
        """Print the table, once or again and again."""
        if self.watch is not None and self.watch <= 0:
            raise ValueError(f"--watch {self.watch:g} is not allowed: it must be above 0 seconds")
        if self.watch is None:
            say(self.text())
            return 0
        clear = CLEAR if sys.stdout.isatty() and not self.json else ""
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                say(clear + self.text())
                time.sleep(self.watch)
        return 0

    def text(self) -> str:
        """What is to be printed."""
        folders = find_runs(self.runs, self.names)
        names = {folder.path.name for folder in folders} if self.names else None
        now = survey(self.runs, names, nudge=True)
        found = rows(folders, now, reports=not self.names)
        warning = f"warning: Slurm cannot be asked: {now.trouble}" if now.trouble else ""
        if self.json:
            if warning:
                print(warning, file=sys.stderr)
            return json.dumps([row.to_dict() for row in found], indent=None if self.watch else 2)
        shown = table(found) if found else f"no runs below {self.runs}"
        return f"{warning}; this is what the run folders say\n{shown}" if warning else shown


@dataclass(frozen=True, kw_only=True)
class Logs(Place):
    """Show the log of a run's latest job: its standard error, where the suite writes."""

    name: Positional[str]
    """Run folder, or (beginning of) a run name."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on as the log grows, until the job has ended or Ctrl-C."""
    out: bool = False
    """Standard output instead."""
    lines: Annotated[int, arg(aliases=["-n"])] = 50
    """How many of the last lines, at least 0."""

    def __call__(self) -> int:
        """Print the ends of the logs of all ranks, and what comes with --follow."""
        if self.lines < 0:
            raise ValueError(f"--lines {self.lines} is not allowed: it must be at least 0")
        (name,) = find_names(self.runs, [self.name])
        job = self._job(name)
        if job is None:
            raise ValueError(
                f"{name} has no job, so no log: --cluster debug writes to its terminal"
            )
        growth = Growth()
        files = log_files(job.entry, stdout=self.out)
        for file in files:
            growth.skip(file)
            say("\n".join([f"==> {file} <==", *end_of(file, self.lines)]))
        if not files:
            say(f"{name}: {_no_log(job)}")
        if self.follow:
            with contextlib.suppress(KeyboardInterrupt):
                self._follow(job, growth, files[-1] if files else None)
        return 0

    def _job(self, name: str) -> Job | None:
        return survey(self.runs, {name}, nudge=self.follow).main_job(RunFolder(self.runs / name))

    def _follow(self, job: Job, growth: Growth, shown: Path | None) -> None:
        """Print what is new until the job has ended, also when Slurm starts it again."""
        asked = time.monotonic()
        while True:
            # First the question, then the log: what a job wrote at its end is not lost.
            if job.is_living and time.monotonic() - asked > ASK_S:
                job, asked = self._again(job), time.monotonic()
            for file in log_files(job.entry, stdout=self.out):
                text = growth.new(file)
                if text and file != shown:
                    say(f"==> {file} <==")
                    shown = file
                print(text, end="", flush=True)
            if not job.is_living:
                break
            time.sleep(LOOK_S)
        say(_how_it_ended(job, RunFolder(self.runs / job.entry.run)))

    def _again(self, job: Job) -> Job:
        """The same job as it is now."""
        now = survey(self.runs, {job.entry.run}, nudge=True)
        same = [each for each in now.jobs if each.entry.job_id == job.entry.job_id]
        return job if now.trouble or not same else same[0]


@dataclass(frozen=True)
class Cancel(Place):
    """Take jobs off the queue; those that run save first. ``train`` takes them up again."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names."""
    all: bool = False
    """Every job of these runs' folder."""

    def __call__(self) -> int:
        """Cancel what is queued or runs, and say so."""
        if bool(self.names) == self.all:
            raise ValueError("name the runs whose jobs to cancel, or give --all: one of the two")
        names = set(find_names(self.runs, self.names)) if self.names else None
        if not Ledger(self.runs).path.exists():
            say("nothing to cancel: no job was submitted")
            return 0
        with Ledger(self.runs).launching():  # a launcher that is submitting would go on
            now = survey(self.runs, names, ended=False)
            jobs = [job for job in now.jobs if job.is_living]
            cancel_jobs(self.runs, jobs)
        for job in jobs:
            then = ": it saves and ends" if job.phase == "running" else ""
            say(f"{job.entry.run}: {job.entry.kind} {job}, cancelled{then}")
        for name in sorted(names or ()):
            if name not in {job.entry.run for job in jobs}:
                say(f"{name}: nothing to cancel{self._elsewhere(name)}")
        if now.trouble:
            raise SlurmError(now.trouble)
        if not jobs and not names:
            say("nothing to cancel: no job is queued or runs")
        return 0

    def _elsewhere(self, name: str) -> str:
        folder = RunFolder(self.runs / name)
        if not is_claimed(folder):
            return ""
        process = last_process(folder)
        return f"; process {process.get('pid')} on {process.get('host')} works on it: end it there"


@dataclass(frozen=True)
class Retry(Place):
    """Submit again what failed, timed out or was lost; it goes on from its last checkpoint."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names, also cancelled ones; all that failed by
    default."""
    mem: str | None = None
    """Memory of each node, such as 64G; as before by default."""
    time: str | None = None
    """Time limit, such as 8:00:00; as before by default."""
    sbatch: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Other changes of the resources, as for train; may be repeated."""
    dry_run: bool = False
    """Only say what would be submitted."""
    wait: bool = False
    """Follow the jobs to their end; exit code 1 if one fails."""

    def __call__(self) -> int:
        """Submit and say what was done."""
        named = set(find_names(self.runs, self.names)) if self.names else None
        retrial = Retrial(self, named, self.overrides)
        if self.dry_run or not Ledger(self.runs).path.exists():
            found = retrial.candidates()
            retrial.check(found)
            say(retrial.table(found, dry_run=True) if found else "nothing to retry")
            return 0
        with Ledger(self.runs).launching():
            found = retrial.candidates()
            retrial.check(found)
            try:
                retrial.submit(found)
            finally:  # where Slurm refuses a part, the rest is submitted
                say(retrial.table(found, dry_run=False) if found else "nothing to retry")
        if not (self.wait and retrial.submitted):
            return 0
        from jobs.follow import follow

        clusters = {each.job.entry.cluster for each in found if each.key in retrial.submitted}
        names = [run for run, _ in retrial.submitted]
        return follow(self.runs, names, "slurm" if "slurm" in clusters else "local")

    @property
    def overrides(self) -> list[str]:
        """All changes of the resources, as for --sbatch."""
        changes = []
        if self.mem is not None:
            changes += [f"mem={self.mem}", "mem-per-cpu=", "mem-per-gpu="]
        if self.time is not None:
            changes.append(f"time={self.time}")
        return [*changes, *self.sbatch]


@dataclass(frozen=True)
class Sync(Place):
    """Send to MLflow whatever of the runs is not there yet."""

    names: Positional[tuple[str, ...]] = ()
    """Run folders, or (beginnings of) run names; all runs by default."""

    def __call__(self) -> int:
        """Push every named run; idempotent."""
        from colddiff.tracking import push

        folders = find_runs(self.runs, self.names)
        if not folders:
            say(f"no runs below {self.runs}")
            return 0
        self.initialise()
        now = survey(self.runs, {folder.path.name for folder in folders})
        for folder in folders:
            if not folder.environment.exists():
                say(f"{folder.path.name}: not started yet")
                continue
            settle(folder, now)
            report = push(folder.path, self.uri, self.experiment)
            sent = f"{report.metrics} metric values and {len(report.artifacts)} artifacts sent"
            say(f"{folder.path.name}: {sent}; {report.link}")
        return 0


def _no_log(job: Job) -> str:
    if job.is_living:
        return f"{job}; it has not started, so it has no log yet"
    return f"no log; its job {job.entry.job_id} did not start"


def _how_it_ended(job: Job, folder: RunFolder) -> str:
    found = None if is_done(folder, job) else diagnose(job, folder)
    how = f"{found.cause}: {found.text}" if found else "done"
    return f"{job.entry.run}: job {job.entry.job_id} has ended; {how}"
