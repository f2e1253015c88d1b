"""Train, evaluate, table and figure: one command, one chain of jobs that ends together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from colddiff.config import RunConfig
from colddiff.run_folder import RunFolder
from jobs.cluster import Submitted
from jobs.ledger import Ledger, Work, work_of
from jobs.options import say
from jobs.plan_file import REPORTS, read_plan
from jobs.planning import Planned, is_measured, plan, table
from jobs.profiles import Profile
from jobs.states import Job, living_jobs
from jobs.tasks import EvaluateTask, ReportTask, TrainTask
from jobs.work import Seeded


@dataclass(frozen=True)
class Reproduce(Seeded):
    """Train runs, evaluate them, generate from them, and make the paper's table and figure of them.

    On Slurm three jobs wait for each other: each run is evaluated when it is trained, and the table
    is made when all are evaluated. What can no longer run, because something before it failed, is
    taken out of the queue. --preset NAME, --config FILE or --plan FILE as for train; a plan also
    says which reports are made, of all runs in the experiment.
    """

    out: Path = Path("reports/reproduce")
    """Folder for the table and the figure."""

    def __call__(self) -> int:
        """Submit the chain, without what is done already."""
        if self.offline:
            raise ValueError("--offline: table and figure are made from MLflow; leave it out")
        configs = self.configs()
        known = {config.run_id: config for config in configs}
        slurm = self.cluster == "slurm"
        training = [
            TrainTask(folder, self.uri, self.experiment, evaluate=not slurm)
            for folder in self.folders(configs)
        ]
        name = configs[0].preset if self.plan is None else self.plan.stem
        report = ReportTask(
            run=f"report-{self.experiment}-{name}",
            tracking_uri=self.uri,
            experiment=self.experiment,
            preset="" if self.plan else configs[0].preset,
            out=str(self.out.absolute()),
            runs=tuple(config.run_id for config in configs),
            reports=read_plan(self.plan).reports if self.plan else REPORTS,
        )
        return (
            self._chain(training, report, known) if slurm else self._here(training, report, known)
        )

    def _here(
        self, training: Sequence[TrainTask], report: ReportTask, known: Mapping[str, RunConfig]
    ) -> int:
        """On one machine: wait for the runs, then make the report in this process."""
        follows = dataclasses.replace(self, wait=self.cluster == "local" and not self.dry_run)
        code = follows.launch(training, configs=known)
        if code or self.dry_run:
            return code
        say(f"done: {report()}")
        return 0

    def _chain(
        self, training: Sequence[TrainTask], report: ReportTask, known: Mapping[str, RunConfig]
    ) -> int:
        profile = self.checked_profile(len(training))
        assert profile is not None, "a chain is Slurm's"
        single = profile.single  # which may be refused, so before anything is submitted
        if self.dry_run:
            return self._preview_chain(training, report, known, single)
        with Ledger(self.runs).launching():
            with self.tolerated():
                self.initialise()
            names = [task.run for task in training]
            living = living_jobs(self.runs, [*names, report.run])
            trained = plan(training, living, known)
            submitted = self.submit(trained, profile)
            waits = {job.entry.run: job for job in living.values() if job.entry.kind == "train"}
            evaluated = [self._evaluation(task, living, known) for task in training]
            for dependency, part in _by_dependency(evaluated, submitted, waits).items():
                submitted |= self.submit(part, single, dependency)
            ends = _afterok(evaluated, submitted, living)
            last = plan([report], living)
            submitted |= self.submit(last, single, ends)
        planned = [*trained, *evaluated, *last]
        say(table(planned, submitted))
        self.say_where()
        say(f"table and figure: {report.out}")
        return self.followed(planned) if self.wait else 0

    def _preview_chain(
        self,
        training: Sequence[TrainTask],
        report: ReportTask,
        known: Mapping[str, RunConfig],
        single: Profile,
    ) -> int:
        self.launch(training, configs=known)
        living = living_jobs(self.runs, [*(task.run for task in training), report.run])
        say("\neach run is evaluated after its training; then comes the report")
        self.preview([self._evaluation(task, living, known) for task in training], single)
        say("")
        return self.preview(plan([report], living), single)

    def _evaluation(
        self, task: TrainTask, living: Mapping[Work, Job], known: Mapping[str, RunConfig]
    ) -> Planned:
        config = known[task.run]
        wanted = EvaluateTask(task.folder, self.uri, self.experiment, evaluation=config.evaluation)
        job = living.get(work_of(wanted.run, wanted.kind, wanted.to_dict()))
        folder = RunFolder(Path(task.folder))
        if job:
            return Planned(wanted, str(job), wanted=False)
        if folder.is_trained and is_measured(folder, config.evaluation, config.generation):
            return Planned(wanted, "complete", wanted=False)
        return Planned(wanted, "trained" if folder.is_trained else "after training", wanted=True)


def _by_dependency(
    evaluated: Sequence[Planned],
    submitted: Mapping[tuple[str, str], Submitted],
    waits: Mapping[str, Job],
) -> dict[str, list[Planned]]:
    """Evaluations by what they wait for; of an array, in the order of its elements."""
    groups: dict[str, list[Planned]] = {}
    for each in evaluated:
        job = submitted.get((each.task.run, "train"))
        array, _, element = job.job_id.partition("_") if job else ("", "", "")
        if element:
            dependency = f"aftercorr:{array}"
        elif job:
            dependency = f"afterok:{job.job_id}"
        elif each.task.run in waits:
            dependency = f"afterok:{waits[each.task.run].entry.job_id}"
        else:
            dependency = ""
        groups.setdefault(dependency, []).append(each)
    wanted: dict[str, list[Planned]] = {}
    for dependency, group in groups.items():
        whole = all(each.wanted for each in group)
        for each in [each for each in group if each.wanted]:
            # Of a part of an array, aftercorr would pair elements with those of others.
            paired = dependency.startswith("aftercorr") and not whole
            own = f"afterok:{submitted[each.task.run, 'train'].job_id}" if paired else dependency
            wanted.setdefault(own, []).append(each)
    return wanted


def _afterok(
    evaluated: Sequence[Planned],
    submitted: Mapping[tuple[str, str], Submitted],
    living: Mapping[Work, Job],
) -> str:
    """The dependency on every evaluation that is not done."""
    ids = []
    for each in evaluated:
        task = each.task
        job = living.get(work_of(task.run, task.kind, task.to_dict()))
        if (task.run, task.kind) in submitted:
            ids.append(submitted[task.run, task.kind].job_id.partition("_")[0])
        elif job:
            ids.append(job.entry.job_id)
    return "afterok:" + ":".join(dict.fromkeys(ids)) if ids else ""
