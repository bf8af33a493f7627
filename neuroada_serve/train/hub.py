"""Read a data set of the Hugging Face hub with `datasets`, which runs no code from the hub."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.train.files import label_name, plain_row

PREFIX = "hub:"
_FORM = "hub:OWNER/NAME:CONFIG@SPLIT"
_SOURCE = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^@]+))?")


@dataclass(frozen=True, eq=False)
class HubRows:
    """The rows of one split, read from the cache of `datasets`.

    name: the set as faults and model cards call it: OWNER/NAME:CONFIG@SPLIT, config where one was
        named.
    classes: column -> the names of its labels in their order.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    _rows: Any  # datasets.Dataset
    _clean: Callable[[dict[str, Any]], dict[str, Any]]

    def __str__(self) -> str:
        return PREFIX + self.name

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, row) from 1. Values are what JSON holds; dates, for example, become
        texts."""
        for number, row in enumerate(self._rows, start=1):
            yield number, plain_row(self._clean(row))


def open_hub_rows(source: str) -> HubRows:
    """Open the rows of hub:OWNER/NAME, optionally with :CONFIG and @SPLIT behind it.

    Labels that are stored as numbers become their names, -1 (no label) None; images, sound and the
    like are left out.

    Args:
        source: its split is train where none is named; @train[:1000] and @train+test are splits
            too. A folder on this machine is named by its whole path.

    Raises:
        DataError: no such set, config or split, or the hub cannot be reached.
        UsageError: `source` is malformed, a local folder hides it, or `datasets` is missing.
    """
    found = _SOURCE.fullmatch(source.removeprefix(PREFIX))
    if found is None:
        raise UsageError(f"{source!r} must be written {_FORM}")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f'{source} needs the package datasets: run pip install "neuroada-serve[hub]"'
        ) from error

    name, config, split = found["name"], found["config"], found["split"] or "train"
    if Path(name).exists() and not Path(name).is_absolute():
        raise UsageError(
            f"{source}: {name} is here as well, and would be read instead of the hub's set; run "
            f"from another folder, or name the one here as {PREFIX}{Path(name).resolve()}"
        )
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many libraries: the hub's, the network's, the file formats'
        raise DataError(f"{source} cannot be read: {error}{_fix(error)}") from error
    rows = rows.select_columns(
        [column for column, kind in rows.features.items() if not hasattr(kind, "decode_example")]
    )
    kinds = dict(rows.features)

    def clean(row: dict[str, Any]) -> dict[str, Any]:
        return {column: _named(kinds[column], value) for column, value in row.items()}

    shown = f"{name}:{config}" if config else name
    classes = {
        column: tuple(kind.names)
        for column, kind in kinds.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    return HubRows(f"{shown}@{split}", classes, rows, clean)


def _fix(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"; it must be {_FORM}, public or yours by `hf auth login`"
    if isinstance(error, ConnectionError | TimeoutError):
        return "; the hub is out of reach, and the set is not in the cache of `datasets`"
    return ""


def _named(kind: Any, value: Any) -> Any:
    """Replace numbers of labels in a value by their names, at any depth."""
    from datasets import ClassLabel

    if value is None:
        return None
    if isinstance(kind, ClassLabel):
        return label_name(tuple(kind.names), value)
    if isinstance(kind, dict):
        return {key: _named(kind[key], part) for key, part in value.items()}
    inner = getattr(kind, "feature", None)  # of List and LargeList
    if inner is not None and isinstance(value, list):
        return [_named(inner, part) for part in value]
    return value
