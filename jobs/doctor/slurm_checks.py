"""Preflight checks of a Slurm cluster: what it does with jobs of a profile, asked of Slurm."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import slurm
from jobs.cluster import SlurmJobs
from jobs.doctor.checks import Check
from jobs.doctor.probe import ProbeTask
from jobs.profiles import Profile

EARLY_S = 60
"""Slurm may warn this much ahead of the asked time."""
STEP_S = 30
"""Room for the step, or the validation, that runs when the warning comes."""
RETRY = "python jobs/launch.py retry"


@dataclass(frozen=True)
class Cluster:
    """Slurm's configuration, and those of its partitions that the profile may use."""

    settings: dict[str, str]
    partitions: list[dict[str, str]]

    @property
    def grace_s(self) -> tuple[int, int]:
        """Seconds from TERM to KILL for what is preempted: the shortest GraceTime, and KillWait."""
        graces = [seconds(each.get("GraceTime", "0")) for each in self.partitions]
        return min(graces, default=0), seconds(self.settings.get("KillWait", "30 sec"))


def ask(profile: Profile) -> Cluster:
    """Ask scontrol; raises ``SlurmError``."""
    lines = slurm.run("scontrol", "--oneliner", "show", "partition").splitlines()
    known = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    names = profile.partition.split(",") if profile.partition else []
    used = [
        each
        for each in known
        if each.get("PartitionName") in names or (not names and each.get("Default") == "YES")
    ]
    return Cluster(slurm.settings(), used)


def check_slurm(profile: Profile) -> tuple[Check, Cluster | None]:
    """Whether Slurm's commands are there and answer."""
    try:
        cluster = ask(profile)
    except slurm.SlurmError as error:
        mend = "run this on a login node of the cluster, or with --cluster local"
        return Check("Slurm", "FAIL", str(error), mend), None
    version = cluster.settings.get("SLURM_VERSION", "of unknown version")
    name = cluster.settings.get("ClusterName", "")
    return Check("Slurm", "ok", f"{version} answers, cluster {name}".rstrip()), cluster


def check_cluster(cluster: Cluster, profile: Profile, save_s: float | None) -> Iterator[Check]:
    """What follows from the configuration, and from the time that a checkpoint takes."""
    yield check_profile(profile)
    yield check_requeue(cluster)
    if cluster.partitions:
        yield check_preemption(cluster)
    if save_s is not None:
        yield check_kill_wait(cluster, save_s)
        yield check_warning(profile, save_s)
    yield check_time(profile)
    yield check_accounting()


def check_profile(profile: Profile) -> Check:
    """Whether Slurm takes jobs of this profile, and when one would start."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            (said,) = SlurmJobs([ProbeTask(folder)], profile, Path(folder)).verdicts()
        except slurm.SlurmError as error:
            mend = "change the profile, or --sbatch KEY=VALUE; sinfo shows partitions and limits"
            return Check("profile", "FAIL", str(error), mend)
    return Check("profile", "ok", said)


def check_requeue(cluster: Cluster) -> Check:
    """Whether jobs are requeued where they do not ask for it; ours ask."""
    if cluster.settings.get("JobRequeue") != "0":
        return Check("requeue", "ok", "JobRequeue = 1")
    mend = "our jobs ask for it with --requeue, which a site can still refuse: see with drill"
    return Check("requeue", "warning", "JobRequeue = 0, jobs are not requeued unasked", mend)


def check_preemption(cluster: Cluster) -> Check:
    """What becomes of a job that another one pushes aside."""
    name = "preemption"
    if cluster.settings.get("PreemptType", "preempt/none") in ("preempt/none", "(null)"):
        return Check(name, "ok", "none on this cluster")
    modes = {
        mode: each.get("PartitionName", "")
        for each in cluster.partitions
        for mode in each.get("PreemptMode", "OFF").split(",")
    }
    text = ", ".join(f"{mode} in partition {partition}" for mode, partition in modes.items())
    if cluster.settings["PreemptType"] == "preempt/qos":
        text += "; a job's QOS may say otherwise: sacctmgr show qos format=name,preemptmode"
    if "CANCEL" in modes:
        mend = f"preempted jobs save, but Slurm does not requeue them: {RETRY} does"
        return Check(name, "warning", text, mend)
    return Check(name, "ok", text)


def check_kill_wait(cluster: Cluster, save_s: float) -> Check:
    """Whether a preempted job can save before it is killed."""
    grace, wait = cluster.grace_s
    found = f"{wait} s" + (f" after GraceTime {grace} s" if grace else "")
    found += f", a checkpoint takes {save_s:.1f} s"
    if 2 * save_s < grace + wait:
        return Check("KillWait", "ok", found)
    mend = "preempted jobs may go on from an older checkpoint: lower --training.checkpoint-every"
    return Check("KillWait", "warning", found, mend)


def check_warning(profile: Profile, save_s: float) -> Check:
    """Whether the warning ahead of the time limit leaves time for a step and a checkpoint."""
    delay = profile.signal_delay_s
    found = (
        f"{delay} s ahead of the time limit, {delay - save_s:.0f} s more than a checkpoint takes"
    )
    wanted = round(2 * save_s + STEP_S)
    if delay <= save_s:
        found = f"{delay} s ahead of the time limit, but a checkpoint takes {save_s:.0f} s"
        return Check("signal_delay_s", "FAIL", found, f"--sbatch signal-delay-s={wanted}")
    if delay < wanted:
        mend = f"--sbatch signal-delay-s={wanted}, it must hold a step or validation too"
        return Check("signal_delay_s", "warning", found, mend)
    return Check("signal_delay_s", "ok", found)


def check_time(profile: Profile) -> Check:
    """Whether the time limit leaves time to work before the warning, which may come early."""
    limit, ahead = profile.minutes * 60, profile.signal_delay_s + EARLY_S
    found = f"{profile.time}, of which Slurm takes up to {ahead} s for the warning"
    if limit <= ahead:
        mend = "--sbatch time=… more, or signal-delay-s less: a job may never get to work"
        return Check("time limit", "FAIL", found, mend)
    if limit < 4 * ahead:
        mend = "--sbatch time=… more: much of each job goes into starting and saving"
        return Check("time limit", "warning", found, mend)
    return Check("time limit", "ok", found)


def check_accounting() -> Check:
    """Whether Slurm remembers jobs that have ended."""
    if slurm.has_accounting():
        return Check("accounting", "ok", "sacct answers")
    mend = "none is needed: status then judges ended jobs by their run folders and logs"
    return Check("accounting", "warning", "sacct does not answer", mend)


def seconds(text: str) -> int:
    """Of ``30 sec`` or ``120``; a word such as UNLIMITED is a day."""
    number = re.match(r"\d+", text)
    return int(number[0]) if number else 86_400
