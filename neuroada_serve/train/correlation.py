"""Correlations between given and true numbers: GLUE's figures for regressions (STS-B)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]


def pearson(given: Numbers, true: Numbers) -> float:
    """Return Pearson's correlation, in [-1, 1]; 0 if all numbers of one side are the same."""
    return _correlation(np.asarray(given, np.float64), np.asarray(true, np.float64))


def spearman(given: Numbers, true: Numbers) -> float:
    """Return Pearson's correlation of the ranks; equal numbers share their mean rank."""
    return _correlation(_ranks(given), _ranks(true))


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / spread, -1, 1)) if spread > 0 else 0.0


def _ranks(values: Numbers) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    mean = last - (counts - 1) / 2
    ranks: NDArray[np.float64] = mean[which]
    return ranks
