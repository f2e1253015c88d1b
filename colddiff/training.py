"""The training loop: one process, resumable at any step, bit for bit.

Nothing random has a state (see :mod:`colddiff.randomness`), so weights, optimiser, average and the
running loss are all there is to save. The loop never waits for the device except where it logs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from colddiff.batches import Order, batches, to_batch
from colddiff.checkpoint import load_checkpoint, save_checkpoint, save_weights
from colddiff.config import RunConfig
from colddiff.data import TensorImages, load_images, split_validation
from colddiff.degradation import Degradation, Noise, build_degradation
from colddiff.diffusion import restoration_loss, restore_directly
from colddiff.interruption import Interrupted, StopRequest, StopSource
from colddiff.journal import Journal
from colddiff.machine import system_metrics
from colddiff.metrics import rmse, ssim
from colddiff.optimisation import Interval, build_optimiser, learning_rate, resolve_device
from colddiff.randomness import generator
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder
from colddiff.schedule_report import record_schedule

log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, float]], None]
"""``report(step, metrics)``: told every journal record; may raise to stop the run (pruning)."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the last checkpoint is good."""


def train(
    folder: RunFolder,
    *,
    stop: StopSource | None = None,
    report: Report | None = None,
    progress: bool = False,
) -> None:
    """Train the folder's configuration to its last step, from wherever it stands.

    Args:
        folder: the run; holds the configuration and receives everything.
        stop: asked at each step boundary; the state is saved before stopping.
        report: see :data:`Report`.
        progress: show a bar instead of one log line an interval, where there is a terminal.

    Raises:
        Interrupted: after a save, where ``stop`` asked for it.
        NonFiniteError: naming the step range; checkpoints before it are kept.
        ValueError: for data that is absent, or checkpoints that are all damaged.
    """
    steps, before = folder.config.training.steps, folder.status()
    step, trainer = (before.step if before else 0), None
    try:
        with StopRequest() if stop is None else nullcontext(stop) as request:
            trainer = Trainer(folder, folder.config)
            trainer.run(request, report, progress)
    except (Interrupted, KeyboardInterrupt) as interruption:
        step = trainer.step if trainer else step
        folder.write_status("interrupted", step, steps, str(interruption))
        raise
    except BaseException as error:
        step = trainer.step if trainer else step
        folder.write_status("failed", step, steps, f"{type(error).__name__}: {error}")
        raise
    finally:
        if trainer:
            trainer.journal.close()
    if request.signum is not None:  # it came during the last step: what follows must not start
        raise Interrupted(steps, request.signum)


