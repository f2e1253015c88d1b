"""What the commands share: where things lie, where jobs run, and how they are started."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from colddiff.config import RunConfig
from colddiff.files import write_atomic, write_json
from colddiff.tracking import TrackingError
from colddiff.uris import absolute_uri, default_uri, is_server, mask_secrets, sqlite_path
from jobs.cluster import Cluster, SlurmJobs, Submitted, run_here
from jobs.ledger import Entry, Ledger, Work
from jobs.pack import PackedTask, unpacked
from jobs.planning import Planned, plan, table
from jobs.states import Job, living_jobs
from jobs.tasks import AnyTask, Task

if TYPE_CHECKING:
    from jobs.profiles import Profile
    from jobs.snapshot import Snapshot


@dataclass(frozen=True)
class Place:
    """Where things lie, for every command."""

    runs: Path = Path("runs")
    """Folder of the run folders; on a cluster, on a disk that all nodes share."""
    experiment: str = "colddiff"
    """MLflow experiment."""
    tracking_uri: str | None = None
    """MLflow store or server; MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here, by default."""

    def initialise(self) -> None:
        """Create the store's schema and the experiment, before jobs race to do so."""
        from colddiff.tracking import initialise_store

        initialise_store(self.uri, self.experiment)

    @property
    def uri(self) -> str:
        """The tracking URI to use."""
        return absolute_uri(self.tracking_uri) if self.tracking_uri else default_uri()

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """A tracking server that is down stops no training: its record is sent later."""
        try:
            yield
        except TrackingError as error:
            if not is_server(self.uri):
                raise
            say(f"warning: {error}\nThe runs go on; python jobs/launch.py sync sends their record")


