"""Options that a text names, and the likeliest."""

import math

import pytest

from neuroada_serve.evaluation.options import likeliest, named_option

BOOLS, LETTERS = ["true", "false"], ["A", "B", "C", "D", "E"]


@pytest.mark.parametrize(
    ("text", "options", "first", "last"),
    [
        ("true", BOOLS, 0, 0),
        ("It is False, not true.", BOOLS, 1, 0),
        ("untrue", BOOLS, None, None),
        ("truely", BOOLS, None, None),
        ("", BOOLS, None, None),
        ("maybe", BOOLS, None, None),
        ("answer12", ["answer1", "answer12"], 1, 1),
        ("answer1, answer12", ["answer1", "answer12"], 0, 1),
        ("very good", ["good", "very good"], 1, 1),
        ("very good and good", ["good", "very good"], 1, 0),
        ("(B)", LETTERS, 1, 1),
        ("a bee: C", LETTERS, 2, 2),
        ("A) or B)", LETTERS, 0, 1),
        ("Yes", ["yes", "Yes"], 1, 1),
        ("I use C++.", ["C", "C++"], 1, 1),
        ("a.c", ["abc", "a.c"], 1, 1),
        ("ÉTÉ!", ["été", "hiver"], 0, 0),
        ("答案是对的", ["对", "错"], 0, 0),
    ],
)
def test_option_that_a_text_names(text, options, first, last):
    assert named_option(text, options) == first
    assert named_option(text, options, "last") == last


def test_likeliest_option_and_ties():
    assert likeliest([-2.0, -1.0, -3.0]) == 1
    assert likeliest([-1.0, -1.0, -3.0]) is None
    assert likeliest([-1.0, -3.0, -3.0]) == 0
    assert likeliest([math.nan, -3.0]) is None
