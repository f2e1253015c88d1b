"""The collapse study from MLflow runs whose measures are made up, so that answers are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked_runs import EXPERIMENT, Store, error_line

from analysis import mode_collapse
from analysis.collapse_design import CURE, SAMPLING, SEEDS, TRAINING, N, samples_of
from analysis.collapse_table import sampling_level
from analysis.mode_collapse import main
from colddiff.config import GenerationConfig

PARAMS = {"data.name": "digits", "model.dim": 16, "training.steps": 1500}


def quality(zeros: float, blank: float) -> dict[str, Any]:
    """Of a set with ``zeros`` times its share of zeros and a share of blank images."""
    counts = [round(N * 0.1 * zeros), *([round(N * (1 - 0.1 * zeros) / 9)] * 9)]
    counts[-1] += N - sum(counts)
    ratios = [zeros, *([(1 - 0.1 * zeros) / 0.9] * 9)]
    rates = {"mirrored_rate": 0.01, "duplicate_rate": 0.0, "coverage": 0.8, "fid_digits": 2 * zeros}
    table = np.tile(np.array(counts) // 10, (10, 1)).tolist()
    return {
        "n": N, "counts": counts, "ratios": ratios, "blank_rate": blank, "by_intensity": table,
        "unreadable_rate": 2 * blank, "total_variation": 0.1 * abs(zeros - 1), **rates,
    }  # fmt: skip


def truth(levels: dict[str, str], step: int) -> tuple[float, float]:
    """Zeros and blank images of a setting: flips, a mean as start and early steps do harm."""
    zeros = 1 + 2 * (levels["flip"] == "yes") + 3 * levels["start"].startswith("mean")
    zeros += 4 * (levels["flip"] == "yes" and levels["algorithm"] == "1")
    zeros += 1 if 0 < step < 1000 else 0
    return float(zeros) / 2, 0.1 * (levels["discrete"] == "yes")


class Study:
    """A store with the study's networks and sets."""

    def __init__(self, folder: Path) -> None:
        self.store, self.folder = Store(folder), folder

    def network(self, places: tuple[int, int, int], seed: int, sets: list[dict[str, Any]]) -> None:
        training, params = {}, dict(PARAMS)
        for (factor, levels), place in zip(TRAINING.items(), places, strict=True):
            training[factor] = list(levels)[place]
            params |= levels[training[factor]]
        name = "-".join(map(str, places))
        mlflow_id = self.store.log(
            f"run-{name}-{seed}", preset=f"collapse-{name}", dataset="digits", seed=seed,
            metrics={"direct/rmse": 0.2}, params=params,
        )  # fmt: skip
        for change in sets:
            settings = GenerationConfig(**change)
            values = dataclasses.asdict(settings)
            levels = training | {f: sampling_level(f, values) for f in SAMPLING}
            record = {"settings": values, "quality": quality(*truth(levels, settings.step))}
            path = self.folder / f"{settings.slug}.json"
            path.write_text(json.dumps(record))
            self.store.add_file(mlflow_id, path, "samples")
            if settings.step == 0 and len(sets) > 16:
                np.savez(path.with_suffix(".npz"), images=np.zeros((20, 28, 28, 1), np.uint8))
                self.store.add_file(mlflow_id, path.with_suffix(".npz"), "samples")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study = Study(folder)
    for flip, discrete, loss in itertools.product((0, 1), repeat=3):
        for seed in SEEDS:
            sets = samples_of(flip, discrete, loss, seed)
            if (flip, discrete, loss) in ((0, 0, 0), (1, 1, 0)):
                extremes = [{"n": N}, {"n": N} | CURE]
                sets += [each for each in extremes if each not in sets]
                sets += [each | {"step": step} for each in extremes for step in (500, 1000)]
            study.network((flip, discrete, loss), seed, sets)
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mode_collapse, "N", 200)  # real digits that are measured
        options = ["--experiment", EXPERIMENT, "--tracking-uri", study.store.uri]
        assert main([*options, "--out", str(out)]) == 0
    return out


def test_the_summary_has_each_condition_and_the_true_effects(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    conditions = summary["conditions"]
    for each in conditions:
        zeros, blank = truth(each, each["step"])
        assert each["zero_ratio"] == pytest.approx(zeros)
        assert each["blank_rate"] == pytest.approx(blank)
        assert each["unreadable_rate"] == pytest.approx(2 * blank)
        assert each["tv_distance"] == pytest.approx(0.1 * abs(zeros - 1))
        assert each["fid_digits"] == pytest.approx(2 * zeros)
        assert each["samples"] == N * len(each["seeds"])
    seen = {len(each["seeds"]) for each in conditions}
    assert seen == {1, 2}  # weights differ with the seed in the factorial, extremes do not
    effects = {(e["measure"], *e["factors"], *e["levels"]): e["size"] for e in summary["effects"]}
    assert effects["zero_ratio", "flip", "yes"] == pytest.approx(1 + 4 / 4)
    assert effects["zero_ratio", "start", "real"] == pytest.approx(-1.5)
    assert effects["zero_ratio", "start", "mean, 10"] == pytest.approx(0, abs=1e-9)
    assert effects["zero_ratio", "flip", "algorithm", "yes", "1"] == pytest.approx(2)
    assert effects["blank_rate", "discrete", "yes"] == pytest.approx(0.1)
    assert effects["blank_rate", "loss", "l2"] == pytest.approx(0, abs=1e-9)


def test_the_page_leads_with_the_largest_cause(results: Path) -> None:
    text = (results / "mode_collapse.md").read_text()
    part = text.split("## Effects")[1].split("### Interactions")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")][1:]
    first = [row.split("|")[1].strip() for row in rows[1:4]]
    assert first[0] == "flip: yes"
    assert set(first[1:]) == {"start: real", "start: model"}
    assert "flip: yes x algorithm: 1" in text.split("### Interactions")[1]
    for name in ("before_and_after", "effects", "intensity", "training"):
        assert (results / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert "| 200 test digits " in text
    curve = text.split("## Along training")[1]
    assert "plain training, the paper's sampler" in curve
    assert " 500 | " in curve and " 1500 | " in curve


def test_real_digits_have_the_measures_floor(results: Path) -> None:
    floors = json.loads((results / "summary.json").read_text())["floors"]
    real, labels = floors["200 test digits"], floors["labels drawn at random"]
    assert real["blank_rate"] == 0
    assert real["unreadable_rate"] < 0.05
    assert real["tv_distance"] < 0.15
    assert labels["tv_distance"] < 0.15
    assert labels["zero_ratio"] == pytest.approx(1, abs=0.6)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_nothing_measured_is_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.log("a", metrics={"direct/rmse": 0.2})
    options = ["--experiment", EXPERIMENT, "--tracking-uri", store.uri, "--out", str(tmp_path)]
    assert "launch.py generate" in error_line(main, capsys, *options)
