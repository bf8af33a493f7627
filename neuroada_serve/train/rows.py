"""Rows as dictionaries, the place of each row in its data, and messages about faulty rows.

`train/files.py` reads the rows of a file, `train/hub.py` those of the hub.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.row_source import RowSource

Data = Path | RowSource

_MOST_FAULTS = 10  # different ones, told in full
_MOST_NUMBERS = 5  # of rows with one fault
_MOST_NAMES = 12
_MOST_CHARS = 60  # of a name or a cell


class RecordFault(Exception):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Records:
    """The rows of a data set, as read.

    rows: (number, row) of each, see `place`; a row that cannot be read is its fault instead.
    notes: remarks on how they were read, as clauses.
    doubled: names that the header has more than once; rows do not hold their cells.
    classes: column -> the names of its labels in order, where the data says that.
    """

    rows: Sequence[tuple[int, dict[str, Any] | RecordFault]]
    notes: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Faults:
    """Faults of rows, collected; equal faults are reported once, with all their rows."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._rows: dict[str, list[int]] = {}

    def add(self, number: int, fault: str) -> None:
        self._rows.setdefault(fault, []).append(number)

    def raise_if_any(self) -> None:
        if not self._rows:
            return
        count = sum(map(len, self._rows.values()))
        lines = [f"{self._data} has {count} unusable {'row' if count == 1 else 'rows'}:"]
        shown = sorted(self._rows.items(), key=lambda one: one[1][0])[:_MOST_FAULTS]
        lines += [f"  {places(self._data, numbers)}: {fault}" for fault, numbers in shown]
        if more := count - sum(len(numbers) for _, numbers in shown):
            lines.append(f"  and {more} more")
        raise DataError("\n".join(lines))


def place(data: Data, number: int) -> str:
    """Name a row by its number: lines in text files, rows elsewhere."""
    return f"{_unit(data)} {number}"


def places(data: Data, numbers: Sequence[int]) -> str:
    """Name several rows: lines 3, 7, 9 and 190 more."""
    if len(numbers) == 1:
        return place(data, numbers[0])
    shown = [str(number) for number in numbers]
    if len(shown) > _MOST_NUMBERS + 1:
        shown = [*shown[:_MOST_NUMBERS], f"{len(shown) - _MOST_NUMBERS} more"]
    return f"{_unit(data)}s {', '.join(shown[:-1])} and {shown[-1]}"


def _unit(data: Data) -> str:
    counts_rows = not isinstance(data, Path) or kind_of(data) in ("json", "parquet")
    return "row" if counts_rows else "line"


def kind_of(path: Path) -> str:
    """Return the ending of a file's name, .gz removed: csv."""
    names = path.name.lower().removesuffix(".gz").split(".")[1:]
    return names[-1] if names else ""


def shown(text: str) -> str:
    """Shorten a name or a cell for a message, and keep only visible characters."""
    text = text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 3] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def listed(names: Sequence[str]) -> str:
    """Join names for a message: a, b, c and 5 more."""
    told = [shown(name) for name in names[:_MOST_NAMES]]
    more = len(names) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


def is_blank(value: Any) -> bool:
    """Tell whether a cell is empty: null, not a number (pandas' null), or only spaces."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 row, 2 rows."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
