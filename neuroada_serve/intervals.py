"""Confidence intervals of shares."""

import math

_Z = 1.959964  # standard deviations around the mean that hold 95 % of a normal distribution


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, (low, high) within [0, 1].

    Unlike the plain normal interval it is right for few rows and for shares near 0 and 1.

    Args:
        hits: 0 to rows.
        rows: at least 1.
    """
    assert 0 <= hits <= rows
    assert rows > 0
    share, spread = hits / rows, _Z * _Z / rows
    centre = share + spread / 2
    reach = _Z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # At the ends the bound is the end itself; rounding must not carry it past.
    return (0.0 if hits == 0 else low), (1.0 if hits == rows else high)
