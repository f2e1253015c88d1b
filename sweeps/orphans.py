"""Which held trials are free to take: those whose holder is known to be gone.

A live trial is never declared dead because it is slow or its node is busy: the scheduler is asked
about its job, and on this machine the process itself. Only where neither can be asked does silence
count, after a long time.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Mapping
from typing import Literal

from jobs import slurm
from sweeps.lease import RENEW_S, Holder, Lease

log = logging.getLogger("colddiff.sweeps")
SILENT_S = 15 * 60.0
"""Without renewal for so long, a holder counts as gone where nobody can be asked."""
QUIET_S = 3 * 60.0
"""And for so long, where Slurm answers but knows no such job: another cluster might run it. Several
renewals, and the minute for which a network disk may show an old time."""
ORPHAN_AFTER_S = 30 * 60.0
"""How long a trial waits for its requeued job to start again."""

QUEUED = frozenset("PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD".split())
"""Slurm's words for a job that waits; what is left of the living ones runs, or ends just now."""

JobPhase = Literal["running", "queued", "ended", "unknown", "blind"]
"""``unknown``: Slurm answers but does not know it; ``blind``: Slurm does not answer."""


def free_to_take(
    leases: Collection[Lease],
    ages_s: Mapping[int, float],
    me: Holder,
    orphan_after_s: float = ORPHAN_AFTER_S,
) -> list[Lease]:
    """Those of the leases whose trials may be taken over, this job's own trials first.

    Args:
        leases: the last one of each trial that is not finished.
        ages_s: since their renewal, by trial.
        me: who asks.
        orphan_after_s: how long a trial waits for a job that Slurm has requeued.
    """
    own = [lease for lease in leases if is_own(lease, me)]
    others = [lease for lease in leases if lease not in own]
    # Slurm is not asked about those that were just renewed: a hundred workers would do so at once.
    doubtful = [
        lease
        for lease in others
        if _on_slurm(lease.holder) and (lease.released or ages_s[lease.trial] > 2 * RENEW_S)
    ]
    phases = _phases({lease.holder.job_id for lease in doubtful})
    return own + [
        lease
        for lease in others
        if (
            lease in doubtful
            and _is_free_on_slurm(
                lease, phases[lease.holder.job_id], ages_s[lease.trial], orphan_after_s
            )
            if _on_slurm(lease.holder)
            else _is_free_on_a_machine(lease, ages_s[lease.trial])
        )
    ]


def is_own(lease: Lease, me: Holder) -> bool:
    """Whether this process's own job held it before it was requeued."""
    there = lease.holder
    same_process = (there.host, there.pid, there.started) == (me.host, me.pid, me.started)
    return _on_slurm(there) and _on_slurm(me) and there.job_id == me.job_id and not same_process


def is_alive(holder: Holder) -> bool:
    """Whether the process lives, which must be one of this machine."""
    import psutil

    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.started) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _on_slurm(holder: Holder) -> bool:
    return holder.cluster == "slurm"


def _is_free_on_slurm(lease: Lease, phase: JobPhase, age_s: float, orphan_after_s: float) -> bool:
    match phase:
        case "running":
            return False
        case "ended":
            return True
        case "queued":  # it will go on with its trial
            return age_s > orphan_after_s
        case "unknown":
            return bool(lease.released) or age_s > QUIET_S
        case "blind":
            return age_s > SILENT_S


def _is_free_on_a_machine(lease: Lease, age_s: float) -> bool:
    if lease.released:
        return True
    if lease.holder.host == socket.gethostname():
        return not is_alive(lease.holder)
    return age_s > SILENT_S


def _phases(job_ids: Collection[str]) -> dict[str, JobPhase]:
    """Where Slurm jobs stand."""
    if not job_ids:
        return {}
    try:
        states = slurm.job_states(job_ids)
    except slurm.SlurmError as error:
        log.warning("Slurm cannot be asked who works on which trial: %s", error)
        return dict.fromkeys(job_ids, "blind")
    return {job_id: _phase(states.get(job_id)) for job_id in job_ids}


def _phase(state: slurm.JobState | None) -> JobPhase:
    if state is None:
        return "unknown"
    if not state.is_living:
        return "ended"
    return "queued" if state.state in QUEUED else "running"
