"""Effects of a split-plot experiment: known ones are found, and intervals mean what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis.effects import Effect, effects

TRAINING = {"flip": ("no", "yes"), "loss": ("l1", "l2")}
SAMPLING = {"start": ("means", "real", "model"), "noise": ("0", "1")}


def table(seeds: int = 2) -> pd.DataFrame:
    """Every combination once a network; two networks a setting."""
    rows = [
        {
            "network": f"{flip}{loss}{seed}",
            "flip": flip,
            "loss": loss,
            "start": start,
            "noise": noise,
        }
        for flip, loss, seed in itertools.product(*TRAINING.values(), range(seeds))
        for start, noise in itertools.product(*SAMPLING.values())
    ]
    return pd.DataFrame(rows)


def found(frame: pd.DataFrame) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Effect]:
    every = effects(frame, "y", "network", TRAINING, SAMPLING)
    return {(effect.factors, effect.levels): effect for effect in every}


def test_effects_without_error_are_exact() -> None:
    frame = table()
    flip, loss = frame["flip"] == "yes", frame["loss"] == "l2"
    real, noise = frame["start"] == "real", frame["noise"] == "1"
    frame["y"] = 1 + 2.0 * flip - 3 * real + 0.5 * noise + 4 * (flip & real) + 6 * (flip & loss)
    got = found(frame)
    assert list(got)[0] == (("flip",), ("yes",))
    assert (
        len(got) == 2 + 3 + 1 + (2 + 1) * 2 + 2
    )  # mains; flip x loss, training x sampling, start x noise
    # Main effects are averages over the others: a third of the starts are real, half the losses l2.
    assert got[("flip",), ("yes",)].size == pytest.approx(2 + 4 / 3 + 6 / 2)
    assert got[("loss",), ("l2",)].size == pytest.approx(6 / 2)
    assert got[("start",), ("real",)].size == pytest.approx(-3 + 4 / 2)
    assert got[("start",), ("model",)].size == pytest.approx(0)
    assert got[("noise",), ("1",)].size == pytest.approx(0.5)
    assert got[("flip", "start"), ("yes", "real")].size == pytest.approx(4)
    assert got[("flip", "start"), ("yes", "model")].size == pytest.approx(0, abs=1e-9)
    assert got[("flip", "loss"), ("yes", "l2")].size == pytest.approx(6)
    assert got[("start", "noise"), ("real", "1")].size == pytest.approx(0, abs=1e-9)
    assert all(effect.high - effect.low < 1e-9 for effect in got.values())


def test_a_balanced_table_compares_plain_means() -> None:
    frame = table()
    frame["y"] = np.random.default_rng(1).normal(size=len(frame))
    got = found(frame)
    means = frame.groupby("start")["y"].mean()
    assert got[("start",), ("model",)].size == pytest.approx(means["model"] - means["means"])
    cells = frame.groupby(["flip", "noise"])["y"].mean()
    both = cells["yes", "1"] - cells["yes", "0"] - cells["no", "1"] + cells["no", "0"]
    assert got[("flip", "noise"), ("yes", "1")].size == pytest.approx(both)


def test_intervals_cover_and_networks_are_judged_by_networks() -> None:
    """Networks differ by 1, sets by 0.2: 95 % of the intervals hold the truth, of both kinds."""
    random, frame, repeats = np.random.default_rng(2), table(), 400
    names = sorted(set(frame["network"]))
    inside = {("flip",): 0, ("start",): 0, ("flip", "start"): 0}
    widths = dict.fromkeys(inside, 0.0)
    for _ in range(repeats):
        own = dict(zip(names, random.normal(size=len(names)), strict=True))
        frame["y"] = frame["network"].map(own) + random.normal(size=len(frame), scale=0.2)
        got = found(frame)
        for (factors, levels), effect in got.items():
            if factors in inside and levels[-1] in ("yes", "real"):
                inside[factors] += effect.low <= 0 <= effect.high
                widths[factors] += (effect.high - effect.low) / repeats
    error = 4 * (0.95 * 0.05 / repeats) ** 0.5
    assert all(abs(count / repeats - 0.95) < error for count in inside.values()), inside
    assert widths["flip",] > 5 * widths["start",]


def test_what_cannot_be_told_apart_is_refused() -> None:
    frame = table()
    frame["y"] = 0.0
    aliased = frame[(frame["start"] == "means") == (frame["noise"] == "0")]
    with pytest.raises(ValueError, match="cannot tell"):
        found(aliased)
    with pytest.raises(ValueError, match="leave nothing to judge"):
        found(frame[frame["network"].str.endswith("0")])
    frame.loc[0, "start"] = "elsewhere"
    with pytest.raises(ValueError, match="start has levels .'elsewhere'.: allowed are"):
        found(frame)
