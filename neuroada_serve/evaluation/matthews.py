"""Matthews' correlation of right and predicted labels, GLUE's metric for CoLA."""

import math
from collections.abc import Sequence


def matthews(confusion: Sequence[Sequence[int]]) -> float:
    """Return Matthews' correlation of two or more labels (Gorodkin's R_K), in [-1, 1]; 0 if one
    side never varies.

    Args:
        confusion: [labels][labels + 1] counts by right label, then by predicted one; the last
            column counts rows without a prediction.
    """
    right = [sum(row) for row in confusion]
    predicted = [sum(row[label] for row in confusion) for label in range(len(confusion[0]))]
    rows = sum(right)
    agreed = sum(confusion[label][label] for label in range(len(confusion)))
    by_chance = sum(p * r for p, r in zip(predicted, right, strict=False))
    spread = (rows**2 - sum(p * p for p in predicted)) * (rows**2 - sum(r * r for r in right))
    return (agreed * rows - by_chance) / math.sqrt(spread) if spread else 0.0
