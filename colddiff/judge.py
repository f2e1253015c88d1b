"""Restorations against their originals, batch by batch: what is kept is numbers, not images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from colddiff import metrics
from colddiff.classifier import load_digit_classifier
from colddiff.config import DataConfig
from colddiff.degradation import Degradation
from colddiff.diffusion import Restorer


@dataclass(frozen=True)
class KindResult:
    """One kind of restoration against the originals."""

    rmse: float
    ssim: float
    fid_digits: float | None
    """None where the images are no digits."""
    fid_inception: float | None
    """None without Inception weights."""
    rmse_per_class: tuple[float, ...]
    """By the images' own labels; empty where they have none."""


@dataclass(frozen=True)
class LevelResult:
    """Direct restoration from one level: of D(x0, t) and of R(D(x0, t), t) against x0."""

    t: int
    degraded_rmse: float
    rmse: float
    ssim: float


@dataclass
class _Kept:
    errors: list[Tensor]
    similarities: list[Tensor]
    features: dict[str, list[Tensor]]


class Judge:
    """Compares kinds of restorations with the originals, whose features are computed once."""

    def __init__(
        self, data: DataConfig, labels: Tensor | None, inception: Path | None, device: torch.device
    ) -> None:
        """``labels`` are those of all images that will come, in their order."""
        self.labels = labels
        self.extractors: dict[str, Callable[[Tensor], Tensor]] = {}
        if data.has_digits:
            self.extractors["fid_digits"] = functools.partial(
                metrics.digit_features, classifier=load_digit_classifier(device)
            )
        if inception is not None:
            self.extractors["fid_inception"] = functools.partial(
                metrics.inception_features, weights=inception, device=device
            )
        self.originals: dict[str, list[Tensor]] = {name: [] for name in self.extractors}
        self.kinds: dict[str, _Kept] = {}

    def add(self, x0: Tensor, restored: Mapping[str, Tensor]) -> None:
        """One batch of originals and, by kind, of what was made of them; ``b c h w``, [-1, 1]."""
        for name, extract in self.extractors.items():
            self.originals[name].append(extract(x0))
        for kind, x0_hat in restored.items():
            kept = self.kinds.setdefault(kind, _Kept([], [], {name: [] for name in self.originals}))
            kept.errors.append(metrics.squared_errors(x0_hat, x0).cpu())
            kept.similarities.append(metrics.similarities(x0_hat, x0).cpu())
            for name, extract in self.extractors.items():
                kept.features[name].append(extract(x0_hat))

    def results(self) -> dict[str, KindResult]:
        """All metrics of every kind."""
        originals = {name: torch.cat(parts) for name, parts in self.originals.items()}
        return {kind: self._result(kept, originals) for kind, kept in self.kinds.items()}

    def _result(self, kept: _Kept, originals: Mapping[str, Tensor]) -> KindResult:
        errors, per_class = torch.cat(kept.errors), tuple[float, ...]()
        if self.labels is not None:
            per_class = metrics.rmse_of_classes(errors, self.labels)
        distances = {
            name: metrics.frechet_distance(torch.cat(kept.features[name]), features)
            for name, features in originals.items()
        }
        return KindResult(
            rmse=float(errors.mean().sqrt()),
            ssim=float(torch.cat(kept.similarities).mean()),
            fid_digits=distances.get("fid_digits"),
            fid_inception=distances.get("fid_inception"),
            rmse_per_class=per_class,
        )


class LevelCurve:
    """How well the first ``count`` images are restored directly from each level."""

    def __init__(self, restorer: Restorer, T: int, count: int) -> None:
        self.restorer, self.T, self.missing = restorer, T, count
        self.kept: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in range(T)]

    def add(self, x0: Tensor, degradation: Degradation) -> None:
        """One batch, ``b c h w``; what is held for it may hold noise for all of it."""
        if self.missing <= 0:
            return
        for level, kept in enumerate(self.kept, start=1):
            t = torch.full((len(x0),), level, device=x0.device)
            # At T as it is stored there, see Degradation.terminal.
            xt = degradation.terminal(x0) if level == self.T else degradation(x0, t)
            x0_hat = self.restorer(xt, t).float().clamp(-1, 1)
            for values, part in zip(
                kept,
                (
                    metrics.squared_errors(xt.clamp(-1, 1), x0),
                    metrics.squared_errors(x0_hat, x0),
                    metrics.similarities(x0_hat, x0),
                ),
                strict=True,
            ):
                values.append(part[: self.missing].cpu())
        self.missing -= len(x0)

    def results(self) -> tuple[LevelResult, ...]:
        """Levels 1..T; none where no image was asked for."""
        rows = []
        for t, (degraded, errors, similarities) in enumerate(self.kept, start=1):
            if errors:
                rows.append(
                    LevelResult(
                        t,
                        float(torch.cat(degraded).mean().sqrt()),
                        float(torch.cat(errors).mean().sqrt()),
                        float(torch.cat(similarities).mean()),
                    )
                )
        return tuple(rows)
