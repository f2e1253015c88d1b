"""The study's design: what its plan file asks for, and that its effects can be told apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.collapse_design import SAMPLING, SEEDS, TRAINING, N, plan, samples_of
from analysis.collapse_table import OTHER, sampling_level
from analysis.effects import effects
from colddiff.config import GenerationConfig, RunConfig
from jobs.plan_file import read_plan

PLAN = Path("results/mode_collapse/plan.toml")


def designed() -> pd.DataFrame:
    """A row a set of the factorial, with its levels as they are read back from its settings."""
    rows = []
    for places in itertools.product((0, 1), repeat=3):
        for seed in SEEDS:
            flip, discrete, loss = places
            for change in samples_of(flip, discrete, loss, seed):
                settings = dataclasses.asdict(GenerationConfig(**change))
                row = {"network": f"{places}{seed}"}
                for (factor, levels), place in zip(TRAINING.items(), places, strict=True):
                    row[factor] = list(levels)[place]
                rows.append(row | {f: sampling_level(f, settings) for f in SAMPLING})
    return pd.DataFrame(rows)


def test_every_level_is_there_equally_often() -> None:
    table = designed()
    assert len(table) == 256
    for factor, levels in SAMPLING.items():
        assert Counter(table[factor]) == {level: 256 // len(levels) for level in levels}
    pairs = itertools.combinations((*TRAINING, *SAMPLING), 2)
    for pair in pairs:  # orthogonal main effects
        assert (
            len(set(Counter(zip(*(table[factor] for factor in pair), strict=True)).values())) == 1
        )
    assert not table.drop(columns="network").duplicated().any() or len(SEEDS) > 1


def test_no_interaction_hides_behind_a_main_effect_or_another_interaction() -> None:
    """Each true effect of one or two factors is found alone; all others stay at zero."""
    table = designed()
    levels = [{f: tuple(each) for f, each in part.items()} for part in (TRAINING, SAMPLING)]
    random = np.random.default_rng(0)
    terms = [(f,) for f in (*TRAINING, *SAMPLING)]
    terms += itertools.combinations((*TRAINING, *SAMPLING), 2)
    for term in terms:
        cells = {key: random.normal() for key in itertools.product(*(
            {**TRAINING, **SAMPLING}[factor] for factor in term))}  # fmt: skip
        table["y"] = [cells[key] for key in zip(*(table[f] for f in term), strict=True)]
        for effect in effects(table, "y", "network", *levels):
            if not set(effect.factors) <= set(term):
                assert effect.size == pytest.approx(0, abs=1e-9), (term, effect)
        assert any(
            abs(effect.size) > 1e-3 and effect.factors == term
            for effect in effects(table, "y", "network", *levels)
        )


def test_interactions_of_three_factors_are_not_told_apart() -> None:
    """As the page says: flip x discrete x algorithm is that of start and noise."""
    table = designed()
    signs = (
        (table["flip"] == "yes") ^ (table["discrete"] == "yes") ^ (table["algorithm"] == "1")
    ).map({True: 1.0, False: -1.0})  # fmt: skip
    table["y"] = signs
    levels = [{f: tuple(each) for f, each in part.items()} for part in (TRAINING, SAMPLING)]
    found = [e for e in effects(table, "y", "network", *levels) if abs(e.size) > 1e-6]
    assert {effect.factors for effect in found} == {("start", "noise")}


def test_the_plan_file_is_the_designs() -> None:
    assert PLAN.read_text() == plan()
    runs = read_plan(PLAN).runs
    factorial = [config for config in runs if config.preset.count("-") >= 3]
    assert len(factorial) == 16
    assert all(settings.n == N for config in runs for settings in config.generation)
    for config in runs:
        assert len(set(config.generation)) == len(config.generation)
    known: dict[tuple[bool, bool, str, int], RunConfig] = {
        (c.data.flip, c.degradation.discrete, c.training.loss, c.training.seed): c
        for c in factorial
    }
    assert len(known) == 16
    for (flip, discrete, loss, seed), config in known.items():
        wanted = samples_of(int(flip), int(discrete), int(loss == "l2"), seed)
        sets = {GenerationConfig(**each) for each in wanted}
        assert len(sets) == 16 and sets <= set(config.generation)


def test_settings_of_no_level_are_told() -> None:
    settings = dataclasses.asdict(GenerationConfig(n=N, symmetry_noise=0.3, components=7))
    assert sampling_level("noise", settings) == OTHER
    assert sampling_level("start", settings) == OTHER
    assert sampling_level("algorithm", settings) == "2"
    real = settings | {"start": "real"}  # whose components mean nothing
    assert sampling_level("start", real) == "real"
