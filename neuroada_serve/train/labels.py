"""Clean the names of labels, and sort them."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from neuroada_serve.train.rows import counted, shown

_WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
_MOST_TOLD = 4


def clean_labels(labels: Sequence[str], known: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Return the labels without spaces around them and whole numbers without .0, and remarks on
    that, and on labels that differ in case alone, as clauses.

    pandas writes .0 wherever one row of the column has no number.

    Args:
        known: labels that a classifier has; .0 stays where they have it.
    """
    notes = []
    cleaned = [label.strip() for label in labels]
    if spaced := sum(map(str.__ne__, cleaned, labels)):
        notes.append(f"spaces around {counted(spaced, 'label')} left out")
    distinct = set(cleaned)
    fractions = [label for label in distinct if "." in label]
    if fractions and set(known).isdisjoint(fractions) and all(map(_WHOLE.fullmatch, distinct)):
        cleaned = [label.partition(".")[0] for label in cleaned]
        short = min(fractions)
        notes.append(f"labels such as {short} read as {short.partition('.')[0]}")
    for group in groups_by(str.casefold, cleaned)[:_MOST_TOLD]:
        notes.append(f"labels {' and '.join(map(repr, map(shown, group)))} differ in case alone")
    return cleaned, notes


def groups_by(key: Callable[[str], str], texts: Iterable[str]) -> list[list[str]]:
    """Return groups of different texts that share one key."""
    groups: dict[str, list[str]] = {}
    for text in sorted(set(texts)):
        groups.setdefault(key(text), []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted by value if all are numbers, else as texts."""
    distinct = sorted(set(labels))
    try:
        values = {label: float(label) for label in distinct}
    except ValueError:
        return distinct
    return (
        sorted(distinct, key=values.__getitem__)
        if all(map(math.isfinite, values.values()))
        else distinct
    )
