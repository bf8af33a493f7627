"""Confidence intervals by resampling rows."""

import pytest

from neuroada_serve.evaluation.bootstrap import confusion_interval, mean_interval
from neuroada_serve.evaluation.f1 import macro_f1


def test_bootstrap_interval_is_near_the_normal_one_and_repeats():
    values = [i % 2 for i in range(400)]
    low, high = mean_interval(values)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.008)
    assert mean_interval(values) == (low, high)
    assert mean_interval([3.0]) == (3.0, 3.0)


def test_bootstrap_of_a_ratio_weighs_rows_by_their_tokens():
    assert mean_interval([2.0, 6.0], [1, 3]) == (2.0, 2.0)


def test_bootstrap_of_macro_f1_holds_the_figure():
    right, chosen = [0, 1] * 20, [0, None] * 10 + [0, 1] * 10
    low, high = confusion_interval(right, chosen, 2, macro_f1)
    figure = macro_f1([[20, 0, 0], [0, 10, 10]])
    assert 0.5 < low < figure < high < 1
