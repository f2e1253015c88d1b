"""A profile is of the steps it names, and nothing that is computed differs for it."""

from __future__ import annotations

import gc
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from run_comparison import assert_identical
from test_training import StopAt
from tiny import changed, replaced, tiny
from tracked_runs import fresh_store

from colddiff.interruption import Interrupted
from colddiff.run_folder import RunFolder
from colddiff.training import train
from jobs.launch import main
from jobs.status import find_runs
from jobs.tasks import TrainTask

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def annotations(folder: RunFolder) -> Counter[str]:
    """How often each named stretch is in the trace, steps under one name."""
    with gzip.open(folder.profile_trace) as file:
        events = json.load(file)["traceEvents"]
    found = (e["name"] for e in events if e.get("cat") == "user_annotation")
    return Counter(re.sub(r"#\d+", "", name) for name in found)


def steps_of(folder: RunFolder) -> tuple[int, int]:
    """First and last step that the table names."""
    found = re.match(r"steps (\d+) to (\d+) on cpu", folder.profile_table.read_text())
    assert found
    return int(found[1]), int(found[2])


def rows(folder: RunFolder) -> list[list[str]]:
    """The table's operators: name, share, self time, …, number of calls."""
    lines = folder.profile_table.read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("---")]
    return [re.split(r"\s{2,}", line.strip()) for line in lines[rules[1] + 1 : rules[2]]]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def test_a_profiled_run_is_the_same_and_the_profile_has_the_wanted_steps(tmp_path: Path) -> None:
    config = tiny(steps=16, own_states=0.5, keep_every=8)
    profiled, plain = (RunFolder.create(tmp_path / name, config) for name in "ab")
    kept: dict[int, int] = {}

    def report(step: int, _: object) -> None:
        gc.collect()  # a profiler is part of a cycle
        profilers = [each for each in gc.get_objects() if type(each) is torch.profiler.profile]
        kept[step] = len(profilers)
        assert torch.autograd._profiler_enabled() == (step == 8)

    train(profiled, profile_steps=4, report=report)
    train(plain)
    assert_identical(profiled, plain)
    assert not plain.profile_table.parent.exists()
    assert steps_of(profiled) == (6, 9)
    found = annotations(profiled)
    assert found["ProfilerStep"] == 4
    assert found["Optimizer.step#Adam.step"] == 4
    assert kept[8] == 1 and kept[12] == kept[16] == 0  # what was recorded is in memory no more
    assert sorted(p.name for p in profiled.profile_table.parent.iterdir()) == [
        "operators.txt",
        "trace.json.gz",
    ]
    table = rows(profiled)
    assert len(table) == 25
    times = [seconds(row[2]) for row in table]
    assert times == sorted(times, reverse=True) and times[0] > 0
    calls = {row[0]: int(row[-1]) for row in table}
    assert calls["ProfilerStep*"] == 4
    assert calls["aten::mkldnn_convolution"] % 4 == 0


@pytest.mark.parametrize(
    ("steps", "wanted", "expected"),
    [(8, 20, (6, 8)), (6, 20, (6, 6)), (7, 1, (6, 6)), (3, 20, (3, 3)), (1, 20, (1, 1))],
)
def test_where_few_steps_are_left_it_profiles_these(
    tmp_path: Path, steps: int, wanted: int, expected: tuple[int, int]
) -> None:
    sections = {"training": {"steps": steps, "validate_every": 0}, "optimiser": {"warmup_steps": 0}}
    folder = RunFolder.create(tmp_path, changed(tiny(), sections))
    train(folder, profile_steps=wanted)
    assert steps_of(folder) == expected
    assert annotations(folder)["ProfilerStep"] == expected[1] - expected[0] + 1


def test_a_resumed_run_is_profiled_after_that_and_an_interrupted_one_not(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", tiny())
    with pytest.raises(Interrupted):
        train(folder, stop=StopAt(8), profile_steps=10)  # in the midst of what it records
    assert not torch.autograd._profiler_enabled()
    assert not folder.profile_table.exists() and not folder.profile_trace.exists()
    train(folder, profile_steps=3)
    assert steps_of(folder) == (14, 16)
    assert annotations(folder)["Optimizer.step#Adam.step"] == 3
    plain = RunFolder.create(tmp_path / "b", tiny())
    train(plain)
    assert_identical(folder, plain)


def test_a_requeued_job_profiles_only_where_that_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done, undone = (RunFolder.create(tmp_path / name, tiny(steps=8)) for name in "ab")
    done.profile_table.parent.mkdir()
    done.profile_table.write_text("before the requeueing")
    for folder in (done, undone):
        TrainTask(str(folder.path), evaluate=False, profile_steps=2)()
    assert done.profile_table.read_text() == "before the requeueing"
    assert steps_of(undone) == (6, 7)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = replaced(tiny(steps=9, validate_every=0), "evaluation", samples=20, images=12)
    (tmp_path / "tiny.json").write_text(config.to_json())
    return tmp_path


def launch(*words: str) -> int:
    return main(["train", "--config", "tiny.json", "--no-evaluate", "--cluster", "debug", *words])


def test_the_first_run_that_trains_is_profiled_and_mlflow_gets_it(place: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(fresh_store(place))
    assert launch("--seeds", "0") == 0
    assert launch("--seeds", "0", "1", "2", "--profile-steps", "3") == 0
    by_seed = {f.config.training.seed: f for f in find_runs(place / "runs", ())}
    assert {seed: f.profile_table.exists() for seed, f in by_seed.items()} == {
        0: False,
        1: True,
        2: False,
    }
    assert steps_of(by_seed[1]) == (6, 8)
    tracked = {run.info.run_name: run.info.run_id for run in client.search_runs(["1"])}
    artifacts = {
        seed: [item.path for item in client.list_artifacts(tracked[f.path.name], "profile")]
        for seed, f in by_seed.items()
    }
    assert artifacts == {0: [], 1: ["profile/operators.txt", "profile/trace.json.gz"], 2: []}
    local = client.download_artifacts(tracked[by_seed[1].path.name], "profile/trace.json.gz")
    assert Path(local).read_bytes() == by_seed[1].profile_trace.read_bytes()


@pytest.mark.parametrize("steps", ["-1", "1001"])
def test_other_numbers_of_steps_are_refused_before_anything_is_made(
    place: Path, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    assert launch("--profile-steps", steps) == 2
    said = capsys.readouterr().err
    assert said == f"error: --profile-steps = {steps} is not allowed: it must be in 0..1000\n"
    assert [path.name for path in place.iterdir()] == ["tiny.json"]
