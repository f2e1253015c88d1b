"""Wait until the jobs of runs have ended, and say what happens meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from colddiff.run_folder import RunFolder
from jobs.cancelling import cancel_jobs
from jobs.cluster import Cluster
from jobs.options import say
from jobs.states import Job
from jobs.status import Row, report_row, row
from jobs.survey import Survey, is_done, survey

POLL_S = {"slurm": 5.0, "local": 1.0, "debug": 1.0}
PROGRESS_S = 60.0
LAG_S = 30.0
"""How long a folder on a network disk may hide what a job of another node wrote at its end."""


def follow(runs: Path, names: Sequence[str], cluster: Cluster) -> int:
    """Wait for the jobs of the named runs to end; 0 if their work is complete, else 1.

    Ctrl-C cancels local jobs, which save, and leaves those on Slurm alone; the exit code is 130.
    """
    following = _Following(runs, list(dict.fromkeys(names)), POLL_S[cluster])
    try:
        following.wait()
    except KeyboardInterrupt:
        if cluster == "slurm":
            say("the jobs go on; python jobs/launch.py status shows them, cancel stops them")
        else:
            following.cancel()
        return 130
    return following.verdict()


class _Following:
    """The runs that are followed, and what was said of them."""

    def __init__(self, runs: Path, names: Sequence[str], poll_s: float) -> None:
        self.runs, self.names, self.poll_s = runs, names, poll_s
        self.states: dict[str, str] = {}
        self.said = 0.0
        self.trouble = ""

    def wait(self) -> None:
        """Until no job is queued or running."""
        lag_ends = None
        while True:
            now = self.look()
            if not now.trouble and not any(job.is_living for job in now.jobs):
                lag_ends = lag_ends or time.monotonic() + LAG_S
                if not self.is_lagging(now) or time.monotonic() > lag_ends:
                    return
            else:
                lag_ends = None
            time.sleep(self.poll_s)

    def look(self) -> Survey:
        """Ask, and say what is new."""
        now = survey(self.runs, self.names, nudge=True)
        if now.trouble != self.trouble:
            say(f"{_clock()} {now.trouble or 'Slurm answers again'}")
            self.trouble = now.trouble
        if now.trouble:
            return now
        rows = self.rows(now)
        for each in rows:
            if self.states.get(each.run, each.state) != each.state:
                say(f"{_clock()} {each.run}: {' '.join(filter(None, each.cells()[2:4]))}")
            self.states[each.run] = each.state
        if time.monotonic() - self.said > PROGRESS_S or not self.said:
            self.said = time.monotonic()
            say(f"{_clock()} {progress(rows)}")
        return now

    def rows(self, now: Survey) -> list[Row]:
        """Where they stand."""
        reports = [job for job in now.jobs if job.entry.kind == "report"]
        folders = [RunFolder(self.runs / name) for name in self.names]
        found = [row(folder, now) for folder in folders if folder.config_file.exists()]
        return found + [report_row(job, now) for job in reports]

    def is_lagging(self, now: Survey) -> bool:
        """Whether Slurm has seen the success of a job whose work is not to be seen yet."""
        return any(
            job.slurm is not None and job.slurm.state == "COMPLETED" and not self.is_complete(job)
            for job in self.last_jobs(now)
        )

    def last_jobs(self, now: Survey) -> list[Job]:
        """The last one of each run: what came before it is of no interest now."""
        return list({job.entry.run: job for job in now.jobs}.values())

    def is_complete(self, job: Job) -> bool:
        """Whether its work is done."""
        return is_done(RunFolder(self.runs / job.entry.run), job)

    def verdict(self) -> int:
        """Say how it ended; the exit code."""
        now = survey(self.runs, self.names)
        rows = {each.run: each for each in self.rows(now)}
        jobs = {job.entry.run: job for job in self.last_jobs(now)}
        failed = []
        for name, each in rows.items():
            job = jobs.get(name)
            done = self.is_complete(job) if job else each.state in ("trained", "evaluated")
            if not done:
                failed.append(each)
        say(f"{_clock()} {progress(list(rows.values()))}")
        for each in failed:
            say(f"\n{each.paragraph() or f'{each.run}: not complete, {each.state}'}")
        return 1 if failed else 0

    def cancel(self) -> None:
        """Cancel what is left, and wait until it has saved."""
        say("cancelling: running jobs save first")
        cancel_jobs(self.runs, self.living_here())
        while self.living_here():
            time.sleep(self.poll_s)
        say("saved; the same command takes it up again")

    def living_here(self) -> list[Job]:
        """The living jobs of this machine: a followed run may have one on Slurm."""
        jobs = survey(self.runs, self.names).jobs
        return [job for job in jobs if job.is_living and job.entry.cluster == "local"]


def progress(rows: Sequence[Row]) -> str:
    """All of them in one line: how many are in which state, how far, how long."""
    counts = Counter(each.state for each in rows)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    steps, all_steps = sum(each.step for each in rows), sum(each.steps for each in rows)
    longest = max((each for each in rows if each.seconds_left), key=_left, default=None)
    eta = f", {longest.eta} left for the slowest that runs" if longest else ""
    return f"{states}; step {steps}/{all_steps}{eta}" if all_steps else states


def _left(row: Row) -> float:
    return row.seconds_left or 0.0


def _clock() -> str:
    return time.strftime("%H:%M:%S")
