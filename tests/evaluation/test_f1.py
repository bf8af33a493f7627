"""F1 of words and of labels."""

import pytest

from neuroada_serve.evaluation.f1 import macro_f1, token_f1


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
