"""The commands that start workers: start and resume."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Suppress, arg

from colddiff.config import GenerationConfig, RunConfig
from colddiff.presets import labelled, preset
from jobs.options import Launch, say
from jobs.packing import Packing
from jobs.profiles import Profile
from sweeps.objective import Metric, ObjectiveName
from sweeps.samplers import PrunerName, SamplerName
from sweeps.space import SpaceName
from sweeps.study import StudyConfig, read_study
from sweeps.workers import Team, last_launch


@dataclass(frozen=True, kw_only=True)
class Workers(Packing):
    """What the commands that start workers share."""

    study: str
    """Name of the study."""
    workers: int = 1
    """Jobs that work on its trials; those that live already count."""
    at_once: int = 0
    """Most local workers at once; 0: all of them, but one on each GPU where there are GPUs."""
    ranks: Annotated[int, Suppress] = 1
    orphan_after: Annotated[float, arg(metavar="MINUTES")] = 30.0
    """How long a trial waits for its requeued job before another worker takes it over."""

    def say_where(self) -> None:
        """Say where the study is to be seen."""
        if self.offline:
            say(f"MLflow: python sweeps/launch.py sync --study {self.study} sends it from here")
            return
        super().say_where()


@dataclass(frozen=True, kw_only=True)
class Start(Workers):
    """Start a study, or add the workers that it lacks: the same command again finds it.

    --preset NAME or --config FILE gives the base, the run around which the space lies; other
    options override its values. Trial 0 of every study is the base itself.
    """

    space: SpaceName = "schedule"
    """What is varied. schedule: shape, kernel, padding and T, at the base's terminal blur. steps: T
    alone. paper: the authors' families, as strong as the base. levels: which levels the sampler
    visits. recipe: rate, width, loss, average."""
    keep: tuple[str, ...] = ()
    """Parameters of the space recipe that are not varied: they stay the base's."""
    objective: ObjectiveName = "restoration"
    """What is optimised, on validation images. restoration: by Algorithm 2. direct: R(x_T, T).
    generation: FID(digits). pareto: FID(digits) against network calls."""
    metric: Metric = "rmse"
    """Of the objectives restoration and direct."""
    trials: int = 30
    """So many finished trials are wanted; pruned ones count, failed ones are replaced."""
    sampler: SamplerName = "auto"
    """Who proposes; auto: nsga2 for pareto, else tpe."""
    pruner: PrunerName = "none"
    """What stops hopeless trials by their validations while they train."""
    seed: int = 0
    """Of the sampler; the runs have training.seed."""
    storage: str = ""
    """Where trials are kept: a journal file in the study's folder by default; a path,
    postgresql://host/database, grpc://host:port (see serve), or on one machine sqlite:///file."""
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(n=1000))
    """How digits are generated for the objectives generation and pareto."""
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=lambda: preset("demo"))

    def __call__(self) -> int:
        """Submit the workers."""
        team = Team(
            config=self.config(),
            launch=self,
            workers=self.workers,
            profile=self.slurm_profile() if self.cluster == "slurm" else None,
            orphan_after_s=60 * self.orphan_after,
        )
        team.check()
        self.check_base(team.config.base)
        return followed(team)

    def config(self) -> StudyConfig:
        """The study; raises ``ValueError`` for what makes none."""
        return StudyConfig(
            name=self.study,
            space=self.space,
            keep=self.keep,
            objective=self.objective,
            metric=self.metric,
            sampler=self.sampler,
            pruner=self.pruner,
            trials=self.trials,
            seed=self.seed,
            base=labelled(self.placed(self.run)),
            generation=self.generation,
            runs=str(self.runs),
            storage=self.storage,
            one_machine=self.cluster != "slurm",
        )

    def check_base(self, base: RunConfig) -> None:
        """Raise ``ValueError`` where the trials could not run: no data, no such device."""
        from colddiff.data import load_images
        from colddiff.optimisation import resolve_device

        if self.cluster != "slurm":  # whose login nodes have other devices than its jobs
            resolve_device(base.training.device)
        load_images(base.data, "train")


@dataclass(frozen=True, kw_only=True)
class Resume(Workers):
    """Go on with a study: more workers, after cancel or a failure, or more trials.

    Workers get the resources of the last ones where nothing else is given.
    """

    trials: int | None = None
    """So many finished trials are wanted in all; as before by default."""
    given: Annotated[tuple[str, ...], Suppress] = ()
    """The names of the options that were."""

    def __call__(self) -> int:
        """Submit the workers."""
        launch, profile = self.as_before()
        before = read_study(self.runs, self.study)
        config = dataclasses.replace(
            before,
            runs=str(self.runs),
            trials=before.trials if self.trials is None else self.trials,
            base=self.placed(before.base),
            one_machine=launch.cluster != "slurm",
        )
        team = Team(config, launch, self.workers, profile, 60 * self.orphan_after)
        team.check()
        return followed(team)

    def as_before(self) -> tuple[Launch, Profile | None]:
        """Where and on what the workers are to run."""
        last, launch = last_launch(self.runs, self.study), self
        if last is None:
            return self, self.slurm_profile() if self.cluster == "slurm" else None
        for option in ("experiment", "tracking_uri"):
            if option not in self.given and last.task[option]:
                launch = dataclasses.replace(launch, **{option: last.task[option]})
        if "cluster" not in self.given:
            launch = dataclasses.replace(launch, cluster=last.cluster)
        if launch.cluster != "slurm":
            return launch, None
        if last.cluster == "local" or self.profile:
            return launch, self.slurm_profile()
        return launch, self.adjusted(Profile.from_dict(last.profile))


def followed(team: Team) -> int:
    """Submit a study's workers, and wait for their end where that is wanted; the exit code."""
    code = team.send()
    launch = team.launch
    if code or launch.dry_run or not launch.wait or launch.cluster == "debug":
        return code
    from sweeps.following import follow

    return follow(launch.runs, team.config, cancel=launch.cluster == "local")
