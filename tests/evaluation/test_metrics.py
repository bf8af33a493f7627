"""Rules of each metric for a right answer, on texts."""

import math

import pytest

from neuroada_serve.evaluation.bootstrap import confusion_interval, mean_interval
from neuroada_serve.evaluation.exact import after_trigger, exact_match
from neuroada_serve.evaluation.f1 import macro_f1, token_f1
from neuroada_serve.evaluation.numbers import is_number, last_number, same_number
from neuroada_serve.evaluation.options import likeliest, named_option
from neuroada_serve.intervals import wilson

# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("16.0", 16),
        ("The answer is 9.8.", 9.8),
        ("1,234", 1234),
        ("12,345,678.5 in all", 12345678.5),
        ("1, 2, 3", 3),
        ("3,4", 4),
        ("1,2345", 2345),
        ("1,234,5", 5),
        ("12,34,567", 34567),
        ("-3.", -3),
        ("x = -3", -3),
        ("x=-3", -3),
        ("(-3)", -3),
        ("−7", -7),
        ("5-3", 3),
        ("5 - 3", 3),
        ("(5)-3", 3),
        ("$5", 5),
        ("-$5.25", -5.25),
        ("€1,000", 1000),
        ("50%", 50),
        ("3/4", 4),
        (".5", 0.5),
        ("-.5", -0.5),
        ("0.5.", 0.5),
        ("5.", 5),
        ("1.2.3", 3),
        ("+4", 4),
        ("7 - 3 = 4 crayons", 4),
        ("10²", 10),
        ("١٢", 12),
        ("\uff11\uff16", 16),  # full width
        ("007", 7),
        ("answer2", 2),
        ("9\n", 9),
    ],
)
def test_last_number_of_a_text(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize("text", ["", " ", "none at all", "-", ".", ",", "½ of it", "$", "-."])
def test_text_without_a_number_has_none(text):
    assert last_number(text) is None
    assert not same_number(text, 0)


@pytest.mark.parametrize(
    ("text", "right", "same"),
    [
        ("so it is 16", 16.0, True),
        ("16.0", 16, True),
        ("16.001", 16, True),
        ("16.0011", 16, False),
        ("15.999", 16, True),
        ("15.998", 16, False),
        ("-16", 16, False),
        ("16 of 20", 16, False),
        ("9" * 400, 1.0, False),
        ("1,000,000", 1e6, True),
    ],
)
def test_numbers_are_the_same_to_within_a_thousandth(text, right, same):
    assert same_number(text, right) is same


def test_a_number_alone_is_told_from_a_text_with_one():
    assert all(map(is_number, ["16.0", " -3 ", "1,234", ".5"]))
    assert not any(map(is_number, ["", "3 apples", "answer3", "1 2", "3/4"]))


# --- exact -------------------------------------------------------------------------------------


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


# --- options -----------------------------------------------------------------------------------

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


# --- F1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right", "f1"),
    [
        ("The cat!", "cat", 1),
        ("a cat sat", "the cat", 2 / 3),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("", "", 1),
        ("the", "a", 1),
        ("...", "", 1),
        ("cat cat", "cat", 2 / 3),
        ("cat", "cat cat cat cat", 0.4),
        ("Élan—vital", "élanvital", 1),
        ("«oui»", "oui", 1),
        ("16.0", "160", 1),  # SQuAD's rule: punctuation goes
    ],
)
def test_token_f1_as_in_squad(text, right, f1):
    assert token_f1(text, right) == pytest.approx(f1)
    assert token_f1(right, text) == pytest.approx(f1)


def test_macro_f1_is_the_mean_over_labels_that_occur():
    assert macro_f1([[2, 0, 0], [0, 3, 0]]) == 1
    assert macro_f1([[1, 1, 0], [0, 2, 0]]) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert macro_f1([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]) == 1  # the third never occurs
    assert macro_f1([[0, 0, 2], [0, 2, 0]]) == 0.5  # two rows without a choice


# --- intervals ---------------------------------------------------------------------------------


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
