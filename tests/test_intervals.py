"""Confidence intervals of shares."""

import pytest

from neuroada_serve.intervals import wilson


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # as statsmodels' proportion_confint(method="wilson") gives
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (0, 1, 0, 0.7935),
        (500, 1000, 0.4691, 0.5309),
    ],
)
def test_wilson_interval(hits, rows, low, high):
    assert wilson(hits, rows) == pytest.approx((low, high), abs=1e-4)
