"""Options named by answers, and the likeliest of them."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Pick = Literal["first", "last"]


def named_option(text: str, options: Sequence[str], pick: Pick = "first") -> int | None:
    """Return the position of the option that a text names first, or last; None if it names none.

    Options count as whole words only: "answer1" is not in "answer12" (anywhere in scripts without
    spaces, such as Chinese). If two begin at one place the longer one counts, and no option inside
    it: "very good" does not name "good". Case matters for single characters (an article is not
    option A's "a"), and if two options differ in case only.

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
    """Return the position of the highest value; None if several share it or one is nan, which is
    undecided and counts as wrong."""
    if any(math.isnan(value) for value in loglikelihoods):
        return None
    best = max(loglikelihoods)
    first, *others = [i for i, value in enumerate(loglikelihoods) if value == best]
    return None if others else first
