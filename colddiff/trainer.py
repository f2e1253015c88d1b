"""The training loop: resumable at any step, bit for bit, on one process or several ranks.

Nothing random has a state (see :mod:`colddiff.randomness`), so weights, optimiser, average and the
running loss are all there is to save. The loop never waits for the device except where it logs.
All ranks go through the same steps; rank 0 alone writes, validates and reports.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from colddiff.batches import Order, batches
from colddiff.checkpoint import load_checkpoint, save_weights
from colddiff.checkpoint_writer import CheckpointWriter
from colddiff.config import RunConfig
from colddiff.data import TensorImages, load_images, split_validation
from colddiff.degradation import build_degradation
from colddiff.diffusion import restoration_loss
from colddiff.inputs import Inputs
from colddiff.interruption import Interrupted, StopSource
from colddiff.journal import Journal
from colddiff.machine import system_metrics
from colddiff.optimisation import Interval, build_optimiser, learning_rate, update_average
from colddiff.profiling import StepProfiler
from colddiff.randomness import generator
from colddiff.ranks import Group
from colddiff.restorer import build_restorer
from colddiff.run_folder import RunFolder
from colddiff.schedule_report import record_schedule
from colddiff.validation import validate

log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, float]], None]
"""``report(step, metrics)``: told every journal record; may raise to stop the run (pruning).

It is called on rank 0. If it raises there, the other ranks fail at their next exchange.
"""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the last checkpoint is good."""


