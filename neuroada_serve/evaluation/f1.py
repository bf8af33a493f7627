"""F1 of the words of an answer, and of the labels of a classification."""

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_SYMBOLS = set(string.punctuation)


def token_f1(text: str, right: str) -> float:
    """Return F1 of the words that two texts share, in [0, 1], as in SQuAD's official script.

    Case, punctuation (of any script) and English articles do not count. Two texts without words
    have 1; one with and one without have 0.
    """
    said, wanted = _words(text), _words(right)
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    kept = "".join(
        c for c in text.lower() if c not in _SYMBOLS and not unicodedata.category(c).startswith("P")
    )
    return [word for word in kept.split() if word not in _ARTICLES]


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Return the mean F1 over the labels that are right, or predicted, in any row.

    Args:
        confusion: [labels][labels + 1] counts by right label, then by predicted one; the last
            column counts rows without a prediction. At least one count is above 0.
    """
    scores = []
    for label, row in enumerate(confusion):
        predicted = sum(counts[label] for counts in confusion)
        if predicted + sum(row):
            scores.append(2 * row[label] / (predicted + sum(row)))
    return sum(scores) / len(scores)
