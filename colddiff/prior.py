"""Where generation starts (paper, section 5).

Fully blurred images are nearly constant, so the paper takes the distribution of x_T for that of the
channel means: a Gaussian mixture fitted to the training images' means. A little noise breaks the
symmetry of a constant start ("broken symmetry"; none is "perfect symmetry").

Nearly constant is not constant: what is left beside the mean is faint, but a restorer reads it
(results/paper/README.md). :class:`TerminalPrior` therefore models all of x_T that float32 keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture
from torch import Tensor

from colddiff.randomness import generator

FAINTEST = 1e-6
"""Deviation of a principal component of x_T in [-1, 1] that counts; float32 rounds at 1e-7."""
LARGEST = 256
"""Components that are looked for."""


@dataclass(frozen=True)
class MeanPrior:
    """A Gaussian mixture over channel means in [-1, 1]."""

    mixture: GaussianMixture

    @classmethod
    def fit(cls, means: Tensor, components: int, seed: int = 0) -> MeanPrior:
        """Fit to ``n c`` channel means.

        Raises:
            ValueError: for fewer than one component, or fewer images than components.
        """
        if not 1 <= components <= len(means):
            raise ValueError(
                f"components = {components} must be in 1..{len(means)} (the number of images)"
            )
        mixture = GaussianMixture(components, random_state=seed)
        return cls(mixture.fit(means.double().cpu().numpy()))

    def sample(self, n: int, height: int, width: int, seed: int = 0) -> Tensor:
        """``n c height width`` constant images, float32, clamped to [-1, 1]."""
        constant = torch.from_numpy(_drawn(self.mixture, n, seed)).float().clamp(-1, 1)
        return constant[:, :, None, None].repeat(1, 1, height, width)


@dataclass(frozen=True)
class TerminalPrior:
    """A Gaussian mixture over x_T, in its principal components."""

    mixture: GaussianMixture
    mean: Tensor
    """``c h w``, float64."""
    axes: Tensor
    """``d c h w``, float64: the components, each as long as its deviation."""

    @classmethod
    def fit(cls, xT: Tensor, components: int, seed: int = 0) -> TerminalPrior:
        """Fit to ``n c h w`` terminal states in [-1, 1].

        Raises:
            ValueError: for fewer than one component of the mixture, or fewer images than that.
        """
        if not 1 <= components <= len(xT):
            raise ValueError(
                f"components = {components} must be in 1..{len(xT)} (the number of images)"
            )
        flat = xT.double().flatten(1).cpu()
        mean = flat.mean(dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the decomposition starts from random directions
            largest = min(*flat.shape, LARGEST)
            scores, lengths, axes = torch.svd_lowrank(flat - mean, q=largest, niter=4)
        deviations = lengths / len(xT) ** 0.5
        kept = max(1, int((deviations > FAINTEST).sum()))
        coordinates = (scores[:, :kept] * len(xT) ** 0.5).numpy()
        # Some digits lie in thin sheets: without a floor, components would collapse onto them.
        mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-3)
        scaled = (axes[:, :kept] * deviations[:kept]).T
        return cls(
            mixture.fit(coordinates), mean.view(xT.shape[1:]), scaled.view(-1, *xT.shape[1:])
        )

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n c h w`` terminal states, float32."""
        coordinates = torch.from_numpy(_drawn(self.mixture, n, seed))
        xT: Tensor = self.mean + torch.tensordot(coordinates, self.axes, dims=1)
        return xT.float()


def _drawn(mixture: GaussianMixture, n: int, seed: int) -> NDArray[np.float64]:
    """``n d`` points of a fitted mixture.

    By hand: scikit-learn's own sampling depends on the fit's random state, not on a seed.
    """
    random = np.random.default_rng(seed)
    component = random.choice(len(mixture.weights_), size=n, p=mixture.weights_)
    factors = np.linalg.cholesky(mixture.covariances_)
    z = random.standard_normal((n, mixture.means_.shape[1]))
    drawn: NDArray[np.float64] = mixture.means_[component]
    drawn += np.einsum("nij,nj->ni", factors[component], z)
    return drawn


def real_terminals(
    terminal: Callable[[Tensor], Tensor], x0: Tensor, n: int, seed: int = 0
) -> Tensor:
    """x_T of ``n`` images drawn without replacement from ``x0`` (with, once they run out)."""
    if len(x0) == 0:
        raise ValueError("real terminal states need at least one image, got none")
    draws = [
        torch.randperm(len(x0), generator=generator(seed, "terminals", i))
        for i in range(-(-n // len(x0)))
    ]
    return terminal(x0[torch.cat(draws)[:n]])


def break_symmetry(xT: Tensor, std: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of ``std`` (in units of the [-1, 1] range; the paper's is 0.002).

    Raises:
        ValueError: for a negative ``std``.
    """
    if std < 0:
        raise ValueError(f"noise std = {std} must be at least 0")
    if std == 0:
        return xT
    z = torch.randn(xT.shape, generator=generator(seed, "symmetry"), dtype=xT.dtype)
    return xT + std * z.to(xT.device)
