"""What the benchmarks compare computes the same; what they print is what was measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import report
import table1_runs
import timing
import torch
from plain import PlainTraining, PlainUNet, SequentialBlur, plain_restorer, plain_sample
from timing import Result, interleaved, row
from tracked_runs import fresh_store
from training_step import counted

from analysis import table1
from colddiff.batches import batches
from colddiff.config import RunConfig
from colddiff.degradation import Blur, build_degradation
from colddiff.diffusion import sample_algorithm2
from colddiff.machine import git_sha
from colddiff.presets import preset
from colddiff.ranks import ALONE, Group
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder
from colddiff.trainer import Trainer
from colddiff.unet import load_reference_state_dict

CPU = torch.device("cpu")


def small(name: str) -> RunConfig:
    """A preset with a small network, in float32, as the benchmarks train it."""
    config = preset(name)
    training = dataclasses.replace(
        config.training,
        batch_size=8,
        accumulation=1,
        ema_every=1,
        ema_start=0,
        precision="float32",
        device="cpu",
    )
    return dataclasses.replace(
        config,
        data=preset("demo").data,
        degradation=dataclasses.replace(config.degradation, T=6),
        evaluation=dataclasses.replace(config.evaluation, levels=()),
        model=dataclasses.replace(config.model, dim=8, mults=(1, 2)),
        training=training,
    )


@pytest.mark.parametrize("name", ["mnist", "mnist-paper"])
def test_the_plain_loop_trains_the_same_network(tmp_path: Path, name: str) -> None:
    config = small(name)
    trainer = Trainer(RunFolder.create(tmp_path, config), config, Group(ALONE, CPU))
    plain = PlainTraining(config, trainer.restorer, trainer.order)
    # The Wiener estimate magnifies the walk's rounding, which is no matter of the loop.
    plain.inputs.degradation = trainer.degradation
    before = copy.deepcopy(trainer.restorer.state_dict())
    ours, theirs = (
        batches(trainer.images, config.data, trainer.order, 0, CPU, 0) for _ in range(2)
    )
    expected = [plain.step(next(theirs)) for _ in range(3)]
    sums = [trainer.interval.sums[0].clone()]
    for _ in range(3):
        trainer.train_step(ours)
        sums.append(trainer.interval.sums[0].clone())
    losses = torch.stack(sums).diff()
    torch.testing.assert_close(losses, torch.tensor(expected).double(), rtol=1e-3, atol=0)

    unet = copy.deepcopy(trainer.restorer.unet)
    assert isinstance(plain.restorer.unet, PlainUNet)
    load_reference_state_dict(unet, plain.restorer.unet.inner.state_dict())  # type: ignore[arg-type]
    trained = trainer.restorer.unet.state_dict()
    apart, moved = [], []
    for key, value in unet.state_dict().items():
        apart.append((value - trained[key]).norm())
        moved.append((value - before[f"unet.{key}"]).norm())
        # Adam divides by the gradient's size: where that is small, rounding moves a weight too.
        assert apart[-1] <= 0.3 * moved[-1] + 1e-6, key
    assert torch.stack(apart).norm() <= 0.05 * torch.stack(moved).norm()


def test_the_plain_sampler_is_algorithm_2() -> None:
    config = small("mnist")
    restorer = build_restorer(config).eval()
    plain = plain_restorer(config, restorer).eval()
    blur, sequential = Blur(config.degradation, 32), SequentialBlur(config.degradation, 1)
    xT = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        ours = sample_algorithm2(restorer, blur, xT)
    theirs = plain_sample(plain, sequential, xT)
    assert float((ours - xT).abs().max()) > 0.05  # something happened
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)


def test_the_sequential_blur_is_the_degradation() -> None:
    config = small("mnist").degradation
    x0 = 2 * torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
    t = torch.arange(7)
    closed = build_degradation(config, 32)
    assert isinstance(closed, Blur)
    torch.testing.assert_close(SequentialBlur(config, 1)(x0, t), closed(x0, t), rtol=0, atol=1e-6)


def test_interleaved_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order, clock = [], [0.0]

    def slow() -> None:
        order.append("slow")
        clock[0] += 100.0 if order.count("slow") == 3 else 2.0  # one outlier of three

    def short() -> None:
        clock[0] += 0.01 if "short" in order else 0.9  # its first call is cold
        order.append("short")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    slow_s, short_s = interleaved(slow, short, seconds=0, repeats=3)
    turns = [(name, len(list(calls))) for name, calls in itertools.groupby(order)]
    assert turns == [("slow", 1), ("short", 2), *[("slow", 1), ("short", 5)] * 3]
    assert (slow_s, short_s) == pytest.approx((2.0, 0.01))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Result("a", 2.5, 2.0, "1 s"), "| a | 2.5 | 2 | 1 s |"),
        (Result("a", 1.5, 2.0, "1 s"), "| a | 1.5 | 2 (missed) | 1 s |"),
        (Result("a", 0.1234, 0, "1 s"), "| a | 0.123 |  | 1 s |"),
    ],
)
def test_a_row_says_what_was_missed(result: Result, expected: str) -> None:
    assert row(result) == expected


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_of_a_convolution_are_counted_three_times(groups: int, transposed: bool) -> None:
    """Once forward, once for each gradient; and as often as there are multiplications to do."""
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(16, 8, 3, padding=1, groups=groups, bias=False)
    x = torch.rand(4, 16, 5, 6, requires_grad=True)
    with counted() as forward:
        out = layer(x)
    assert forward.get_total_flops() == 2 * 4 * (5 * 6) * (16 * 8 // groups) * 3 * 3
    with counted() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_report_has_every_result_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good() -> Iterator[Result]:
        yield Result("quick", 3.0, 2.0, "1 s, plain 3 s")
        yield Result("start", 0, 0, "4 s")

    def bad() -> Iterator[Result]:
        yield Result("slow", 1.5, 2.0, "1 s, plain 1.5 s")
        raise RuntimeError("no disk")

    monkeypatch.setattr(report, "BENCHMARKS", {"bad": bad, "good": good})
    with pytest.raises(SystemExit, match="1"):
        report.main(folder=tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["ratios"] == {"slow": 1.5, "quick": 3.0}
    assert written["measured"]["start"] == "4 s"
    assert written["failures"] == {"bad": "RuntimeError: no disk"}
    assert (written["commit"], written["machine"]) == (git_sha(), report.machine())
    page = (tmp_path / "REPORT.md").read_text()
    assert "| slow | 1.5 | 2 (missed) | 1 s, plain 1.5 s |" in page
    assert "| start |  |  | 4 s |" in page
    assert "Stopped: RuntimeError: no disk" in page
    for only, folder in (("good", None), ("none", tmp_path)):
        with pytest.raises(SystemExit, match="2"):
            report.main(only, folder)
    assert capsys.readouterr().err.count("error: --only") == 2


def test_the_table_of_made_up_runs_has_their_numbers(tmp_path: Path) -> None:
    runs = table1_runs.configs(12)
    assert len({config.run_id for config in runs}) == 12
    uri = fresh_store(tmp_path)
    assert table1_runs.fill(uri, tmp_path, runs) > 12 * 50
    words = ["--experiment", table1_runs.EXPERIMENT, "--tracking-uri", uri]
    assert table1.main([*words, "--out", str(tmp_path)]) == 0
    file = tmp_path / "table1.csv"
    assert table1_runs.check(file, runs) > 20
    file.write_text(file.read_text().replace("0.1", "0.2"))
    with pytest.raises(RuntimeError, match="went in"):
        table1_runs.check(file, runs)