class Trainer:
    """The state of one training run, and the operations on it."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.device = resolve_device(config.training.device)
        self.step = 0
        images, self.validation = split_validation(
            load_images(config.data, "train"), config.data.validation, config.training.batch_size
        )
        self.data_sha256 = images.checksum
        self.images = images.to(self.device) if isinstance(images, TensorImages) else images
        self.degradation = build_degradation(config.degradation, config.data.image_size)
        self.degradation.to(self.device)
        self.restorer = build_restorer(config).to(self.device)
        self.compiled: Any = self.restorer
        if config.training.compile:
            self.compiled = torch.compile(self.restorer)
        self.average = AveragedModel(
            self.restorer, multi_avg_fn=get_ema_multi_avg_fn(config.training.ema_decay)
        )
        self.optimiser = build_optimiser(config.optimiser, self.restorer)
        self.interval = Interval(torch.zeros(2, dtype=torch.float64, device=self.device))
        record_schedule(folder, config, self.images)
        self._resume()
        self.journal = Journal.open(folder.journal)

    def _resume(self) -> None:
        for torn in self.folder.checkpoints.glob(".*.tmp"):  # a killed save's
            torn.unlink()
        state = load_checkpoint(self.folder.checkpoints, self.device)
        if state is not None:
            self.restorer.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.interval = Interval(state["interval_sums"], state["interval_steps"])
            self.step = state["step"]
            log.info("resuming %s at step %d", self.folder.path.name, self.step)
        self.folder.record_attempt(
            device=str(self.device),
            threads=torch.get_num_threads(),
            resumed_from_step=self.step,
            data_sha256=self.data_sha256,
            data_samples=len(self.images),
        )

    def run(self, stop: StopSource, report: Report | None, progress: bool) -> None:
        """Step until the end, or until ``stop`` asks."""
        settings = self.config.training
        steps = settings.steps
        self.folder.write_status("running", self.step, steps)
        order = Order(len(self.images), settings.batch_size, settings.seed)
        stream = batches(
            self.images,
            self.config.data,
            order,
            self.step * settings.accumulation,
            self.device,
            settings.workers,
        )
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=None if progress else True)
        clock, logged, saved = time.perf_counter(), self.step, self.step
        with bar, closing(stream):  # which ends its workers
            while self.step < steps:
                self.train_step(stream, order)
                bar.update()
                if self.step % settings.log_every == 0 or self.step == steps:
                    rate = (self.step - logged) / (time.perf_counter() - clock)
                    self.log_interval(rate, report, bar)
                    clock, logged = time.perf_counter(), self.step
                if settings.validate_every and (
                    self.step % settings.validate_every == 0 or self.step == steps
                ):
                    self.validate(report, bar)
                    clock = time.perf_counter()
                if self.step % settings.checkpoint_every == 0 or self.step == steps:
                    self.save()
                    saved = self.step
                if stop.signum is not None and self.step < steps:
                    if saved != self.step:
                        self.save()
                    raise Interrupted(self.step, stop.signum)
        save_weights(self.folder.weights, self.average.module, self.config, self.step)
        self.folder.write_status("finished", self.step, steps)

    def train_step(self, stream: Iterator[Tensor], order: Order) -> None:
        """One optimiser step: ``accumulation`` micro-batches, clip, update, average."""
        settings, total = self.config.training, torch.zeros((), device=self.device)
        for micro in range(settings.accumulation):
            k = self.step * settings.accumulation + micro
            x0 = next(stream)
            t = torch.randint(
                1,
                self.degradation.T + 1,
                (order.global_size,),
                generator=generator(settings.seed, "t", k),
            )
            loss = restoration_loss(
                self.compiled,
                self._hold(x0, "noise", k, (order.global_size, *x0.shape[1:]), order),
                x0,
                order.share(t).to(self.device, non_blocking=True),
                settings.loss,
            )
            (loss / settings.accumulation).backward()
            total += loss.detach() / settings.accumulation
        norm = self._update()
        self.interval.add(total, norm)
        self._update_average()
        self.step += 1

    def _hold(
        self, x0: Tensor, purpose: str, k: int, shape: Sequence[int], order: Order | None = None
    ) -> Degradation:
        """The degradation of batch ``k``; hot diffusion draws its noise, ``order`` shares it."""
        if not isinstance(self.degradation, Noise):
            return self.degradation
        z = torch.randn(*shape, generator=generator(self.config.training.seed, purpose, k))
        return self.degradation.hold((order.share(z) if order else z).to(x0.device))

    def _update(self) -> Tensor:
        config = self.config.optimiser
        rate = learning_rate(config, self.step, self.config.training.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        limit = config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.restorer.parameters(), limit)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def _update_average(self) -> None:
        """The authors' rule: every ``ema_every`` steps, a plain copy before ``ema_start``."""
        settings = self.config.training
        if self.step % settings.ema_every:
            return
        if self.step < settings.ema_start:
            self.average.n_averaged.zero_()  # AveragedModel copies when it has averaged nothing
        self.average.update_parameters(self.restorer)

    def log_interval(self, steps_per_second: float, report: Report | None, bar: tqdm[Any]) -> None:
        """Read the sums (the one wait for the device), check them, write the record."""
        settings = self.config.training
        loss, norm = self.check_finite()
        images_per_step = settings.accumulation * settings.batch_size
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/learning_rate": learning_rate(
                self.config.optimiser, self.step - 1, settings.steps
            ),
            "speed/images_per_second": images_per_step * steps_per_second,
        } | system_metrics()
        if self.device.type == "cuda":
            memory = torch.cuda.memory_reserved(self.device)
            metrics["system/gpu_0_memory_usage_megabytes"] = memory / 1e6
        self.interval = Interval(torch.zeros_like(self.interval.sums))
        self.folder.write_status("running", self.step, settings.steps)
        self._record(metrics, report)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if bar.disable:
            rate = metrics["speed/images_per_second"]
            log.info("step %d/%d: loss %.4f, %.0f images/s", self.step, settings.steps, loss, rate)

    def check_finite(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the interval; raises :class:`NonFiniteError`."""
        loss, norm = (self.interval.sums / max(1, self.interval.steps)).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"loss {loss} or gradient norm {norm} is not finite within steps "
                f"{self.step - self.interval.steps + 1}..{self.step}; the last checkpoint is from "
                "before that. Lower optimiser.lr, or set optimiser.clip_norm"
            )
        return loss, norm

    @torch.no_grad()
    def validate(self, report: Report | None, bar: tqdm[Any]) -> None:
        """Direct restoration of the validation images from x_T by the averaged weights."""
        if self.validation is None:
            return
        pixels = self.validation.take(torch.arange(len(self.validation)))
        x0 = to_batch(pixels, self.config.data)
        restored = []
        self.average.eval()
        for k, part in enumerate(x0.split(250)):
            part = part.to(self.device)
            xT = self._hold(part, "validation", k, part.shape).terminal(part)
            restored.append(restore_directly(self.average.module, xT, self.degradation.T).cpu())
        x0_hat = torch.cat(restored).clamp(-1, 1)
        error, similarity = rmse(x0_hat, x0), ssim(x0_hat, x0)
        self._record({"validation/rmse": error, "validation/ssim": similarity}, report)
        text = f"step {self.step}: direct restoration RMSE {error:.4f}, SSIM {similarity:.4f}"
        if bar.disable:
            log.info(text)
        else:
            bar.write(text)

    def _record(self, metrics: dict[str, float], report: Report | None) -> None:
        self.journal.append(self.step, metrics)
        if report is not None:
            report(self.step, metrics)

    def save(self) -> None:
        """Write a checkpoint, if the state is finite, and make the journal durable."""
        self.check_finite()
        self.journal.sync()
        state = {
            "step": self.step,
            "model": self.restorer.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "interval_sums": self.interval.sums,
            "interval_steps": self.interval.steps,
        }
        save_checkpoint(self.folder.checkpoints, self.step, state)