class Trainer:
    """The state of one training run, and the operations on it."""

    def __init__(self, folder: RunFolder, config: RunConfig, group: Group) -> None:
        self.folder, self.config, self.group, self.device = folder, config, group, group.device
        self.step, ranks, settings = 0, group.ranks, config.training
        images, self.validation = split_validation(
            load_images(config.data, "train"), config.data.validation, settings.batch_size
        )
        self.data_sha256 = images.checksum
        self.images = images.to(self.device) if isinstance(images, TensorImages) else images
        self.order = Order(
            len(images), settings.batch_size, settings.seed, ranks.rank, ranks.world_size
        )
        self.degradation = build_degradation(config.degradation, config.data.image_size)
        self.degradation.to(self.device)
        self.restorer = build_restorer(config).to(self.device)
        self.inputs = Inputs(config, self.order, self.degradation, self.restorer, self.device)
        self.average = AveragedModel(self.restorer)
        self.optimiser = build_optimiser(config.optimiser, self.restorer)
        self.interval = Interval(torch.zeros(2, dtype=torch.float64, device=self.device))
        self._resume()
        self.network = self._network()
        self.writer = CheckpointWriter(folder.checkpoints)
        self.journal: Journal | None = None
        if ranks.is_main:
            self._record_attempt()
            self.journal = Journal.open(folder.journal)

    def _resume(self) -> None:
        ranks, state = self.group.ranks, load_checkpoint(self.folder.checkpoints, self.device)
        if state is not None:
            self.restorer.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.interval = Interval.resumed(
                state["interval_sums"], state["interval_steps"], ranks.rank, ranks.world_size
            )
            self.step = state["step"]
            if ranks.is_main:
                log.info("resuming %s at step %d", self.folder.path.name, self.step)
        self.group.require_same("the step of their checkpoint", self.step)
        self.group.require_same("the checksum of their data", self.data_sha256)

    def _network(self) -> Any:
        """The restorer as the loss calls it: compiled if asked for, and shared by the ranks."""
        data = self.config.data
        compiled: Any = self.restorer
        if self.config.training.compile:
            compiled = torch.compile(self.restorer)
        x0 = torch.zeros(
            self.order.size, data.channels, data.image_size, data.image_size, device=self.device
        )
        return self.group.wrap(compiled, x0, x0.new_ones(self.order.size, dtype=torch.int64))

    def _record_attempt(self) -> None:
        for torn in self.folder.checkpoints.glob(".*.tmp"):  # a killed save's
            torn.unlink()
        record_schedule(self.folder, self.config, self.images)
        self.folder.record_attempt(
            device=str(self.device),
            arithmetic=self.restorer.arithmetic(self.device.type),
            threads=torch.get_num_threads(),
            world_size=self.group.ranks.world_size,
            resumed_from_step=self.step,
            data_sha256=self.data_sha256,
            data_samples=len(self.images),
        )

    def run(
        self, stop: StopSource, report: Report | None, progress: bool, profiler: StepProfiler
    ) -> None:
        """Step until the end, or until ``stop`` asks on any rank."""
        settings, is_main = self.config.training, self.group.ranks.is_main
        steps = settings.steps
        if is_main:
            self.folder.write_status("running", self.step, steps)
        first = self.step * settings.accumulation
        stream = batches(
            self.images, self.config.data, self.order, first, self.device, settings.workers
        )
        hidden = None if progress and is_main else True
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=hidden)
        clock, logged, saved = time.perf_counter(), self.step, self.step
        with bar, closing(stream), self.writer:  # which end workers and thread
            while self.step < steps:
                self.train_step(stream)
                profiler.step()
                bar.update()
                if self._due(settings.log_every):
                    self.log_interval(self.step - logged, clock, report, bar)
                    clock, logged = time.perf_counter(), self.step
                pause = time.perf_counter()
                if self._due(settings.validate_every):
                    self.validate(report, bar)
                if self._due(settings.keep_every):
                    self.keep_weights()
                clock += time.perf_counter() - pause  # no part of the training's speed
                if self._due(settings.checkpoint_every):
                    self.save()
                    saved = self.step
                signum = self.group.agree(stop.signum)
                if signum is not None and self.step < steps:
                    if saved != self.step:
                        self.save()
                    self.writer.wait()
                    self.group.barrier()  # rank 0 has saved
                    raise Interrupted(self.step, signum)
        if is_main:
            save_weights(self.folder.weights, self.average.module, self.config, self.step)
            self.folder.write_status("finished", self.step, steps)

    def _due(self, every: int) -> bool:
        """Whether what happens each so many steps, and after the last, does now; 0 for never."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.steps)

    def train_step(self, stream: Iterator[Tensor]) -> None:
        """One optimiser step: ``accumulation`` micro-batches, clip, update, average."""
        settings, total = self.config.training, torch.zeros((), device=self.device)
        for micro in range(settings.accumulation):
            k, x0 = self.step * settings.accumulation + micro, next(stream)
            if self.config.model.dropout:
                # It draws from torch's own generator: that, too, is a function of the step.
                draws = generator(settings.seed, f"dropout of rank {self.order.rank}", k)
                torch.manual_seed(draws.initial_seed())
            xt, t = self.inputs(k, x0)
            with self.group.no_sync(self.network, skip=micro < settings.accumulation - 1):
                loss = restoration_loss(
                    self.network, xt, t, x0, settings.loss, bounded=self.config.model.bounded
                )
                (loss / settings.accumulation).backward()
            total += loss.detach() / settings.accumulation
        norm = self._update()
        self.interval.add(total, norm)
        self._update_average()
        self.step += 1

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
        """The authors' rule: each ``ema_every`` steps, a copy before ``ema_start`` and at first."""
        settings = self.config.training
        if self.step % settings.ema_every == 0:
            copies = self.step < settings.ema_start or self.step == settings.ema_every
            decay = 0.0 if copies else settings.ema_decay
            # Not update_parameters, which asks the device how often it has averaged.
            update_average(self.average, self.restorer, decay)

    def log_interval(self, steps: int, since: float, report: Report | None, bar: tqdm[Any]) -> None:
        """Check and record what ``steps`` gave ``since`` that time, when the device is done."""
        settings = self.config.training
        _, loss, norm = self.check_finite()  # the one wait for the device
        seconds = time.perf_counter() - since
        self.interval = Interval(torch.zeros_like(self.interval.sums))
        if not self.group.ranks.is_main:
            return
        images_per_step = settings.accumulation * settings.batch_size
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/learning_rate": learning_rate(
                self.config.optimiser, self.step - 1, settings.steps
            ),
            "speed/images_per_second": images_per_step * steps / seconds,
        } | system_metrics()
        if self.device.type == "cuda":
            memory = torch.cuda.memory_reserved(self.device)
            metrics["system/gpu_0_memory_usage_megabytes"] = memory / 1e6
        self.folder.write_status("running", self.step, settings.steps)
        self._record(metrics, report)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if bar.disable:
            rate = metrics["speed/images_per_second"]
            log.info("step %d/%d: loss %.4f, %.0f images/s", self.step, settings.steps, loss, rate)

    def check_finite(self) -> tuple[Tensor, float, float]:
        """Every rank's sums, and the interval's mean loss and gradient norm.

        Raises:
            NonFiniteError: on all ranks, because all see the same means.
        """
        sums = self.group.gather(self.interval.sums)
        loss, norm = (sums.mean(0) / max(1, self.interval.steps)).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"loss {loss} or gradient norm {norm} is not finite within steps "
                f"{self.step - self.interval.steps + 1}..{self.step}; the last checkpoint is from "
                "before that. Lower optimiser.lr, or set optimiser.clip_norm"
            )
        return sums, loss, norm

    def validate(self, report: Report | None, bar: tqdm[Any]) -> None:
        """Direct restoration of the validation images from x_T by the averaged weights."""
        if self.validation is None or not self.group.ranks.is_main:
            return
        metrics = validate(
            self.average.module, self.degradation, self.validation, self.config, self.device
        )
        self._record(metrics, report)
        error, similarity = metrics["validation/rmse"], metrics["validation/ssim"]
        text = f"step {self.step}: direct restoration RMSE {error:.4f}, SSIM {similarity:.4f}"
        if bar.disable:
            log.info(text)
        else:
            bar.write(text)

    def keep_weights(self) -> None:
        """Averaged and raw weights of this step, for good."""
        if self.group.ranks.is_main:
            path, step = self.folder.kept_weights, self.step
            save_weights(path("average", step), self.average.module, self.config, step)
            save_weights(path("raw", step), self.restorer, self.config, step)

    def _record(self, metrics: dict[str, float], report: Report | None) -> None:
        if self.journal is not None:
            self.journal.append(self.step, metrics)
        if report is not None:
            report(self.step, metrics)

    def save(self) -> None:
        """Begin to write a checkpoint, if the state is finite; the journal is durable before."""
        sums, _, _ = self.check_finite()
        if self.journal is None:  # not rank 0
            return
        self.journal.sync()
        state = {
            "step": self.step,
            "model": self.restorer.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "interval_sums": sums,
            "interval_steps": self.interval.steps,
        }
        self.writer.save(self.step, state)
