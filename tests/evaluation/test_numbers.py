"""Last numbers of texts."""

import pytest

from neuroada_serve.evaluation.numbers import is_number, last_number, same_number


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
