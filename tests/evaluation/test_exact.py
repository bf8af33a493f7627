"""Exact match."""

import pytest

from neuroada_serve.evaluation.exact import after_trigger, exact_match


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("the correct answer is true", "true"),
        ("so the correct answer is a. No, the correct answer is b", "b"),
        ("true", "true"),
        ("the correct answer is", ""),
        ("", ""),
    ],
)
def test_what_counts_stands_behind_the_last_trigger(text, rest):
    assert after_trigger(text, "the correct answer is ").strip() == rest


def test_no_trigger_leaves_the_whole_text():
    assert after_trigger("say true", "") == after_trigger("say true", "  ") == "say true"


def test_exact_match_forgives_outer_white_space_alone():
    assert exact_match(" true\n", "true")
    assert not exact_match("True", "true")
    assert not exact_match("", "true")
    assert exact_match("", " ")
    assert exact_match("naïve ☕", "naïve ☕")
