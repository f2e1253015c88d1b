"""The design of the mode-collapse study; run as a script, it prints the plan file.

Eight trainings (flips, rounding to the exact mean, loss), two seeds of each, and on every network
16 sets of samples: each start with each symmetry-breaking noise, while algorithm, levels and
weights follow from parities of the others. That is 256 of 2,048 combinations. Counting start and
noise as one letter each, the shortest word of the defining relation has five: no main effect and no
interaction of two factors is confounded with another; interactions of three are with those of two.

    SN.flip.discrete.algorithm   SN.discrete.loss.levels   SN.flip.loss.seed.weights
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import Any

TRAINING: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "flip": {"no": {}, "yes": {"data.flip": True}},
    "discrete": {"no": {}, "yes": {"degradation.discrete": True}},
    "loss": {"l1": {}, "l2": {"training.loss": "l2"}},
}
"""Factors, their levels (the reference first), and the settings that make them."""
SAMPLING: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "start": {
        "mean, 1": {},
        "mean, 10": {"components": 10},
        "model": {"start": "terminals", "components": 50},
        "real": {"start": "real"},
    },
    "noise": {
        "0.002": {},
        "0": {"symmetry_noise": 0.0},
        "0.01": {"symmetry_noise": 0.01},
        "0.05": {"symmetry_noise": 0.05},
    },
    "algorithm": {"2": {}, "1": {"algorithm": "algorithm1"}},
    "levels": {"all": {}, "20-10-0": {"levels": "20-10-0"}},
    "weights": {"average": {}, "raw": {"weights": "raw"}},
}
"""The paper's sampler is the reference throughout."""
SEEDS = (0, 1)
N = 2000
PAPER: dict[str, Any] = {}
CURE: dict[str, Any] = {
    "start": "terminals", "components": 50, "symmetry_noise": 0.0, "levels": "20-10-0",
}  # fmt: skip
CURVE_STEPS = (250, 500, 750, 1000, 1250)
SMALL: dict[str, Any] = {
    "model.dim": 16,
    "training.own_states": 0.0,
    "training.steps": 1500,
    "training.ema_start": 200,
    "training.ema_decay": 0.995,
    "training.keep_every": 250,
    "training.validate_every": 500,
    "evaluation.samples": 1000,
}
"""Small networks, of which twenty fit into two hours of two cores."""

STUDENT: dict[str, Any] = {
    "data.validation": 1000,
    "model.dim": 16,
    "model.mults": [1, 2, 2],
    "model.patch": 2,
    "training.precision": "bfloat16",
    "evaluation.samples": 2000,
}
"""The student's setting with a network of that size: the authors' takes hours on two cores."""


def levels_of(flip: int, discrete: int, loss: int, seed: int) -> list[dict[str, str]]:
    """The levels of the 16 sets of a network whose factors stand at these places (0 or 1)."""
    names = {factor: list(levels) for factor, levels in SAMPLING.items()}
    found = []
    for start, noise in itertools.product(range(4), range(4)):
        p, q, n, m = start >> 1, start & 1, noise >> 1, noise & 1
        places = {
            "start": start,
            "noise": noise,
            "algorithm": p ^ n ^ flip ^ discrete,
            "levels": q ^ m ^ discrete ^ loss,
            "weights": p ^ q ^ n ^ flip ^ loss ^ seed,
        }
        found.append({factor: names[factor][place] for factor, place in places.items()})
    return found


def samples_of(flip: int, discrete: int, loss: int, seed: int) -> list[dict[str, Any]]:
    """The settings of :func:`levels_of`."""
    sets = []
    for levels in levels_of(flip, discrete, loss, seed):
        settings: dict[str, Any] = {"n": N}
        for factor, level in levels.items():
            settings |= SAMPLING[factor][level]
        sets.append(settings)
    return sets


def plan() -> str:
    """The study's plan file: the factorial, T, training length, hot diffusion, before and after."""
    lists: dict[str, list[dict[str, Any]]] = {}
    runs = []
    for places in itertools.product((0, 1), repeat=3):
        change = dict(SMALL)
        for (_, levels), place in zip(TRAINING.items(), places, strict=True):
            change |= list(levels.values())[place]
        for seed in SEEDS:
            flip, discrete, loss = places
            sets = samples_of(flip, discrete, loss, seed)
            extremes = [{"n": N} | PAPER, {"n": N} | CURE]
            sets += [each for each in extremes if each not in sets]
            if places in ((0, 0, 0), (1, 1, 0)):
                sets += [each | {"step": step} for each in extremes for step in CURVE_STEPS]
            name = f"{_word(places)}-seed{seed}"
            lists[name] = sets
            runs.append(_run("mnist", f"collapse-{_word(places)}", change, name, seed))
    naive = {"n": N, "algorithm": "algorithm1"}
    lists["few"] = [{"n": N} | PAPER, {"n": N, "start": "real", "symmetry_noise": 0.0}]
    lists["few"] += [{"n": N} | CURE | {"levels": ""}, naive]
    lists["hot"] = [{"n": N}, {"n": N, "algorithm": "ddim"}, {"n": N, "algorithm": "ddpm"}]
    for T in (10, 40):
        runs.append(_run("mnist", f"collapse-T{T}", SMALL | {"degradation.T": T}, "few", 0))
    runs.append(_run("mnist-hot", "collapse-hot", SMALL, "hot", 0))
    lists["student"] = [{"n": N} | PAPER, {"n": N} | CURE, naive]
    runs.append(_run("mnist-student", "mnist-student-small", STUDENT, "student", 0))
    runs.append('[[runs]]\npreset = "mnist-generate"\nseeds = [0, 1, 2]')
    head = (
        "# The mode-collapse study, made by: python analysis/collapse_design.py\n"
        "# Its runs: python jobs/launch.py train --plan results/mode_collapse/plan.toml "
        "--experiment mode-collapse\n"
    )
    named = "\n".join(f'"{name}" = {_toml(sets)}' for name, sets in lists.items())
    return f"{head}reports = []\n\n[generate]\n{named}\n\n" + "\n\n".join(runs) + "\n"


def _word(places: tuple[int, ...]) -> str:
    return "-".join(
        list(levels)[place] if factor == "loss" else factor if place else f"no_{factor}"
        for (factor, levels), place in zip(TRAINING.items(), places, strict=True)
    )


def _run(preset: str, name: str, change: dict[str, Any], sets: str, seed: int) -> str:
    evaluation: dict[str, Any] = {"evaluation.levels": []}
    return (
        f'[[runs]]\npreset = "{preset}"\nname = "{name}"\nseeds = [{seed}]\n'
        f'generate = "{sets}"\nset = {_toml(change | evaluation)}'
    )


def _toml(value: Any) -> str:
    match value:
        case dict():
            return (
                "{ " + ", ".join(f'"{name}" = {_toml(each)}' for name, each in value.items()) + " }"
            )
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
    return str(value)


if __name__ == "__main__":
    sys.stdout.write(plan())
