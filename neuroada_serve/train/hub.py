"""Rows of a data set on the Hugging Face hub, read by `datasets`, which runs no code of theirs."""

import json
import re
from pathlib import Path

from neuroada_serve.errors import DataError, UsageError

PREFIX = "hub:"
_SOURCE = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


def save_hub_rows(source: str, folder: Path) -> Path:
    """The rows of hub:OWNER/NAME, with :CONFIG and @SPLIT behind it as wanted, as a JSONL file.

    Labels that are stored as numbers become their names; images, sound and the like are left out.

    Args:
        source: its split is train where none is named.
        folder: to write to; the file is named after the source.

    Raises:
        DataError: no such set, config or split, or the hub cannot be reached.
        UsageError: `source` is not written so, or `datasets` is missing.
    """
    found = _SOURCE.fullmatch(source.removeprefix(PREFIX))
    if found is None:
        raise UsageError(f"{source!r} is not written hub:OWNER/NAME:CONFIG@SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f'{source} needs the package datasets: run pip install "neuroada-serve[hub]"'
        ) from error

    name, config, split = found["name"], found["config"], found["split"] or "train"
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many libraries: the hub's, the network's, the file formats'
        raise DataError(
            f"{source} cannot be read: {error}; it must be hub:OWNER/NAME:CONFIG@SPLIT, public or "
            "yours by `hf auth login`, and the hub within reach"
        ) from error
    rows = rows.select_columns(
        [column for column, kind in rows.features.items() if not hasattr(kind, "decode_example")]
    )
    labels = {
        column: dict(enumerate(kind.names))  # some rows have -1: no label
        for column, kind in rows.features.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    stem = "-".join(filter(None, (name.rpartition("/")[2], config, split)))
    path = folder / (re.sub(r"[^\w.-]+", "-", stem) + ".jsonl")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            named = {column: names.get(row[column]) for column, names in labels.items()}
            file.write(json.dumps({**row, **named}, ensure_ascii=False, default=str) + "\n")
    return path
