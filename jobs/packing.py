"""``--pack``: several runs or workers in one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.options import Launch
from jobs.pack import PackedTask, packs
from jobs.profiles import Profile
from jobs.tasks import AnyTask


@dataclass(frozen=True)
class Packing(Launch):
    """Commands whose tasks may share jobs."""

    pack: int = 1
    """Runs (of a sweep: workers) in each job, at least 1: they share its GPU, each in a process of
    its own. Worth it for networks that do not fill a GPU; mem is of the whole job."""

    def grouped(self, tasks: Sequence[AnyTask]) -> Sequence[AnyTask | PackedTask]:
        """``pack`` of them a job."""
        return packs(tasks, self.pack, self.runs)

    def check_options(self) -> None:
        """As without packing; raises ``ValueError`` also where there is nothing to pack into."""
        super().check_options()
        if self.pack < 1:
            raise ValueError(f"--pack {self.pack} is not allowed: it must be at least 1")
        if self.pack > 1 and self.cluster == "debug":
            raise ValueError("--pack is not allowed with --cluster debug: it is for jobs")

    def checked_profile(self, jobs: int) -> Profile | None:
        """As without packing; raises ``ValueError`` also for jobs of several processes."""
        profile = super().checked_profile(jobs)
        processes = profile.processes_per_node * profile.nodes if profile else self.ranks
        if self.pack > 1 and processes > 1:
            raise ValueError(
                f"--pack {self.pack} is not allowed with {processes} processes a job: packed runs "
                "share one GPU"
            )
        return profile
