"""The plain reference: the same functions, the way the authors' scripts compute them.

Float32, ``b c h w`` in memory, their network's modules as they wrote them, a blur that walks
through all steps, a loop over the parameters for the average, the loss read at each step.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from reference_unet import ReferenceUNet
from torch import Tensor, nn

from colddiff.batches import Order
from colddiff.config import DegradationConfig, RunConfig
from colddiff.degradation import taps_of_step
from colddiff.diffusion import restoration_loss
from colddiff.inputs import Inputs
from colddiff.optimisation import learning_rate
from colddiff.restorer import Restorer
from colddiff.unet import UNet, load_reference_state_dict


class SequentialBlur(nn.Module):
    """The authors' way: blur the whole batch up to its largest t, keep every state, pick."""

    def __init__(self, config: DegradationConfig, channels: int) -> None:
        super().__init__()
        self.T, self.padding = config.T, str(config.padding)
        steps = (taps_of_step(config, i).float() for i in range(config.T))
        self.kernels = [(taps[:, None] * taps).expand(channels, 1, -1, -1) for taps in steps]

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        """``b c h w`` and int64 ``b`` in 0..T -> x_t."""
        states = [x0]
        for i in range(int(t.max())):
            states.append(self.step(states[-1], i))
        return torch.stack(states)[t, torch.arange(len(t))]

    def step(self, x: Tensor, i: int) -> Tensor:
        """The i-th blur, from 0."""
        kernel = self.kernels[i]
        padded = F.pad(x, (kernel.shape[-1] // 2,) * 4, mode=self.padding)
        return F.conv2d(padded, kernel.to(x.dtype), groups=len(kernel))


class PlainUNet(nn.Module):
    """The authors' modules behind our signature."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, folded = config.model, config.data.channels * config.model.patch**2
        self.inner = ReferenceUNet(
            model.dim,
            model.mults,
            folded * (2 if model.conditioning == "wiener" else 1),
            out_channels=folded,
            with_time=model.time_embedding,
        )
        self.residual = folded if model.residual else 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As :class:`colddiff.unet.UNet`."""
        out: Tensor = self.inner(x.contiguous(), t - 1)
        return out + x[:, : self.residual] if self.residual else out


def plain_restorer(config: RunConfig, ours: Restorer) -> Restorer:
    """The same function as ``ours``, which is given the weights, computed the plain way."""
    unet = PlainUNet(config)
    assert isinstance(ours.unet, UNet)
    load_reference_state_dict(ours.unet, unet.inner.state_dict())
    plain = Restorer(
        unet,  # type: ignore[arg-type]  # the same signature
        patch=ours.patch,
        estimate=ours.estimate,
        bounded=ours.bounded,
    )
    return plain.train(ours.training)


class PlainTraining:
    """A training loop without a thought of speed: what it computes is the configuration's."""

    def __init__(self, config: RunConfig, ours: Restorer, order: Order) -> None:
        self.config, self.restorer, self.k = config, plain_restorer(config, ours), 0
        blur = SequentialBlur(config.degradation, config.data.channels)
        device = torch.device("cpu")
        # It needs of a process what a degradation has.
        self.inputs = Inputs(config, order, blur, self.restorer, device)  # type: ignore[arg-type]
        self.average = copy.deepcopy(self.restorer)
        optimiser = config.optimiser
        kind = torch.optim.AdamW if optimiser.name == "adamw" else torch.optim.Adam
        self.optimiser = kind(
            self.restorer.parameters(), lr=optimiser.lr, weight_decay=optimiser.weight_decay
        )

    def step(self, x0: Tensor) -> float:
        """One step on a batch; the loss."""
        config = self.config
        xt, t = self.inputs(self.k, x0)
        loss = restoration_loss(
            self.restorer, xt, t, x0, config.training.loss, bounded=config.model.bounded
        )
        loss.backward()
        if config.optimiser.clip_norm:
            parameters = self.restorer.parameters()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimiser.clip_norm, foreach=False)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optimiser, self.k, config.training.steps)
        self.optimiser.step()
        self.optimiser.zero_grad()
        decay = config.training.ema_decay
        pairs = zip(self.average.parameters(), self.restorer.parameters(), strict=True)
        for averaged, current in pairs:
            averaged.data = averaged.data * decay + (1 - decay) * current.data
        self.k += 1
        return loss.item()


@torch.no_grad()
def plain_sample(restorer: Restorer, blur: SequentialBlur, xT: Tensor) -> Tensor:
    """Algorithm 2 over all levels, as the authors' loop: each D(x0_hat, s) from its first step."""
    xs = xT
    for s in range(blur.T, 0, -1):
        level = torch.full((len(xs),), s)
        x0_hat = restorer(xs, level)
        xs = xs - _walked(blur, x0_hat, s) + _walked(blur, x0_hat, s - 1)
    return xs


def _walked(blur: SequentialBlur, x: Tensor, steps: int) -> Tensor:
    for i in range(steps):
        x = blur.step(x, i)
    return x
