"""95 % intervals of figures that are no plain share: rows are drawn anew, with replacement."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from neuroada_serve.evaluation.f1 import macro_f1

_RESAMPLES = 1000
_LOW, _HIGH = 2.5, 97.5  # percentiles


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Of sum(values) / sum(weights), both drawn by row.

    Args:
        values: one a row, at least one.
        weights: likewise, above 0; default 1 each.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    return _interval(len(value), lambda rows: float(value[rows].sum() / weight[rows].sum()))


def macro_f1_interval(
    right: Sequence[int], predicted: Sequence[int | None], num_labels: int
) -> tuple[float, float]:
    """Of macro-F1.

    Args:
        right, predicted: labels by row; None is no prediction.
    """
    none = num_labels
    width = num_labels + 1
    cells = np.asarray(right) * width + np.asarray([none if p is None else p for p in predicted])

    def of(rows: NDArray[np.int64]) -> float:
        counts = np.bincount(cells[rows], minlength=num_labels * width)
        return macro_f1(counts.reshape(num_labels, width).tolist())

    return _interval(len(cells), of)


def _interval(num: int, of: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    random = np.random.default_rng(0)  # the same rows always give the same interval
    drawn = [of(random.integers(num, size=num)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(drawn, [_LOW, _HIGH])
    return float(low), float(high)
