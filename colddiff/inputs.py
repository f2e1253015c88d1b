"""What the network is trained on: the levels t and the states x_t of a micro-batch.

Like everything random, a function of (seed, purpose, micro-batch), drawn for all ranks together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colddiff.batches import Order
from colddiff.config import RunConfig
from colddiff.degradation import Degradation, Noise, Process
from colddiff.diffusion import Restorer, own_states
from colddiff.machine import upload
from colddiff.randomness import generator


class Inputs:
    """Levels and states of this rank's images."""

    def __init__(
        self,
        config: RunConfig,
        order: Order,
        degradation: Process,
        restorer: Restorer,
        device: torch.device,
    ) -> None:
        self.config, self.order, self.degradation = config, order, degradation
        self.restorer, self.device = restorer, device
        # Of every 1 / own_states images the last: spread over the ranks, and known beforehand.
        share, places = config.training.own_states, torch.arange(order.batch_size).double()
        self.own = ((places + 1) * share).floor() > (places * share).floor()
        self.chosen = order.share(self.own).nonzero().squeeze(1).to(device)

    def __call__(self, k: int, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (``b c h w``) and t (int64 ``b``) of micro-batch ``k``, whose images are ``x0``."""
        training, T, size = self.config.training, self.degradation.T, self.order.batch_size
        t = torch.randint(1, T + 1, (size,), generator=generator(training.seed, "t", k))
        if training.levels == "last":
            t.fill_(T)
        t = torch.where(self.own, t.clamp(max=T - 1), t)
        z = self._noise(k, x0)
        xt = self._held(z)(x0, self._placed(t))
        if len(self.chosen):
            # u is uniform over the levels above t.
            above = torch.rand(size, generator=generator(training.seed, "u", k))
            u = torch.minimum(t + 1 + (above * (T - t)).long(), torch.tensor(T))
            xt[self.chosen] = own_states(
                self.restorer,
                self._held(None if z is None else z[self.chosen]),
                x0[self.chosen],
                (self._placed(u)[self.chosen], self._placed(t)[self.chosen]),
                bounded=self.config.model.bounded,
            )
        return xt, self._placed(t)

    def _placed(self, values: Tensor) -> Tensor:
        return upload(self.order.share(values), self.device)

    def _noise(self, k: int, x0: Tensor) -> Tensor | None:
        """Of hot diffusion, drawn for all ranks."""
        if not isinstance(self.degradation, Noise):
            return None
        draws = generator(self.config.training.seed, "noise", k)
        z = torch.randn(self.order.batch_size, *x0.shape[1:], generator=draws)
        return upload(self.order.share(z), self.device)

    def _held(self, z: Tensor | None) -> Degradation:
        if isinstance(self.degradation, Noise):
            assert z is not None, "hot diffusion has noise"
            return self.degradation.hold(z)
        return self.degradation
