"""Read files of rows.

    .jsonl .ndjson    an object a line
    .json             a list of objects, alone or beside other keys ({"data": [...]}), or columns
    .csv .tsv         a header, then a row each; comma, semicolon or tab
    .parquet          through pyarrow
    any other name    as JSON lines
    .gz               behind any of them

JSON lines are known under other names too. Text is UTF-8, or UTF-16 that says so. Nothing in a file
is ever run.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.train.rows import Data, RecordFault, Records, kind_of, listed
from neuroada_serve.train.tables import read_table

_BEGINNINGS = (  # of files that hold something else, what it is, and the way out
    (
        b"version https://git-lfs.github.com/",
        "is a Git LFS pointer, not the data: run git lfs pull",
    ),
    (b"<!doctype html", "is a web page, not data: download the raw file"),
    (b"<html", "is a web page, not data: download the raw file"),
    (b"<?xml", "is XML; save it as .jsonl or CSV"),
    (b"PK\x03\x04", "is a spreadsheet or another archive; save it as CSV UTF-8"),  # .xlsx, .ods
    (b"\xd0\xcf\x11\xe0", "is a spreadsheet of an old kind; save it as CSV UTF-8"),  # .xls
    (b"BZh", "is compressed by bzip2; decompress it first"),
    (b"\xfd7zXZ\0", "is compressed by xz; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; decompress it first"),
    (b"%PDF", "is a PDF; save its rows as CSV UTF-8"),
    (b"SQLite format 3\0", "is a database; export a table of it as CSV UTF-8"),
    (b"ARROW1", "is an Arrow file; save it as .parquet"),
    (b"\x80\x04", "is a Python pickle, which is never read; save it as .parquet or .jsonl"),
    (b"\x80\x05", "is a Python pickle, which is never read; save it as .parquet or .jsonl"),
)
_LINES = ("jsonl", "ndjson", "json")
_PARQUET = b"PAR1"
_GZIP = b"\x1f\x8b"
_BOMS = (  # UTF-32's begins as UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONVERSATIONS = ("messages", "conversations", "prompt", "completion")  # lists within one row

Numbered = tuple[int, dict[str, Any] | RecordFault]


def read_records(data: Data) -> Records:
    """Read the rows of a file or of the hub, and note what was odd about them.

    Numbers count from 1, see `train.rows.place`. Cells of CSV are strings.

    Raises:
        DataError: the file cannot be read at all; names the line where there is one.
        UsageError: its kind needs a package that is missing.
    """
    if not isinstance(data, Path):
        return Records(list(data.records()), classes=data.classes)
    try:
        content = data.read_bytes()
    except OSError as error:
        raise DataError(f"data file {data} cannot be read: {error.strerror}") from error
    if data.name.lower().endswith(".gz") or content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{data} is not a complete gzip file: {error}") from error
    content = _utf8(data, content)
    if not content.strip():
        raise DataError(f"{data} is empty")
    _refuse_others(data, content)
    kind = kind_of(data)
    if kind == "parquet":
        return _parquet_rows(data, content)
    if kind in ("csv", "tsv") and not _begins_with_object(content):
        if _is_json(content):
            raise DataError(f"{data} is JSON; name it .json")
        return read_table(str(data), _text(data, content), "\t" if kind == "tsv" else None)
    if kind == "json":
        return _json_rows(data, content)
    return _json_lines(data, content)


def _utf8(path: Path, content: bytes) -> bytes:
    """Convert text to UTF-8 without a byte order mark, from UTF-16 or 32 if the mark says so."""
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            try:
                return content.decode(encoding).encode()
            except UnicodeError as error:
                raise DataError(
                    f"{path} is not complete {encoding.upper()} text: {error}"
                ) from None
    return content.removeprefix(codecs.BOM_UTF8)


def _refuse_others(path: Path, content: bytes) -> None:
    beginning = content[:512].lstrip()
    for known, what in _BEGINNINGS:
        if beginning.startswith(known) or beginning.lower().startswith(known):
            raise DataError(f"{path} {what}")
    if content[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive; unpack it first")
    if content.startswith(_PARQUET) and kind_of(path) != "parquet":
        raise DataError(f"{path} is a parquet file; name it .parquet")


# --- JSON --------------------------------------------------------------------------------------


def _begins_with_object(content: bytes) -> bool:
    """Tell whether the first line is a JSON object by itself."""
    first = content.lstrip().partition(b"\n")[0]
    return first.startswith(b"{") and isinstance(_object(first), dict)


def _is_json(content: bytes) -> bool:
    """Tell whether the text is one JSON list or object."""
    if content.lstrip()[:1] not in (b"[", b"{"):
        return False
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, content: bytes) -> Records:
    rows: list[Numbered] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            rows.append((number, _object(line)))
    if isinstance(rows[0][1], RecordFault) and _is_json(content):
        raise DataError(f"{path} is one JSON document, not an object a line; name it .json")
    if kind_of(path) not in _LINES and all(isinstance(row, RecordFault) for _, row in rows):
        raise DataError(f"{path} has no JSON object a line; name it .csv, .tsv, .json or .parquet")
    return Records(rows)


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
        return RecordFault("not readable JSON")
    if not isinstance(raw, dict):
        return RecordFault(f"must be a JSON object, not {type(raw).__name__}")
    return raw


def _json_rows(path: Path, content: bytes) -> Records:
    try:
        raw = json.loads(_text(path, content))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _begins_with_object(content):
            lines = _json_lines(path, content)
            return Records([(n, row) for n, (_, row) in enumerate(lines.rows, start=1)])
        raise DataError(f"{path} is not JSON: {error.msg}, line {error.lineno}") from None
    except (RecursionError, ValueError):
        raise DataError(f"{path} is not readable JSON") from None
    rows = raw if isinstance(raw, list) else _rows_within(path, raw)
    return Records(
        [
            (number, row if isinstance(row, dict) else _no_object(row))
            for number, row in enumerate(rows, start=1)
        ]
    )


def _no_object(row: Any) -> RecordFault:
    return RecordFault(f"must be a JSON object, not {type(row).__name__}")


def _rows_within(path: Path, raw: Any) -> list[Any]:
    """Return the rows of a document that is not a list: the one list in it, columns, or the
    document itself as a row."""
    if not isinstance(raw, dict):
        raise DataError(f"{path} must hold a list of objects, not {type(raw).__name__}")
    if isinstance(raw.get("columns"), list) and isinstance(raw.get("data"), list):
        raise DataError(f'{path} is split into columns and data; in pandas write orient="records"')
    lists = [key for key, value in raw.items() if _is_list_of_objects(value)]
    if raw and not set(lists) & set(_CONVERSATIONS):
        if len(lists) == 1:
            return list(raw[lists[0]])
        if lists:
            raise DataError(f"{path} holds several lists of rows ({listed(lists)}): save one alone")
        if (columns := _columns(raw)) is not None:
            return columns
    return [raw]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _columns(raw: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of {"text": {"0": ...}, "label": {"0": ...}}, pandas' default, or of {"text":
    [...], "label": [...]}."""
    parts = list(raw.values())
    if all(isinstance(part, dict) for part in parts):
        keys = list(parts[0])
        if all(list(part) == keys for part in parts) and all(key.isdecimal() for key in keys):
            return [{name: part[key] for name, part in raw.items()} for key in keys]
        return None
    listed_all = len(parts) > 1 and all(isinstance(part, list) for part in parts)
    if listed_all and len({len(part) for part in parts}) == 1:
        return [dict(zip(raw, cells, strict=True)) for cells in zip(*parts, strict=True)]
    return None


