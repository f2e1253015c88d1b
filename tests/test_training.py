from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import replaced, tiny

from colddiff.batches import batches, to_batch
from colddiff.checkpoint import checkpoints, load_checkpoint
from colddiff.config import OptimiserConfig, RunConfig
from colddiff.data import load_images, split_validation
from colddiff.diffusion import restore_directly
from colddiff.files import write_json
from colddiff.interruption import Interrupted
from colddiff.journal import read_records
from colddiff.metrics import rmse, ssim
from colddiff.optimisation import Interval, learning_rate, resolve_device
from colddiff.ranks import ALONE, Group
from colddiff.run_folder import RunFolder
from colddiff.trainer import NonFiniteError, Trainer
from colddiff.training import train


class StopAt:
    """Asks to stop once ``trainer_steps`` boundaries were passed."""

    def __init__(self, boundaries: int) -> None:
        self.left = boundaries

    @property
    def signum(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None


def new_trainer(tmp_path: Path, config: RunConfig) -> Trainer:
    return resumed(RunFolder.create(tmp_path, config))


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def costs(self, seconds: float, work: Any) -> Any:
        def working(*values: Any, **named: Any) -> Any:
            self.now += seconds
            return work(*values, **named)

        return working


def test_speed_is_of_training_steps_and_of_a_device_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 s a step and 2 s that the device is behind at each record; pauses are no part of it."""
    clock = Clock()
    monkeypatch.setattr("colddiff.trainer.time", clock)
    costs = {"train_step": 1, "check_finite": 2, "validate": 100, "keep_weights": 50}
    for name, seconds in costs.items():
        monkeypatch.setattr(Trainer, name, clock.costs(seconds, getattr(Trainer, name)))
    config = tiny(steps=12, log_every=6, validate_every=4, keep_every=3, checkpoint_every=50)
    folder = RunFolder.create(tmp_path, config)
    train(folder)
    name = "speed/images_per_second"
    records, _ = read_records(folder.journal)
    speeds = {r.step: r.metrics[name] for r in records if name in r.metrics}
    assert speeds == {6: pytest.approx(8 * 6 / (6 + 2)), 12: pytest.approx(8 * 6 / (6 + 2))}


def resumed(folder: RunFolder) -> Trainer:
    return Trainer(folder, folder.config, Group(ALONE, torch.device("cpu")))


def test_learning_rate_warms_up_then_follows_half_a_cosine() -> None:
    config = OptimiserConfig(lr=0.1, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == 0.1
    assert rates[8] == pytest.approx(0.05)  # half way down
    assert rates[11] == pytest.approx(0.1 * (1 + math.cos(math.pi * 7 / 8)) / 2)
    constant = OptimiserConfig(lr=0.1, warmup_steps=2)
    assert [learning_rate(constant, step, 9) for step in (0, 1, 2, 8)] == [0.05, 0.1, 0.1, 0.1]


def test_average_follows_the_authors_rule(tmp_path: Path) -> None:
    """A copy at every second step before step 6, then 0.9 old + 0.1 new, nothing in between."""
    trainer = new_trainer(tmp_path, tiny())
    name = "unet.final.bias"
    weights = dict(trainer.restorer.named_parameters())[name]
    expected = weights.detach().clone()
    for step in range(12):
        trainer.step = step
        with torch.no_grad():
            weights.copy_(torch.full_like(weights, float(step * step)))
        if step % 2 == 0:
            expected = weights.clone() if step < 6 else 0.9 * expected + 0.1 * weights
        trainer._update_average()
        averaged = dict(trainer.average.module.named_parameters())[name]
        torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=0)


def test_accumulation_is_the_gradient_of_the_large_batch(tmp_path: Path) -> None:
    """One step over 2 x 8 images equals one over 16: data order, levels and flips included."""
    updated = []
    for batch, accumulation in ((16, 1), (8, 2)):
        config = replaced(tiny(batch_size=batch, accumulation=accumulation), "data", flip=False)
        config = replaced(config, "data", preparation="resize")
        trainer = new_trainer(tmp_path / str(batch), config)
        # The levels are drawn a micro-batch, so equal levels need one fixed level: T = 1.
        config = replaced(config, "degradation", T=1)
        trainer = new_trainer(tmp_path / f"{batch}-T1", config)
        train_steps(trainer, 1)
        updated.append([p.detach().clone() for p in trainer.restorer.parameters()])
    for large, accumulated in zip(*updated, strict=True):
        torch.testing.assert_close(large, accumulated, rtol=1e-4, atol=2e-5)


def train_steps(trainer: Trainer, steps: int) -> None:
    stream = batches(trainer.images, trainer.config.data, trainer.order, 0, trainer.device, 0)
    for _ in range(steps):
        trainer.train_step(stream)


def test_clipping_bounds_the_update_and_records_the_norm_before_it(tmp_path: Path) -> None:
    config = replaced(tiny(), "optimiser", clip_norm=1e-3)
    trainer = new_trainer(tmp_path, config)
    for parameter in trainer.restorer.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in trainer.restorer.parameters())
    seen: list[float] = []

    def clipped(*_: object) -> None:
        grads = [p.grad for p in trainer.restorer.parameters() if p.grad is not None]
        seen.append(math.sqrt(sum(g.square().sum().item() for g in grads)))

    trainer.optimiser.register_step_pre_hook(clipped)
    norm = trainer._update()
    assert norm.item() == pytest.approx(math.sqrt(count), rel=1e-5)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_loss_goes_down_and_every_record_is_there(tmp_path: Path) -> None:
    config = tiny(steps=60)
    folder = RunFolder.create(tmp_path, config)
    reported: list[int] = []
    train(folder, report=lambda step, metrics: reported.append(step))
    records, _ = read_records(folder.journal)
    losses = {r.step: r.metrics["train/loss"] for r in records if "train/loss" in r.metrics}
    assert list(losses) == list(range(4, 61, 4))
    assert losses[60] < 0.6 * losses[4]
    validated = [r.step for r in records if "validation/rmse" in r.metrics]
    assert validated == [10, 20, 30, 40, 50, 60]
    assert sorted(reported) == sorted(r.step for r in records)
    assert folder.is_trained
    status = folder.status()
    assert status is not None and (status.state, status.step) == ("finished", 60)
    assert [p.name for p in checkpoints(folder.checkpoints)] == [
        "step-00000056.pt",
        "step-00000060.pt",
    ]


def test_recorded_loss_is_the_mean_of_the_steps_since_the_last_record(tmp_path: Path) -> None:
    config = tiny(steps=8, log_every=4, validate_every=0)
    every = RunFolder.create(tmp_path / "a", tiny(steps=8, log_every=1, validate_every=0))
    fourth = RunFolder.create(tmp_path / "b", config)
    train(every)
    train(fourth)
    single = [r.metrics["train/loss"] for r in read_records(every.journal)[0]]
    means = [r.metrics["train/loss"] for r in read_records(fourth.journal)[0]]
    assert means == pytest.approx([sum(single[:4]) / 4, sum(single[4:]) / 4], rel=1e-6)


def test_validation_measures_the_averaged_weights_on_images_kept_back(tmp_path: Path) -> None:
    config = tiny(steps=10)
    folder = RunFolder.create(tmp_path, config)
    train(folder)
    trainer = resumed(folder)  # at the end
    assert trainer.validation is not None
    x0 = to_batch(trainer.validation.pixels, config.data)
    with torch.no_grad():
        xT = trainer.degradation.terminal(x0)
        x0_hat = restore_directly(trainer.average.module, xT, 4).clamp(-1, 1)
    last = read_records(folder.journal)[0][-1].metrics
    assert last["validation/rmse"] == pytest.approx(rmse(x0_hat, x0), rel=1e-5)
    assert last["validation/ssim"] == pytest.approx(ssim(x0_hat, x0), rel=1e-4)
    assert trainer.journal is not None
    trainer.journal.close()


def test_validation_images_are_never_trained_on() -> None:
    config = tiny()
    images = load_images(config.data, "train")
    kept, back = split_validation(images, 16, 8)
    assert back is not None
    assert len(kept) + len(back) == len(images) == 4000
    pixels = [image.numpy().tobytes() for image in kept.take(torch.arange(len(kept)))]
    held = {image.numpy().tobytes() for image in back.pixels}
    everything = [image.numpy().tobytes() for image in images.take(torch.arange(4000))]
    # As multisets, because two digits might be drawn alike.
    assert sorted(pixels + [image.numpy().tobytes() for image in back.pixels]) == sorted(everything)
    assert len(held) == 16
    with pytest.raises(ValueError, match=r"data.validation = 3999"):
        split_validation(images, 3999, 8)


def test_a_stop_request_saves_at_the_step_boundary(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    with pytest.raises(Interrupted, match="SIGTERM at step 5"):
        train(folder, stop=StopAt(5))
    status = folder.status()
    assert status is not None and (status.state, status.step) == ("interrupted", 5)
    state = load_checkpoint(folder.checkpoints, torch.device("cpu"))
    assert state is not None and state["step"] == 5
    assert not folder.is_trained
    train(folder)
    assert folder.is_trained


def test_a_signal_during_the_last_step_stops_what_would_follow(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    with pytest.raises(Interrupted, match="at step 30"):
        train(folder, stop=StopAt(31))
    assert folder.is_trained


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, tiny())
    with pytest.raises(Interrupted):
        train(folder, stop=StopAt(5))
    record = json.loads(folder.environment.read_text())
    write_json(folder.environment, record | {"data_sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"trained to step 5 on other data.*000000000000, now"):
        train(folder)


def test_what_the_blur_leaves_is_recorded_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replaced(tiny(steps=4, validate_every=0), "degradation", T=80, kernel_size=15)
    folder = RunFolder.create(tmp_path, config)
    train(folder)
    rows = json.loads(folder.schedule.read_text())
    assert [row["t"] for row in rows] == list(range(81))
    assert not rows[-1]["above_float32"]
    assert "x_T is the image's mean and no more" in caplog.text


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault strikes at step 9: the checkpoint of step 7 must stay, none may follow."""
    config = tiny(log_every=50)
    folder = RunFolder.create(tmp_path, config)
    original = Trainer.train_step

    def poisoned(self: Trainer, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        if self.step == 9:
            with torch.no_grad():
                next(self.restorer.parameters()).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"not finite within steps 1\.\.14"):
        train(folder)
    assert [p.name for p in checkpoints(folder.checkpoints)] == ["step-00000007.pt"]
    status = folder.status()
    assert status is not None and status.state == "failed" and "not finite" in status.message
    monkeypatch.undo()
    train(folder)
    assert folder.is_trained


def test_ranks_resume_their_own_sums_and_another_number_of_ranks_the_mean() -> None:
    sums = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]], dtype=torch.float64)
    own = [Interval.resumed(sums, 5, rank, 3) for rank in range(3)]
    assert [interval.sums.tolist() for interval in own] == sums.tolist()
    fewer = [Interval.resumed(sums, 5, rank, 2) for rank in range(2)]
    assert [interval.sums.tolist() for interval in fewer] == [[3.0, 30.0]] * 2
    assert {interval.steps for interval in own + fewer} == {5}
    own[0].add(torch.tensor(1.0), torch.tensor(1.0))
    assert own[0].sums.tolist() == [2.0, 11.0] and sums[0, 0] == 1


def test_report_may_stop_the_run(tmp_path: Path) -> None:
    class PrunedError(Exception):
        pass

    def report(step: int, _: object) -> None:
        if step >= 8:
            raise PrunedError

    folder = RunFolder.create(tmp_path, tiny())
    with pytest.raises(PrunedError):
        train(folder, report=report)
    assert not folder.is_trained


def test_hot_diffusion_and_bfloat16_and_compilation_off_train_too(tmp_path: Path) -> None:
    config = replaced(tiny(steps=4, precision="bfloat16"), "degradation", kind="noise")
    folder = RunFolder.create(tmp_path, config)
    train(folder)
    records, _ = read_records(folder.journal)
    assert math.isfinite(records[-1].metrics["validation/rmse"])


def test_asking_for_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"
    else:
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="no CUDA device"):
            resolve_device("cuda")
