"""Wait for the workers of a study, or end them."""

from __future__ import annotations

import time
from pathlib import Path

from jobs.cancelling import cancel_jobs
from jobs.ledger import Ledger
from jobs.options import say
from jobs.slurm import SlurmError
from jobs.states import Job
from sweeps.standing import living, standing, stored, survey_workers
from sweeps.study import StudyConfig

POLL_S = 2.0
PROGRESS_S = 60.0


def follow(runs: Path, config: StudyConfig, *, cancel: bool) -> int:
    """Wait until no worker lives; 0 if the study is complete then, else 1.

    Ctrl-C gives 130; where ``cancel`` is set, the workers save and end first.
    """
    study, said, when = stored(config), "", 0.0
    try:
        while True:
            now = standing(runs, config, study)
            text, over = now.summary(), not (now.workers or now.trouble)
            if over or (text != said and time.monotonic() - when > PROGRESS_S) or not said:
                say(f"{time.strftime('%H:%M:%S')} {text}")
                said, when = text, time.monotonic()
            if over:
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        _interrupted(runs, config, cancel=cancel)
        return 130
    if not now.is_complete:
        say(now.text())
    return 0 if now.is_complete else 1


def cancel_workers(runs: Path, study: str) -> list[Job]:
    """Cancel the living workers of a study; the jobs.

    Raises:
        slurm.SlurmError: where Slurm cannot be asked; local workers are cancelled then.
    """
    with Ledger(runs).launching():  # a launcher that is submitting would go on
        now = survey_workers(runs, study)
        jobs = living(now)
        cancel_jobs(runs, jobs)
    if now.trouble:
        raise SlurmError(now.trouble)
    return jobs


def _interrupted(runs: Path, config: StudyConfig, *, cancel: bool) -> None:
    if not cancel:
        say("the workers go on; python sweeps/launch.py status shows them, cancel stops them")
        return
    say("cancelling: the workers save first")
    cancel_workers(runs, config.name)
    while living(survey_workers(runs, config.name)):
        time.sleep(POLL_S)
    say("saved; the same command takes it up again")
