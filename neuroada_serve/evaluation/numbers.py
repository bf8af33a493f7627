"""Numeric answers, by the rule of the method's paper: the last number in the text counts."""

import re

TOLERANCE = 1e-3

# A sign belongs to a number only where it can be no subtraction: "5-3" and "5 - 3" end in 3, "=-3",
# "-$3" and "(-3)" in -3. Commas part thousands only: "3,4" are two numbers.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-\N{MINUS SIGN}][$€£]?)?"
    r"(?P<digits>(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)


def last_number(text: str) -> float | None:
    """Return the last number in a text; None if there is none.

    "1,234" is 1234, "-3." is -3, "$5" is 5. A fraction is two numbers, as in the paper: "3/4" ends
    in 4. Digits of any script count.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    value = float(found[-1]["digits"].replace(",", ""))
    return -value if found[-1]["sign"] else value


def is_number(text: str) -> bool:
    """Return whether a text is one number, apart from white space."""
    return _NUMBER.fullmatch(text.strip()) is not None


def same_number(text: str, right: float) -> bool:
    """Return whether the last number of a text is the right one, within 0.001."""
    value = last_number(text)
    # Decimal fractions are not exact in binary: 16.001 - 16 is a little above 0.001.
    return value is not None and abs(value - right) <= TOLERANCE * (1 + 1e-9) + 1e-12
