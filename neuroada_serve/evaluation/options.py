"""Which of some options an answer is."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Pick = Literal["first", "last"]


def named_option(text: str, options: Sequence[str], pick: Pick = "first") -> int | None:
    """Position of the option that a text names first, or last; None where it names none.

    An option is named where it stands as a whole word or words: "answer1" is not in "answer12" (in
    scripts without spaces, as Chinese, anywhere).
    Where two begin at one place the longer counts, and nothing inside it: "very good" does not name
    "good". Case matters for single characters (an article is not option A's "a"), and where two
    options differ by case alone.

    Args:
        options: distinct, none empty.
    """
    longest_first = sorted(range(len(options)), key=lambda i: -len(options[i]))
    same_in_lower = len({option.casefold() for option in options}) < len(options)
    ignore_case = not same_in_lower and any(len(option) > 1 for option in options)
    alternatives = "|".join(f"({_as_words(options[i])})" for i in longest_first)
    pattern = re.compile(alternatives, re.IGNORECASE if ignore_case else re.NOFLAG)
    found = [match.lastindex for match in pattern.finditer(text)]
    group = None if not found else found[0 if pick == "first" else -1]
    return None if group is None else longest_first[group - 1]


def _as_words(option: str) -> str:
    before, after = (
        edge if unicodedata.east_asian_width(character) not in "WF" else ""
        for character, edge in ((option[0], r"(?<!\w)"), (option[-1], r"(?!\w)"))
    )
    return before + re.escape(option) + after


def likeliest(loglikelihoods: Sequence[float]) -> int | None:
    """Position of the highest value; None where it is shared, or one of them is no number: such an
    answer is undecided, and counts as wrong."""
    if any(math.isnan(value) for value in loglikelihoods):
        return None
    best = max(loglikelihoods)
    first, *others = [i for i, value in enumerate(loglikelihoods) if value == best]
    return None if others else first