# --- parquet -----------------------------------------------------------------------------------


def _parquet_rows(path: Path, content: bytes) -> Records:
    if find_spec("pyarrow") is None:
        raise UsageError(
            f'{path} is parquet, which needs pyarrow: run pip install "neuroada-serve[parquet]", '
            "or save it as .jsonl"
        )
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
        names = table.column_names
        doubled = sorted({name for name in names if names.count(name) > 1})
        rows = table.drop_columns(doubled).to_pylist()
        classes = _classes(table.schema.metadata or {})
    except (ArrowException, OSError, ValueError, ArithmeticError, KeyError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    for column, labels in classes.items():
        for row in rows:
            row[column] = label_name(labels, row.get(column))
    found = [(number, plain_row(row)) for number, row in enumerate(rows, start=1)]
    return Records(found, doubled=tuple(doubled), classes=classes)


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the names of labels that are stored as numbers; `datasets` notes them beside the
    table."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        labels = {n: f for n, f in features.items() if f.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, f["names"])) for name, f in labels.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def label_name(names: tuple[str, ...], value: Any) -> str | None:
    """Return the name of a label's number; None for no label, which is -1."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert values to what JSON can hold; dates, for example, become texts."""
    plain: dict[str, Any] = json.loads(json.dumps(row, default=_as_text))
    return plain


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 text; save the file as UTF-8 (in a spreadsheet: "
            '"CSV UTF-8")'
        ) from None
