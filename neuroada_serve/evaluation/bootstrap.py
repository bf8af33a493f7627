"""95 % intervals by bootstrap, for figures other than shares: rows are resampled."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_LOW, _HIGH = 2.5, 97.5  # percentiles


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return the interval of sum(values) / sum(weights), both resampled by row.

    Args:
        values: one per row, at least one.
        weights: one per row, above 0; default 1 each.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    return _interval(len(value), lambda rows: float(value[rows].sum() / weight[rows].sum()))


def confusion_interval(
    right: Sequence[int],
    predicted: Sequence[int | None],
    num_labels: int,
    of: Callable[[Sequence[Sequence[int]]], float],
) -> tuple[float, float]:
    """Return the interval of a figure of a confusion matrix, such as `macro_f1`.

    Args:
        right, predicted: labels by row; None is no prediction.
        of: computes the figure from [labels][labels + 1] counts.
    """
    none = num_labels
    width = num_labels + 1
    cells = np.asarray(right) * width + np.asarray([none if p is None else p for p in predicted])

    def of_rows(rows: NDArray[np.int64]) -> float:
        counts = np.bincount(cells[rows], minlength=num_labels * width)
        return of(counts.reshape(num_labels, width).tolist())

    return _interval(len(cells), of_rows)


def paired_interval(
    given: Sequence[float],
    true: Sequence[float],
    of: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
) -> tuple[float, float]:
    """Return the interval of a figure of pairs, such as `pearson`, resampled by row."""
    x, y = np.asarray(given, np.float64), np.asarray(true, np.float64)
    return _interval(len(x), lambda rows: of(x[rows], y[rows]))


def _interval(num: int, of: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    random = np.random.default_rng(0)  # the same rows always give the same interval
    drawn = [of(random.integers(num, size=num)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(drawn, [_LOW, _HIGH])
    return float(low), float(high)
