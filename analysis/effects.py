"""Effects of factors in a split-plot experiment: trained networks, and samplers tried on each.

A network is trained under one setting of the training factors and then sampled under many settings
of the sampling factors. What differs between networks is judged by how networks of equal settings
differ, what differs within them by the residual of the samples: two errors, two tables of degrees
of freedom. Ordinary least squares, sum-to-zero coding, so that an effect is an average over all
other factors as if each combination were there equally often.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
Levels = Mapping[str, Sequence[str]]
"""Factors and their levels, the reference level first."""
Term = tuple[str, ...]
"""Factors: one for a main effect, two for an interaction."""


@dataclass(frozen=True)
class Effect:
    """A difference of means, or of differences, with its 95 % interval."""

    factors: Term
    levels: tuple[str, ...]
    """Compared with each factor's reference level."""
    size: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def effects(
    table: pd.DataFrame, response: str, network: str, training: Levels, sampling: Levels
) -> list[Effect]:
    """Main effects and two-factor interactions on ``response``, in that order.

    Args:
        table: a row a set of samples; a text column a factor.
        response: the column that is explained.
        network: the column that tells networks apart.
        training: factors that are constant within a network.
        sampling: factors that vary within networks.

    Raises:
        ValueError: for levels that are not listed, and where the table cannot tell some effect from
            others or leaves nothing to judge it by.
    """
    for factor, levels in {**training, **sampling}.items():
        unknown = set(table[factor]) - set(levels)
        if unknown:
            raise ValueError(f"{factor} has levels {sorted(unknown)}: allowed are {list(levels)}")
    within = _within(table, response, network, training, sampling)
    between = _between(table, response, network, training)
    found = [*between, *within]
    return sorted(found, key=lambda effect: len(effect.factors))


def _within(
    table: pd.DataFrame, response: str, network: str, training: Levels, sampling: Levels
) -> list[Effect]:
    both = {**training, **sampling}
    terms: list[Term] = [(factor,) for factor in sampling]
    terms += [pair for pair in itertools.combinations(both, 2) if set(pair) & set(sampling)]
    names = sorted(set(table[network]))
    own = np.array([[float(value == name) for name in names] for value in table[network]])
    return _fit(table, table[response].to_numpy(float), terms, both, own)


def _between(table: pd.DataFrame, response: str, network: str, training: Levels) -> list[Effect]:
    means = table.groupby([network, *training])[response].mean().reset_index()
    terms: list[Term] = [(factor,) for factor in training]
    terms += itertools.combinations(training, 2)
    constant = np.ones((len(means), 1))
    return _fit(means, means[response].to_numpy(float), terms, training, constant)


def _fit(
    table: pd.DataFrame, y: Array, terms: Sequence[Term], factors: Levels, nuisance: Array
) -> list[Effect]:
    blocks = [_columns(table, term, factors) for term in terms]
    X = np.hstack([nuisance, *blocks])
    freedom = len(y) - X.shape[1]
    if np.linalg.matrix_rank(X) < X.shape[1]:
        raise ValueError("the table cannot tell all of these effects apart")
    if freedom < 1:
        raise ValueError(
            f"{len(y)} values for {X.shape[1]} unknowns leave nothing to judge them by"
        )
    beta, *_ = np.linalg.lstsq(X, y, rcond=None)
    variance = float(((y - X @ beta) ** 2).sum()) / freedom
    covariance = variance * np.linalg.inv(X.T @ X)
    width = float(student.ppf(0.975, freedom))
    found, first = [], nuisance.shape[1]
    for term, block in zip(terms, blocks, strict=True):
        part = slice(first, first + block.shape[1])
        first += block.shape[1]
        for levels, contrast in _contrasts(term, factors):
            size = float(contrast @ beta[part])
            error = width * float(contrast @ covariance[part, part] @ contrast) ** 0.5
            found.append(Effect(term, levels, size, size - error, size + error))
    return found


def _code(levels: Sequence[str]) -> dict[str, Array]:
    """Sum-to-zero coding: unit vectors, and minus one throughout for the last level."""
    units = np.eye(len(levels) - 1)
    return {
        level: units[i] if i < len(units) else -np.ones(len(units))
        for i, level in enumerate(levels)
    }


def _columns(table: pd.DataFrame, term: Term, factors: Levels) -> Array:
    """A term's columns: of two factors, all products."""
    columns = np.ones((len(table), 1))
    for factor in term:
        code = _code(factors[factor])
        own = np.array([code[str(level)] for level in table[factor]])
        columns = np.einsum("ni,nj->nij", columns, own).reshape(len(table), -1)
    return columns


def _contrasts(term: Term, factors: Levels) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Each combination of levels against the references."""
    codes = [_code(factors[factor]) for factor in term]
    for levels in itertools.product(*(factors[factor][1:] for factor in term)):
        contrast = np.ones(1)
        for factor, code, level in zip(term, codes, levels, strict=True):
            difference = code[level] - code[factors[factor][0]]
            contrast = np.einsum("i,j->ij", contrast, difference).ravel()
        yield levels, contrast
