"""Where generation starts (paper, section 5).

Fully blurred images are nearly constant, so the distribution of x_T is that of the channel means:
a Gaussian mixture fitted to the training images' means. A little noise breaks the symmetry of a
constant start ("broken symmetry"; none is "perfect symmetry").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from colddiff.randomness import generator


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
        # Sampling by hand: scikit-learn's own depends on the fit's random state, not on a seed.
        random = np.random.default_rng(seed)
        component = random.choice(len(self.mixture.weights_), size=n, p=self.mixture.weights_)
        factors = np.linalg.cholesky(self.mixture.covariances_)
        z = random.standard_normal((n, self.mixture.means_.shape[1]))
        means = self.mixture.means_[component] + np.einsum("nij,nj->ni", factors[component], z)
        constant = torch.from_numpy(means).float().clamp(-1, 1)
        return constant[:, :, None, None].repeat(1, 1, height, width)


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
