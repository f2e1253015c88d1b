"""What a run's state is: the word of its folder merged with that of its jobs' schedulers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from colddiff.run_folder import RunFolder, Status
from jobs.diagnosis import Diagnosis, diagnose, diagnose_folder
from jobs.job_logs import has_begun
from jobs.states import Job
from jobs.survey import Survey, is_done, last_process
from jobs.tasks import is_claimed

NO_JOBS = Survey(())


@dataclass(frozen=True)
class Standing:
    """Where a run stands."""

    state: str
    """new, queued, requeued, running, evaluating, generating, trained, evaluated, interrupted,
    failed, cancelled."""
    detail: str = ""
    """More about it, such as why a job is pending."""
    diagnosis: Diagnosis | None = None


def settle(folder: RunFolder, survey: Survey = NO_JOBS) -> None:
    """Record that a run whose process is gone was interrupted."""
    status, job = folder.status(), survey.main_job(folder)
    if status is None or status.state != "running" or (job and job.is_living):
        return
    if not is_at_work(folder, status, job, survey):
        folder.write_status("interrupted", status.step, status.steps, "its process is gone")


def is_at_work(folder: RunFolder, status: Status | None, job: Job | None, survey: Survey) -> bool:
    """Whether a process works on the run. Of its job, Slurm knows that; a file lock may not."""
    if job is None or job.entry.cluster == "local":
        return is_claimed(folder)
    if job.phase == "running":
        return True
    if survey.is_blind(job):
        return is_claimed(folder) or (status is not None and status.state == "running")
    # A dead node's lock may outlive it, but it may also be that of another process, here.
    return is_claimed(folder) and last_process(folder).get("job_id") != job.entry.job_id


def standing(folder: RunFolder, status: Status | None, job: Job | None, survey: Survey) -> Standing:
    """Where the run stands, by its main job."""
    if job and job.is_living:
        state, detail = _living(job, status, survey)
        return Standing(state, detail, diagnose(job, folder))
    if is_at_work(folder, status, job, survey):
        unsure = "as its folder says" if job and survey.is_blind(job) else ""
        return Standing(_working(status, str(last_process(folder).get("kind", "train"))), unsure)
    match status.state if status else "new":
        case "running":
            own = "interrupted"
        case "finished":
            own = "evaluated" if folder.evaluation.exists() else "trained"
        case word:
            own = word
    if job is None:
        return Standing(own, diagnosis=diagnose_folder(folder))
    if survey.is_blind(job) or is_done(folder, job):
        return Standing(own)
    return _ended(own, job, folder)


def standing_of_report(job: Job, survey: Survey) -> Standing:
    """Where a job stands that belongs to no single run."""
    nowhere = RunFolder(Path(job.entry.run))
    if job.is_living:
        state, detail = _living(job, None, survey)
        return Standing(state, detail, diagnose(job, nowhere))
    if survey.is_blind(job):
        return Standing("unknown")
    return Standing("finished") if is_done(nowhere, job) else _ended("new", job, nowhere)


def _living(job: Job, status: Status | None, survey: Survey) -> tuple[str, str]:
    if job.entry.event == "cancelled":
        return "cancelled", "saving" if job.phase == "running" else ""
    if job.phase == "running":
        return _working(status, job.entry.kind), ""
    details = ["started now" if job.entry.job_id in survey.started else ""]
    if job.slurm and not details[0]:
        start = _clock(job.slurm.start)
        details = [job.slurm.reason, f"starts {start}" if start else ""]
    return "requeued" if has_begun(job.entry) else "queued", ", ".join(filter(None, details))


def _working(status: Status | None, kind: str) -> str:
    if kind in ("generate", "report"):
        return "generating" if kind == "generate" else "running"
    return "evaluating" if status and status.state == "finished" else "running"


def _ended(own: str, job: Job, folder: RunFolder) -> Standing:
    """Of a job that is gone and whose work is not done; ``own`` is what the run folder says."""
    found, kind = diagnose(job, folder), job.entry.kind
    if found is None:
        return Standing(own)
    if own == "evaluated" or (kind == "generate" and own == "trained"):
        return Standing(own, f"{kind}: {found.cause}", found)  # the run itself is well
    if found.cause == "cancelled":
        on_request = job.entry.event == "cancelled"  # which needs no explanation
        return Standing("cancelled", diagnosis=None if on_request else found)
    if found.cause == "unknown" and not (job.slurm and job.slurm.state == "FAILED"):
        return Standing(own, diagnosis=found)
    return Standing("failed", found.cause, found)


def _clock(text: str) -> str:
    """A time of Slurm, ``2026-11-23T18:42:18``: without the date if it is today's."""
    date, _, clock = text.partition("T")
    if not clock:
        return ""  # N/A
    return clock[:5] if date == time.strftime("%Y-%m-%d") else f"{date} {clock[:5]}"
