"""Rows that are not a file."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class RowSource(Protocol):
    """Rows to train or score on that do not come from a file of the user's, see `train.hub`."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """Label names by column, in their order, for columns that have them."""
        ...

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows with their numbers, from 1."""
        ...
