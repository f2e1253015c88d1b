"""Plan files: which runs they mean, and what is refused before anything is made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tracked_runs import fresh_store

from colddiff.presets import preset
from colddiff.run_folder import RunFolder
from jobs.launch import main
from jobs.plan_file import REPORTS, read_plan

PLAN = """
reports = ["table1", "information_floor"]

[[runs]]
preset = "demo"
seeds = [0, 3]

[[runs]]
preset = "demo"
name = "demo-T40"
set = { "degradation.T" = 40, "evaluation.levels" = ["40-20-0"], "model.mults" = [1, 2] }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_a_plan_is_its_presets_with_changes(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, PLAN))
    demo = preset("demo")
    blur = dataclasses.replace(demo.degradation, T=40)
    assert plan.reports == ("table1", "information_floor")
    assert plan.runs == (
        demo,
        dataclasses.replace(demo, training=dataclasses.replace(demo.training, seed=3)),
        dataclasses.replace(
            demo,
            preset="demo-T40",
            degradation=blur,
            model=dataclasses.replace(demo.model, mults=(1, 2)),
            evaluation=dataclasses.replace(demo.evaluation, levels=("40-20-0",)),
        ),
    )


def test_without_a_name_a_changed_preset_says_so(tmp_path: Path) -> None:
    text = '[[runs]]\npreset = "demo"\nset = { "training.steps" = 70 }'
    plan = read_plan(written(tmp_path, text))
    assert [config.preset for config in plan.runs] == ["demo (changed)"]
    assert plan.reports == REPORTS


def test_a_configuration_file_is_found_beside_the_plan(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("mnist"), preset="mine")
    (tmp_path / "mine.json").write_text(config.to_json())
    plan = read_plan(written(tmp_path, '[[runs]]\nconfig = "mine.json"\nseeds = [5]'))
    assert plan.runs[0].training.seed == 5
    assert plan.runs[0].model == config.model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no [[runs]]"),
        ("runs = [", "plan.toml: "),
        ("[[run]]\npreset = 'demo'", "unknown entry 'run'. Did you mean 'runs'?"),
        ("[[runs]]\npresset = 'demo'", "runs 1: unknown entry 'presset'. Did you mean 'preset'?"),
        ("[[runs]]\nseeds = [1]", "runs 1: it must have either preset or config"),
        ("[[runs]]\npreset = 'demp'", "Did you mean 'demo'?"),
        ("[[runs]]\nconfig = 'gone.json'", "gone.json' is no file"),
        ("[[runs]]\npreset = 'demo'\nset = { T = 4 }", "unknown setting 'T'"),
        ("[[runs]]\npreset = 'demo'\nset = { 'degradation.S' = 4 }", "'degradation.S'"),
        ("[[runs]]\npreset = 'demo'\nset = { 'degradation.T' = 0 }", "degradation.T = 0"),
        ("[[runs]]\npreset = 'demo'\nset = 7", "set = 7 is not allowed"),
        ("[[runs]]\npreset = 'demo'\nseeds = []", "seeds = [] is not allowed"),
        ("[[runs]]\npreset = 'demo'\nseeds = [-1]", "training.seed = -1"),
        ("[[runs]]\npreset = 'demo'\nname = ''", "name = '' is not allowed"),
        ("[[runs]]\npreset = 'demo'\nseeds = [1, 1]", "seed1-"),
        ("[[runs]]\npreset = 'demo'\ngenerate = 7", "generate = 7 is not allowed"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [7]", "generation 1 = 7 must be an object"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [{ m = 7 }]", "unknown field 'generation 1.m'"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [{ n = 0 }]", "generation.n = 0"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [{ levels = '9-0' }]", "falling from T = 20"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [{ algorithm = 'ddim' }]", "'ddim'"),
        ("[[runs]]\npreset = 'demo'\ngenerate = [{ weights = 'raw' }]", "weights = 'raw'"),
        ("[[runs]]\npreset = 'demo'\ngenerate = 'a'\n[generate]\nab = []", "Did you mean 'ab'?"),
        ("generate = 'a'\n[[runs]]\npreset = 'demo'", "generate = 'a' is not allowed"),
        ("reports = ['table9']\n[[runs]]\npreset = 'demo'", "reports = ['table9']"),
    ],
)
def test_bad_plans_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = written(tmp_path, text)
    runs = tmp_path / "runs"
    assert main(["train", "--plan", str(path), "--runs", str(runs)]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "plan.toml" in message
    assert len(message.strip().splitlines()) == 1
    assert not runs.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "demo"],
        ["--training.steps", "3"],
        ["--degradation.T=3"],
        ["--seeds", "1"],
    ],
)
def test_a_plan_has_all_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    path = written(tmp_path, PLAN)
    assert main(["train", "--plan", str(path), *options]) == 2
    assert "not allowed with --plan" in capsys.readouterr().err
    assert main(["train", "--plan", str(tmp_path / "none.toml")]) == 2
    assert "none.toml' is no file" in capsys.readouterr().err


def test_train_makes_the_runs_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {
        "training.steps": 2,
        "training.batch_size": 4,
        "optimiser.warmup_steps": 0,
        "data.validation": 0,
        "model.dim": 4,
        "degradation.T": 4,
        "evaluation.levels": ["4-0"],
        "evaluation.samples": 4,
    }
    # JSON's texts, numbers and lists are TOML's.
    settings = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in quick.items())
    last = ', "training.levels" = "last"'
    text = f"""
[[runs]]
preset = "demo"
name = "all"
seeds = [0, 1]
set = {{ {settings}, "training.keep_every" = 1 }}
generate = "sets"
[[runs]]
preset = "demo"
name = "directly"
set = {{ {settings}{last} }}
"""
    sets = "[generate]\nsets = [{ n = 2 }, { n = 2, step = 1, weights = 'raw', start = 'real' }]"
    path, runs = written(tmp_path, text + sets), tmp_path / "runs"
    uri = fresh_store(tmp_path)
    common = ["--plan", str(path), "--runs", str(runs), "--tracking-uri", uri]
    assert main(["train", *common, "--cluster", "debug"]) == 0
    folders = [RunFolder(runs / config.run_id) for config in read_plan(path).runs]
    assert [folder.is_trained for folder in folders] == [True] * 3
    kinds = [set(json.loads(folder.evaluation.read_text())["kinds"]) for folder in folders]
    both = {"degraded", "direct", "sampled", "sampled_algorithm1", "sampled[4-0]"}
    assert kinds == [both, both, {"degraded", "direct"}]
    made = [sorted(path.stem for path in folder.samples.glob("*.json")) for folder in folders]
    names = ["generated-means1-noise0.002-algorithm2-seed0-n2"]
    names += ["generated-real-noise0.002-algorithm2-raw-step1-seed0-n2"]
    assert made == [names, names, []]
    times = [path.stat().st_mtime_ns for path in sorted(runs.glob("*/samples/generated-*"))]
    capsys.readouterr()
    assert main(["train", *common, "--cluster", "debug"]) == 0  # nothing is made twice
    assert times == [path.stat().st_mtime_ns for path in sorted(runs.glob("*/samples/generated-*"))]
    assert capsys.readouterr().out.count("complete") == 3
    next(runs.glob("*/samples/generated-means1*.json")).unlink()
    assert main(["train", *common, "--cluster", "debug"]) == 0
    assert len(list(runs.glob("*/samples/generated-means1*.json"))) == 2