@dataclass(frozen=True)
class Launch(Place):
    """Where and how jobs run."""

    cluster: Cluster = "local"
    """local: in the background of this machine, from a queue. slurm: on a cluster. debug: here and
    now."""
    profile: str | None = None
    """Slurm resources: name or path of a TOML file, see jobs/profiles/example.toml."""
    sbatch: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Overrides of the profile, in its own or in sbatch's words; may be repeated."""
    array_parallelism: int | None = None
    """Most jobs of one Slurm array that run at once; the profile's by default."""
    at_once: int = 0
    """Most local jobs at once; 0: one a GPU, or one on a machine without."""
    ranks: int = 1
    """Processes of a local job that share its batches, each with a GPU of its own."""
    offline: bool = False
    """Jobs send nothing to MLflow: ``launch.py sync`` does, from where it is called."""
    wait: bool = False
    """Follow the jobs to their end; exit code 1 if one fails."""
    dry_run: bool = False
    """Only say what would be done; on Slurm also the script, and when it would start."""
    data_root: str | None = None
    """Where data sets lie: short for --data.root, kept in the runs' configurations."""

    def launch(
        self,
        tasks: Sequence[AnyTask],
        *,
        configs: Mapping[str, RunConfig] | None = None,
        dependency: str = "",
    ) -> int:
        """Carry out or submit what there is to do, and say so; the exit code."""
        profile = self.checked_profile(len(tasks))
        if self.dry_run:
            return self.preview(plan(tasks, self._living(tasks), configs), profile)
        if self.cluster == "debug":
            return self._run_here(plan(tasks, self._living(tasks), configs))
        with Ledger(self.runs).launching():
            planned = plan(tasks, self._living(tasks), configs)
            if any(each.wanted for each in planned) and not self.offline:
                with self.tolerated():
                    self.initialise()
            submitted = self.submit(planned, profile, dependency)
        say(table(planned, submitted))
        if submitted:
            self.say_where()
        return self.followed(planned) if self.wait else 0

    def grouped(self, tasks: Sequence[AnyTask]) -> Sequence[AnyTask | PackedTask]:
        """The jobs that carry out the tasks."""
        return tasks

    def followed(self, planned: Sequence[Planned]) -> int:
        """Follow the jobs to their end; the exit code."""
        from jobs.follow import follow

        return follow(self.runs, [each.task.run for each in planned], self.cluster)

    def submit(
        self, planned: Sequence[Planned], profile: Profile | None, dependency: str = ""
    ) -> dict[tuple[str, str], Submitted]:
        """Hand what is wanted to the scheduler and record it; the jobs by run and kind.

        The caller holds the ledger's ``launching`` lock.
        """
        tasks = self.grouped([each.task for each in planned if each.wanted])
        if not tasks:
            return {}
        from jobs.snapshot import snapshot

        code = snapshot(self.runs)
        folder = (self.runs / "jobs").absolute()
        done: dict[tuple[str, str], Submitted] = {}
        if profile is None:
            from jobs.local.queue import submit_locally

            jobs = submit_locally(
                tasks, self.runs, at_once=self.at_once, ranks=self.ranks, code=code.path
            )
            self._record(list(zip(tasks, jobs, strict=True)), profile, code, done)
            return done
        wanted = SlurmJobs(tasks, profile, folder, code.path, dependency)
        wanted.verdicts()  # what Slurm would refuse, it refuses before the first job is submitted
        for part in wanted.submit():
            self._record(part, profile, code, done)
        return done

    def checked_profile(self, jobs: int) -> Profile | None:
        """The resources of so many jobs on Slurm, None elsewhere.

        Raises ``ValueError`` for options that do not go together.
        """
        self.check_options()
        if self.cluster != "slurm":
            return None
        profile = self.slurm_profile()
        self.refuse_shared_sqlite(jobs, profile)
        return profile

    def check_options(self) -> None:
        """Raise ``ValueError`` for options that mean nothing to the chosen cluster."""
        slurm = {
            "--profile": self.profile is not None,
            "--sbatch": bool(self.sbatch),
            "--array-parallelism": self.array_parallelism is not None,
        }
        local = {"--ranks": self.ranks != 1, "--at-once": self.at_once != 0}
        for options, cluster, instead in (
            (slurm, "slurm", ""),
            (local, "local", "; on Slurm the profile says how many GPUs and nodes a job gets"),
        ):
            for option, given in options.items():
                if given and self.cluster != cluster:
                    raise ValueError(
                        f"{option} is not allowed with --cluster {self.cluster}: it is for "
                        f"--cluster {cluster}{instead}"
                    )
        if any(local.values()):
            from jobs.local.slots import slots_for

            slots_for(self.at_once, self.ranks)

    def slurm_profile(self) -> Profile:
        """The resources of Slurm jobs; raises ``ValueError`` for what is no profile."""
        from jobs.profiles import load_profile

        return self.adjusted(load_profile(self.profile or ""))

    def adjusted(self, profile: Profile) -> Profile:
        """The profile with the command line's overrides; raises ``ValueError`` for bad ones."""
        profile = profile.overridden(self.sbatch)
        if self.array_parallelism is None:
            return profile
        return dataclasses.replace(profile, array_parallelism=self.array_parallelism)

    @property
    def jobs_uri(self) -> str:
        """The tracking URI that jobs get."""
        return "" if self.offline else self.uri

    def placed(self, config: RunConfig) -> RunConfig:
        """The configuration with the data root of the command line."""
        if self.data_root is None:
            return config
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, root=self.data_root)
        )

    def _living(self, tasks: Sequence[AnyTask]) -> Mapping[Work, Job]:
        return living_jobs(self.runs, [task.run for task in tasks])

    def _run_here(self, planned: Sequence[Planned]) -> int:
        say(table(planned, {}))
        tasks = self.grouped([each.task for each in planned if each.wanted])
        if not tasks:
            return 0
        with self.tolerated():
            self.initialise()
        here = [
            dataclasses.replace(task, progress=True) if isinstance(task, Task) else task
            for task in tasks
        ]
        for made in run_here(here):
            say(f"done: {made}")
        self.say_where()
        return 0

    def preview(self, planned: Sequence[Planned], profile: Profile | None) -> int:
        """Say what would be done: on Slurm the scripts, and what it would do with them."""
        say(table(planned, {}))
        tasks = [each.task for each in planned if each.wanted]
        if profile is None or not tasks:
            return 0
        from jobs.snapshot import code_path

        folder = (self.runs / "jobs").absolute()
        wanted = SlurmJobs(self.grouped(tasks), profile, folder, code_path(self.runs))
        for script in wanted.scripts():
            say(f"\n{script}")
        for verdict in wanted.verdicts():
            say(f"Slurm: {verdict}")
        return 0

    def refuse_shared_sqlite(self, jobs: int, profile: Profile) -> None:
        """Raise ``ValueError`` where jobs of several nodes would write to one SQLite file."""
        file = None if self.offline else sqlite_path(self.uri)
        if file is not None and (jobs > 1 or profile.nodes > 1):
            raise ValueError(
                f"MLflow's {file} is a SQLite file: several nodes writing to it over a network "
                "file system lose data. Give an MLflow server (--tracking-uri http://…, or "
                "MLFLOW_TRACKING_URI), or --offline: jobs then keep their journals, and "
                "python jobs/launch.py sync sends them from here"
            )

    def _record(
        self,
        submitted: Sequence[tuple[AnyTask | PackedTask, Submitted]],
        profile: Profile | None,
        code: Snapshot,
        done: dict[tuple[str, str], Submitted],
    ) -> None:
        """Into the ledger first, which alone keeps a run from being submitted twice."""
        jobs = list(unpacked(submitted))
        command = mask_secrets(shlex.join(["python", *sys.orig_argv[1:]]))
        local = {"at_once": self.at_once, "ranks": self.ranks}
        entries = [
            Entry(
                run=task.run,
                kind=task.kind,
                cluster="slurm" if profile else "local",
                job_id=job.job_id,
                stdout=str(job.stdout),
                stderr=str(job.stderr),
                task=task.to_dict(),
                profile=profile.to_dict() if profile else local,
                code=code.digest,
                command=command,
            )
            for task, job in jobs
        ]
        Ledger(self.runs).append(entries)
        for (task, job), entry in zip(jobs, entries, strict=True):
            done[task.run, task.kind] = job
            if isinstance(task, Task):
                _describe(Path(task.folder), job, entry, code)

    def say_where(self) -> None:
        """Say where the runs are to be seen."""
        if self.offline:
            say("MLflow: python jobs/launch.py sync sends the runs' record from here")
            return
        uri = mask_secrets(self.uri)
        ui = uri if is_server(uri) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        say(f"MLflow: {ui}")


def _describe(folder: Path, job: Submitted, entry: Entry, code: Snapshot) -> None:
    """Keep with the run how it was submitted, for people and for MLflow."""
    from jobs.snapshot import link

    names = ("kind", "cluster", "job_id", "command", "profile", "code", "stdout", "stderr")
    file = folder / f"submission-{entry.kind}.json"
    write_json(file, {name: getattr(entry, name) for name in names})
    if job.script is not None and job.script.exists():
        write_atomic(file.with_suffix(".sh"), job.script.read_text())
    link(folder, code)


def say(text: str) -> None:
    """Print, at once even into a pipe."""
    print(text, flush=True)
