"""Figures of timed requests."""

from neuroada_serve.benchmark.measure import Timeline, percentile


def test_timeline_figures():
    # Two requests; the second starts a step later, so decode counts from 2 s on: 2 tokens in 2 s.
    line = Timeline(((1.0, 2.0, 3.0), (2.0, 4.0)), wall_s=5.0, num_prompt_tokens=8)
    assert line.tokens_per_s == 1
    assert line.decode_tokens_per_s == 1
    assert line.prefill_tokens_per_s == 4
    assert line.step_ms == [1000, 1000]
    assert line.ttft_ms == [1000, 2000]
    assert line.tpot_ms == [1000, 2000]


def test_percentile_is_linear_between_values():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([7], 99) == 7
    assert percentile(range(101), 99) == 99
