"""Tables as text, as spreadsheets, pandas and R write them: a header, then one line per row.

CSV cells may be quoted, with line breaks inside. Quotation marks tell whether a tab-separated table
is quoted: a writer that quotes, quotes every cell that contains one. In GLUE's files they are text.
"""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.train.rows import RecordFault, Records, counted, is_blank

Cells = tuple[int, list[str]]  # a row's first line, and what is in it

_SEPARATORS = ",;\t"
_TRIED_LINES = 100  # of a table whose separator is sought
_MOST_FIELD = 1 << 24  # characters of a cell
_EXCEL = re.compile(
    r'"?sep=([^\w\s"]|\t)"?[ \t]*(\r\n|\r|\n|\Z)'
)  # how Excel is told the separator
_QUOTED = re.compile(r'(?<![^\t\r\n])"[^"]*(?:""[^"]*)*"(?=[\t\r\n]|\Z)')  # cells of a TSV


def read_table(name: str, text: str, separator: str | None) -> Records:
    """Read the rows of a table; cells are strings.

    Args:
        name: of the data, for messages.
        separator: between cells; default: as the table's beginning suggests.

    Raises:
        DataError: names the line from which nothing can be read.
    """
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{name} line {line} has a zero byte: save it as plain UTF-8 CSV")
    notes: list[str] = []
    first = 1
    if said := _EXCEL.match(text):
        separator, text, first = said[1], text[said.end() :], 2
    elif separator is None:
        separator = _separator(text)
    quoted = separator != "\t" or _is_quoted(name, text, first)
    if not quoted and '"' in text:
        notes.append("quotation marks read as text")
    spaced = separator != "\t" and _is_spaced(text, separator)
    if spaced:
        notes.append(f"spaces after {separator!r} left out")
    rows = _rows(name, text, first, separator, quoted, spaced)
    return _with_header(name, rows, separator, notes)


def _with_header(name: str, rows: Iterator[Cells], separator: str, notes: list[str]) -> Records:
    header: list[str] | None = None
    doubled: list[str] = []
    found: list[tuple[int, dict[str, Any] | RecordFault]] = []
    blank = 0
    nameless_used = False
    for line, cells in rows:
        if all(map(is_blank, cells)):
            blank += header is not None and len(cells) > 1
        elif header is None:
            header = [cell.strip() for cell in cells]
            doubled = sorted({n for n in header if n and header.count(n) > 1})
            last = max(i for i, column in enumerate(header) if column)
        elif len(cells) <= last or not all(map(is_blank, cells[len(header) :])):
            found.append((line, _uneven(cells, header, separator)))
        else:
            pairs = list(zip(header, cells, strict=False))
            nameless_used |= any(not column and not is_blank(cell) for column, cell in pairs)
            kept = {n: cell for n, cell in pairs if n and n not in doubled}
            found.append((line, kept))
    if blank:
        notes.append(f"{counted(blank, 'blank row')} left out")
    if nameless_used:
        notes.append("a column without a name not used")
    return Records(found, tuple(notes), tuple(doubled))


def _uneven(cells: list[str], header: list[str], separator: str) -> RecordFault:
    return RecordFault(
        f"has {counted(len(cells), 'cell')}, the header {len(header)}: quote cells that contain "
        f"{separator!r} or line breaks"
    )


def _rows(
    name: str, text: str, first: int, separator: str, quoted: bool, spaced: bool = False
) -> Iterator[Cells]:
    """Split a table into rows.

    Raises:
        DataError: names the line on which the row at fault begins.
    """
    try:
        yield from _parsed(text, first, separator, quoted, spaced)
    except _Broken as error:
        fix = "a quote within a quoted cell is written twice"
        if "limit" in error.reason:
            fix = "shorten the cell, or close the quote that it begins with"
        elif "unexpected end" in error.reason:
            error.reason = "a cell begins with a quote that is never closed"
            fix = "close it, or write the quotes of a text twice, and around it"
        raise DataError(f"{name} line {error.line}: {error.reason}; {fix}") from None


class _Broken(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def _parsed(
    text: str, first: int, separator: str, quoted: bool, spaced: bool = False
) -> Iterator[Cells]:
    csv.field_size_limit(_MOST_FIELD)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=spaced,
        strict=True,
    )
    line = first
    try:
        for cells in reader:
            yield line, cells
            line = first + reader.line_num
    except csv.Error as error:
        raise _Broken(line, str(error)) from None


# --- how it is written -------------------------------------------------------------------------


def _separator(text: str) -> str:
    """Choose the separator: one in the header, outside quotes, that gives most rows as many
    cells."""
    lines = io.StringIO(text, newline="")
    beginning = "".join(line for line, _ in zip(lines, range(_TRIED_LINES), strict=False))
    header = next(filter(str.strip, io.StringIO(beginning, newline="")), "")
    outside = "".join(header.split('"')[::2])
    found = [each for each in _SEPARATORS if each in outside]
    if not found:
        return "|" if "|" in outside else ","

    def even_rows(separator: str) -> int:
        counts: list[int] = []
        try:
            for _, cells in _parsed(beginning, 1, separator, quoted=True):
                counts.append(len(cells))
        except _Broken:
            pass  # the beginning may end within a cell
        return counts.count(counts[0]) if counts else 0

    return max(found, key=lambda each: (even_rows(each), outside.count(each)))


def _is_quoted(name: str, text: str, first: int) -> bool:
    """Tell whether cells of a tab-separated table are quoted.

    Raises:
        DataError: it can be read either way, into other rows; names the line.
    """
    if '"' not in text or '"' in _QUOTED.sub("", text):
        return False
    quoted = _rows(name, text, first, "\t", quoted=True)
    several = next((row for row in quoted if any(re.search("[\r\n]", c) for c in row[1])), None)
    if several is not None:
        plain = _rows(name, text, first, "\t", quoted=False)
        if len({len(cells) for _, cells in plain if any(cells)}) == 1:
            raise DataError(
                f"{name} line {several[0]}: one row with a quoted cell of several lines, or rows "
                "with quotes as text: both can be read; save it as .csv or .jsonl"
            )
    return True


def _is_spaced(text: str, separator: str) -> bool:
    """Tell whether the header has a space after each separator: a, b, c."""
    header = next(filter(str.strip, io.StringIO(text, newline="")), "")
    rest = header.rstrip("\r\n").split(separator)[1:]
    return bool(rest) and all(re.match(" +[^ ]", cell) for cell in rest)
