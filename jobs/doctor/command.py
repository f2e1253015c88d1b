"""The preflight: what would go wrong with jobs here, before they are launched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from colddiff.presets import preset
from jobs.doctor import checks
from jobs.doctor.checks import Check
from jobs.options import Launch, Place, say
from jobs.profiles import Profile, load_profile

UNSEEN = "Not looked at: GPUs, disk, locks and MLflow as jobs see them; --probe sends a job to look"


@dataclass(frozen=True)
class Doctor(Place):
    """Check what jobs need, here or on a cluster, and say how to mend what is wrong.

    One line a check. Exit code 1 if one fails. Leaves nothing behind but, with --probe, the copy of
    the code that the next launch takes.
    """

    cluster: Literal["local", "slurm"] = "local"
    """Where the jobs are to run."""
    profile: str = ""
    """Slurm resources: name or path of a TOML file."""
    sbatch: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Overrides of the profile; may be repeated."""
    preset: str = "mnist"
    """Whose checkpoints are to be saved."""
    probe: bool = False
    """Send a job of a few minutes at most that looks around; Slurm only."""

    def __call__(self) -> int:
        """Print what is found; 1 where a check fails."""
        if self.probe and self.cluster == "local":
            raise ValueError("--probe looks at Slurm's nodes: it goes with --cluster slurm")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries end as one check
        failed = warned = 0
        for found in self.look():
            say(str(found))
            failed += found.verdict == "FAIL"
            warned += found.verdict == "warning"
        if self.cluster == "slurm" and not self.probe:
            say(UNSEEN)
        words = (f"{failed} failed" if failed else "", f"{warned} to think about" if warned else "")
        say(", ".join(word for word in words if word) or "all is well")
        return min(failed, 1)

    def look(self) -> Iterator[Check]:
        """All checks, each as soon as it is made."""
        config, profile = preset(self.preset), load_profile(self.profile, self.sbatch)
        python, torch = checks.check_torch()
        yield python
        if torch is None:
            return
        if self.cluster == "local":
            yield checks.check_gpus(torch)
        size = checks.state_bytes(config)
        saving, save_s = checks.check_saving(self.runs, size)
        yield saving
        if save_s is not None:
            yield checks.check_space(self.runs, size)
            yield checks.check_locks(self.runs)
        yield checks.check_code(self.runs)
        yield self._tracking()
        if self.cluster == "slurm":
            yield from self._slurm(profile, save_s)

    def _tracking(self) -> Check:
        from jobs.doctor.tracking_checks import check_tracking

        return check_tracking(Launch(self.runs, self.experiment, self.tracking_uri, self.cluster))

    def _slurm(self, profile: Profile, save_s: float | None) -> Iterator[Check]:
        from jobs.doctor.probe import probe
        from jobs.doctor.slurm_checks import check_cluster, check_slurm

        yield checks.check_sharing(self.runs, probed=self.probe)
        answers, cluster = check_slurm(profile)
        yield answers
        if cluster is None:
            return
        takes_jobs = save_s is not None
        for found in check_cluster(cluster, profile, save_s):
            yield found
            takes_jobs &= found.name != "profile" or found.verdict == "ok"
        if self.probe and takes_jobs:
            uri = self._uri_of_jobs()
            yield from probe(self.runs, profile, uri, self.experiment)

    def _uri_of_jobs(self) -> str:
        """Empty for what jobs must not open: a SQLite file over a network disk."""
        from colddiff.uris import sqlite_path

        return "" if sqlite_path(self.uri) else self.uri
