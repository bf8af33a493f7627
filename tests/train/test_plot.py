"""Plots of a run."""

from neuroada_serve.train.plot import smoothed


def test_smoothing_keeps_length_and_mean_of_a_flat_curve():
    assert smoothed([2.0] * 50) == [2.0] * 50
    assert smoothed([1.0, 3.0]) == [2.0, 2.0]
