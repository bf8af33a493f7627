"""Rows as dictionaries, with the place of each: those of a file, or of the hub.

    .jsonl .ndjson    an object a line
    .json             a list of objects
    .csv .tsv         a header, then a row each; comma, semicolon or tab
    .parquet          through pyarrow
    any other name    as JSON lines
    .gz               behind any of them but parquet

Text is UTF-8. Nothing in a file is ever run.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neuroada_serve.config import RowSource
from neuroada_serve.errors import DataError, UsageError

Data = Path | RowSource

MAX_FAULTS = 10
_ZIP = b"PK\x03\x04"  # .xlsx and .ods too
_MOST_FIELD = 1 << 24  # characters of a CSV cell


class RecordFault(Exception):
    """What is wrong with one row."""


class Faults:
    """The faults of some rows: the first in full, the rest as a number."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._shown: list[str] = []
        self._more = 0

    def add(self, number: int, fault: str) -> None:
        if len(self._shown) < MAX_FAULTS:
            self._shown.append(f"  {place(self._data, number)}: {fault}")
        else:
            self._more += 1

    def raise_if_any(self) -> None:
        if not self._shown:
            return
        count = len(self._shown) + self._more
        lines = [f"{self._data} has {count} unusable {'row' if count == 1 else 'rows'}:"]
        lines += self._shown
        if self._more:
            lines.append(f"  and {self._more} more")
        raise DataError("\n".join(lines))


def place(data: Data, number: int) -> str:
    """What a row's number counts: lines of a text file, else rows."""
    counts_rows = not isinstance(data, Path) or _kind(data) in ("json", "parquet")
    return f"{'row' if counts_rows else 'line'} {number}"


def _kind(path: Path) -> str:
    names = path.name.lower().removesuffix(".gz").split(".")[1:]
    return names[-1] if names else ""


def read_records(path: Data) -> Iterator[tuple[int, dict[str, Any] | RecordFault]]:
    """(number, row) of every row; in place of a row that cannot be read, its fault.

    Numbers count from 1, see `place`. Cells of CSV are strings.

    Raises:
        DataError: the file cannot be read at all; names the line where there is one.
        UsageError: its kind needs a package that is missing.
    """
    if not isinstance(path, Path):
        return path.records()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is no whole gzip file: {error}") from error
    kind = _kind(path)
    if kind in ("csv", "tsv"):
        return _csv_rows(path, data, kind)
    if kind == "json":
        return _json_rows(path, data)
    if kind == "parquet":
        return _parquet_rows(path, data)
    if data.startswith(_ZIP):
        raise DataError(f"{path} is a spreadsheet or another archive; save it as CSV UTF-8")
    return _json_lines(data)


def _json_lines(data: bytes) -> Iterator[tuple[int, dict[str, Any] | RecordFault]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, _object(line)


def _object(line: bytes) -> dict[str, Any] | RecordFault:
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RecordFault("not UTF-8 text; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RecordFault(
            f"not valid JSON ({error.msg}, column {error.colno}); each line must be one JSON object"
        )
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return RecordFault("no JSON that can be read")
    if not isinstance(raw, dict):
        return RecordFault(f"must be a JSON object, not {type(raw).__name__}")
    return raw


def _json_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any] | RecordFault]]:
    try:
        raw = json.loads(_text(path, data))
    except json.JSONDecodeError as error:
        hint = "; an object a line is .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path} is not JSON: {error.msg}, line {error.lineno}{hint}") from None
    except (RecursionError, ValueError):
        raise DataError(f"{path} is no JSON that can be read") from None
    if not isinstance(raw, list):
        raise DataError(f"{path} must hold a list of objects, not {type(raw).__name__}")
    for number, row in enumerate(raw, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, RecordFault(f"must be a JSON object, not {type(row).__name__}")


def _csv_rows(
    path: Path, data: bytes, kind: str
) -> Iterator[tuple[int, dict[str, Any] | RecordFault]]:
    text = _text(path, data)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path} line {line} has a zero byte: save it as plain UTF-8 CSV")
    separator = "\t" if kind == "tsv" else _separator(text)
    csv.field_size_limit(_MOST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    line = 1  # where the row begins
    try:
        for cells in reader:
            if not cells or cells == [""]:
                line = reader.line_num + 1
                continue
            if header is None:
                header = _header(path, line, cells)
            elif len(cells) != len(header):
                yield (
                    line,
                    RecordFault(
                        f"has {len(cells)} cells, the header {len(header)}: quote cells that "
                        f"contain {separator!r} or line breaks"
                    ),
                )
            else:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        fix = "a quote within a quoted cell is written twice"
        if "limit" in str(error):
            fix = "shorten the cell, or close the quote that it begins with"
        raise DataError(f"{path} line {line}: {error}; {fix}") from error


def _separator(text: str) -> str:
    """The one that the header has most of, outside quotes."""
    header = "".join(text.partition("\n")[0].partition("\r")[0].split('"')[::2])
    return max(",;\t", key=header.count)


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or "" in names:
        what = f"names {doubled[0]!r} twice" if doubled and doubled[0] else "has a nameless column"
        raise DataError(
            f"{path} line {line}: the header {what}; the first line must name the columns"
        )
    return names


def _parquet_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    if find_spec("pyarrow") is None:
        raise UsageError(
            f'{path} is parquet, which needs pyarrow: run pip install "neuroada-serve[parquet]", '
            "or save it as .jsonl"
        )
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)


def _text(path: Path, data: bytes) -> str:
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 text; save the file as UTF-8 (in a spreadsheet: "
            '"CSV UTF-8")'
        ) from None
