"""Who proposes a study's trials, and what stops hopeless ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sweeps.space import grid

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from sweeps.study import StudyConfig

SamplerName = Literal["auto", "tpe", "gp", "nsga2", "random", "grid"]
PrunerName = Literal["none", "median", "hyperband"]


def build_sampler(config: StudyConfig, seed: int) -> BaseSampler:
    """The sampler; seeded, so that workers do not all suggest the same."""
    from optuna import samplers

    match config.sampler:
        case "gp":
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        case "nsga2":
            # A generation of fifty, the default, would be the whole of most studies.
            population = min(50, max(4, config.trials // 5))
            return samplers.NSGAIISampler(population_size=population, seed=seed)
        case "random":
            return samplers.RandomSampler(seed=seed)
        case "grid":

            class WholeGrid(samplers.GridSampler):
                """A grid whose end does not call ``study.stop``, which only ``optimize`` allows."""

                def after_trial(self, *_: Any) -> None:
                    """Nothing: the worker counts the trials."""

            # Its order must be the same for all workers.
            return WholeGrid(grid(config.space, config.base, config.keep), seed=config.seed)
        case _:
            multivariate = config.objective != "pareto"
            return samplers.TPESampler(seed=seed, multivariate=multivariate, constant_liar=True)


def build_pruner(config: StudyConfig) -> BasePruner:
    """The pruner; steps are those of the training."""
    from optuna import pruners

    training = config.base.training
    match config.pruner:
        case "none":
            return pruners.NopPruner()
        case "median":
            return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=training.steps // 5)
        case "hyperband":
            first = min(training.validate_every, training.steps)
            return pruners.HyperbandPruner(min_resource=first, max_resource=training.steps)
