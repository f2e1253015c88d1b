"""The configuration of a run: one frozen tree, validated when it is built; its sections, its id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Self

from colddiff.levels import check_levels
from colddiff.output_sections import EvaluationConfig, GenerationConfig
from colddiff.schema import Checked, build, elsewhere, identity, require
from colddiff.sections import (
    DataConfig,
    DegradationConfig,
    ModelConfig,
    OptimiserConfig,
    TrainingConfig,
)

__all__ = [
    "DataConfig",
    "DegradationConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "ModelConfig",
    "OptimiserConfig",
    "RunConfig",
    "TrainingConfig",
]


@dataclass(frozen=True)
class RunConfig(Checked):
    """One run: everything that defines its result, and how it is carried out."""

    preset: str = elsewhere("custom")
    """The named configuration to start from; every other option overrides one of its values."""
    data: DataConfig = field(default_factory=DataConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: tuple[GenerationConfig, ...] = elsewhere(())
    """The sets of images that are generated from the trained run; no part of the run id."""

    def check(self) -> None:
        """Ranges; see the fields."""
        size, stride = self.data.image_size, self.model.stride
        require(size % stride == 0, "data.image_size", size, f"a multiple of {stride}")
        blur = self.degradation
        if blur.kind == "blur" and blur.padding == "reflect":
            require(
                blur.widest_kernel // 2 < size,
                "degradation.kernel_size",
                blur.widest_kernel,
                f"at most {2 * size - 1} for reflect padding of {size} pixels",
            )
        require(
            not (self.model.conditioning == "wiener" and blur.kind == "noise"),
            "model.conditioning",
            self.model.conditioning,
            "raw for degradation.kind = noise",
        )
        require(
            self.optimiser.warmup_steps <= self.training.steps,
            "optimiser.warmup_steps",
            self.optimiser.warmup_steps,
            f"at most training.steps = {self.training.steps}",
        )
        own, alone = self.training.own_states, blur.T == 1 or self.training.levels == "last"
        require(
            own == 0 or not (alone or blur.discrete or blur.storage != "float32"),
            "training.own_states",
            own,
            "0 for T = 1, training.levels = last and an x_t that is rounded",
        )
        for levels in self.evaluation.level_lists:
            check_levels(levels, blur.T)
        for settings in self.generation:
            settings.check_for(blur, self.training)

    @property
    def run_id(self) -> str:
        """A readable name and a hash of what defines the result: the run folder's name."""
        blur = self.degradation
        what: str = "noise" if blur.kind == "noise" else blur.schedule
        if blur.discrete:
            what += "-discrete"
        slug = f"{self.data.name}-{what}-T{blur.T}-dim{self.model.dim}-seed{self.training.seed}"
        text = json.dumps(identity(self), sort_keys=True)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of JSON values."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, str | int | float | bool]:
        """Dotted names to scalars, for tables and MLflow parameters."""
        flat: dict[str, str | int | float | bool] = {"preset": self.preset}
        for section, values in self.to_dict().items():
            if isinstance(values, dict):
                for name, value in values.items():
                    scalar = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    flat[f"{section}.{name}"] = scalar
        return flat

    def to_json(self) -> str:
        """Indented JSON; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read :meth:`to_json`'s output.

        Raises:
            ValueError: for text that is not JSON, and for unknown, mistyped or bad values.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a configuration: {error}") from None
        return build(cls, values)
