"""The collapse study from MLflow runs whose measures are made up, so that answers are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked_runs import EXPERIMENT, Store, error_line

from analysis import collapse_data
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

    def network(
        self,
        places: tuple[int, int, int],
        seed: int,
        sets: list[dict[str, Any]],
        name: str = "",
        **other: Any,
    ) -> None:
        """One of the design's, or with a name and ``other`` parameters one beside it."""
        training, params = {}, dict(PARAMS)
        for (factor, levels), place in zip(TRAINING.items(), places, strict=True):
            training[factor] = list(levels)[place]
            params |= levels[training[factor]]
        beside, params = bool(name), params | other
        name = name or "-".join(map(str, places))
        mlflow_id = self.store.log(
            f"run-{name}-{seed}", preset=f"collapse-{name}", dataset="digits", seed=seed,
            metrics={"direct/rmse": 0.2}, params=params,
        )  # fmt: skip
        folder = self.folder / mlflow_id
        folder.mkdir()
        for change in sets:
            settings = GenerationConfig(**change)
            values = dataclasses.asdict(settings)
            levels = training | {f: sampling_level(f, values) for f in SAMPLING}
            zeros, blank = truth(levels, settings.step)
            measured = quality(zeros + beside, blank)
            if name == "hot":  # whose starts have no intensity
                measured["by_intensity"] = []
            record = {"settings": values, "quality": measured}
            path = folder / f"{settings.slug}.json"
            path.write_text(json.dumps(record))
            if settings.step == 0:
                np.savez(path.with_suffix(".npz"), images=np.zeros((20, 28, 28, 1), np.uint8))
        self.store.client.log_artifacts(mlflow_id, str(folder), "samples")


def fill(study: Study, seeds: Sequence[int]) -> None:
    """The networks of ``seeds`` with the sets of the design."""
    for flip, discrete, loss in itertools.product((0, 1), repeat=3):
        for seed in seeds:
            sets = samples_of(flip, discrete, loss, seed)
            if (flip, discrete, loss) in ((0, 0, 0), (1, 1, 0)):
                extremes = [{"n": N}, {"n": N} | CURE]
                sets += [each for each in extremes if each not in sets]
                sets += [each | {"step": step} for each in extremes for step in (500, 1000)]
            study.network((flip, discrete, loss), seed, sets)
    hot = [{"n": N}, {"n": N, "algorithm": "ddpm"}]
    for seed in seeds:
        study.network((0, 0, 0), seed, hot, "hot", **{"degradation.kind": "noise"})
        study.network((0, 0, 0), seed, [{"n": N}], "T40", **{"degradation.T": 40})


def made(study: Study, *options: str) -> Path:
    """The folder of a study's results."""
    out = study.folder / "out"
    common = ["--experiment", EXPERIMENT, "--tracking-uri", study.store.uri, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse_data, "N", 200)  # real digits that are measured
        assert main([*common, *options]) == 0
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = Study(tmp_path_factory.mktemp("study"))
    fill(study, SEEDS)
    return made(study)


def test_the_summary_has_each_condition_and_the_true_effects(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    conditions = summary["conditions"]
    for each in conditions:
        zeros, blank = truth(each, each["step"])
        zeros += each["preset"] in ("collapse-hot", "collapse-T40")
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
    for name in ("before_and_after", "cells", "effects", "intensity", "training"):
        assert (results / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert "| 200 test digits " in text
    # The mean over the four starts: 1 + 3 / 2, 2 of flips, 4 of flips with Algorithm 1; halved.
    part = text.split("## By training and sampler")[1].split("## Effects")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:6]] for line in part.splitlines()]
    assert ["L1", "Algorithm 2, all", "8", "1.25", "0.0%"] in cells
    assert ["L1, flips", "Algorithm 1, 20-10-0", "8", "4.25", "0.0%"] in cells
    assert ["L2, flips, rounding", "Algorithm 2, all", "8", "2.25", "10.0%"] in cells
    # Hot diffusion and T = 40 (a zero more each) stand beside the plain network, and not in it.
    lines = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines()]
    assert ["without them, the paper's sampler", "2", "2,000", "2.00"] in lines
    assert ["hot diffusion, DDPM", "2", "2,000", "3.00"] in lines
    part = text.split("## Other networks")[1].split("## Effects")[0]
    rows = [line.split("|")[1:5] for line in part.splitlines() if line.startswith("| ")][2:]
    assert [(row[0].split(":")[0].strip(), row[1].split(";")[0].strip()) for row in rows] == [
        ("0-0-0", "Algorithm 2, all"),
        ("T40", "Algorithm 2, all"),
        ("hot", "Algorithm 2, fixed noise"),
        ("hot", "fresh noise (DDPM)"),
    ]
    curve = text.split("## Along training")[1]
    assert "plain training, the paper's sampler" in curve
    assert " 500 | " in curve and " 1500 | " in curve


def test_sets_of_runs_that_are_gone_count_as_tracked_ones_do(results: Path, tmp_path: Path) -> None:
    lines = (results / "sets.jsonl").read_text().splitlines(keepends=True)
    first = [line for line in lines if json.loads(line)["seed"] == 0]
    assert 0 < len(first) < len(lines)
    (tmp_path / "recorded.jsonl").write_text("".join(first))
    study = Study(tmp_path)
    fill(study, [1])
    out = made(study, "--recorded", str(tmp_path / "recorded.jsonl"))
    found, expected = (
        json.loads((folder / "summary.json").read_text()) for folder in (out, results)
    )
    assert found["conditions"] == expected["conditions"]
    sizes = [[effect["size"] for effect in each["effects"]] for each in (found, expected)]
    assert sizes[0] == pytest.approx(sizes[1], abs=1e-4)  # six digits are written
    # Written and read again, nothing is added, and nothing counts twice.
    again = made(study, "--recorded", str(out / "sets.jsonl"))
    assert json.loads((again / "summary.json").read_text())["conditions"] == found["conditions"]


def test_what_is_no_record_of_sets_is_one_line(
    results: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path)
    study.network((0, 0, 0), 0, samples_of(0, 0, 0, 0))
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    for name in ("other.jsonl", "missing.jsonl"):
        options = ["--experiment", EXPERIMENT, "--tracking-uri", study.store.uri]
        options += ["--out", str(tmp_path / "out"), "--recorded", str(tmp_path / name)]
        assert name in error_line(main, capsys, *options)


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
