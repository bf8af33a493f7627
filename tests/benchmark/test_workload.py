"""Workloads: popularity, arrivals, prompts."""

import math
import statistics
from collections import Counter

import pytest

from neuroada_serve.benchmark.settings import OfflineConfig
from neuroada_serve.benchmark.workload import (
    arrivals,
    assign,
    random_prompts,
    text_prompts,
)
from neuroada_serve.errors import UsageError


def test_popularity_assigns_as_named():
    assert assign("base", 3, 8) == [None] * 3
    assert assign("identical", 3, 8) == assign("merged", 3, 8) == [0, 0, 0]
    assert assign("distinct", 3, 8) == [0, 1, 2]
    assert assign("distinct", 3, 2) == [0, 1, 0]
    assert assign("half-merged", 3, 8) == [0, None, 0]


def test_uniform_draws_all_alike():
    counts = Counter(assign("uniform", 8000, 8, seed=1))
    assert set(counts) == set(range(8))
    assert all(850 < n < 1150 for n in counts.values())


def test_zipf_follows_its_exponent():
    counts = Counter(assign("zipf:1.5", 20000, 50, seed=1))
    assert counts[0] / counts[1] == pytest.approx(2**1.5, rel=0.1)
    assert counts[0] / counts[3] == pytest.approx(4**1.5, rel=0.15)


def test_same_seed_same_workload():
    for popularity in ("uniform", "zipf:1"):
        assert assign(popularity, 20, 9, "a") == assign(popularity, 20, 9, "a")
        assert assign(popularity, 20, 9, "a") != assign(popularity, 20, 9, "b")
    assert arrivals(9, 2, 1, 3) == arrivals(9, 2, 1, 3) != arrivals(9, 2, 1, 4)
    assert random_prompts(2, 5, range(99), 1) == random_prompts(2, 5, range(99), 1)


@pytest.mark.parametrize("popularity", ["", "zipf", "zipf:", "zipf:0", "zipf:-1", "zipf:inf", "x"])
def test_unknown_popularity_is_refused(popularity):
    with pytest.raises(UsageError, match="zipf:A"):
        OfflineConfig(popularity=(popularity,))


def test_arrivals_keep_the_rate_whatever_was_drawn():
    times = arrivals(50, request_rate=4, burstiness=1, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(50 / 4)
    assert arrivals(3, math.inf, 1) == [0, 0, 0]


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_gaps_have_the_variation_of_their_burstiness(burstiness):
    times = arrivals(20000, 10, burstiness, seed=5)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_infinite_burstiness_is_a_clock():
    assert arrivals(4, 2, math.inf) == pytest.approx([0.5, 1, 1.5, 2])


def test_text_prompts_go_round_the_text():
    prompts = text_prompts(20, 7, [10, 11, 12], seed=1)
    assert {len(prompt) for prompt in prompts} == {7}
    assert {prompt[0] for prompt in prompts} == {10, 11, 12}
    assert all((b - a) % 3 == 1 for prompt in prompts for a, b in zip(prompt, prompt[1:], strict=0))
