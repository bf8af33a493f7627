"""Sparse changes of a matrix, entry by entry, and their conversion to rows of k."""

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroada_serve.adapters.format import ModuleBypass
from neuroada_serve.adapters.select import magnitude_index, magnitude_order
from neuroada_serve.errors import ShapeError


@dataclass(frozen=True)
class Entries:
    """Values to add to a matrix [d_out, d_in] at single entries, in any order.

    row, column: [n] int64. value: [n] float. All on the CPU.
    """

    row: Tensor
    column: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.row, self.column, self.value)}
        if len(shapes) != 1 or self.value.ndim != 1:
            raise ShapeError(f"row, column and value must all be [n], have {sorted(shapes)}")

    def faults(self, d_out: int, d_in: int) -> list[str]:
        """Return why these are not entries of a matrix [d_out, d_in]; empty if they are."""
        found = []
        for what, places, size in (("row", self.row, d_out), ("column", self.column, d_in)):
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
                found.append(
                    f"has {what}s {int(places.min())} to {int(places.max())}, the base has {size}"
                )
        if not found and len(torch.unique(self.row * d_in + self.column)) < len(self.row):
            found.append("has an entry twice")
        if not bool(self.value.isfinite().all()):
            found.append("has NaN or infinite values")
        return found

    def without_zeros(self) -> "Entries":
        """Return the entries whose value is not 0."""
        return self._of(self.value != 0)

    def largest(self, k: int) -> "Entries":
        """Return the k entries of largest |value| in each row; among equals the first in order."""
        order, rank = self._ranked()
        return self._of(order[rank < k])

    def energy_by_rank(self, ranks: int) -> Tensor:
        """Return [ranks] float64: the sum of squares over all rows of each row's largest value,
        of its second largest, and so on.

        ranks: at least as many as the fullest row has.
        """
        order, rank = self._ranked()
        squares = self.value[order].double().square()
        return torch.zeros(ranks, dtype=torch.float64).index_add(0, rank, squares)

    def _ranked(self) -> tuple[Tensor, Tensor]:
        """Return the order by row and falling |value|, and each entry's rank in its row in that
        order."""
        order = self.value.abs().float().argsort(descending=True, stable=True)
        order = order[self.row[order].argsort(stable=True)]
        return order, _place_in_row(self.row[order])

    def most_in_a_row(self) -> int:
        return int(self.row.bincount().max()) if len(self.row) else 0

    def energy(self) -> float:
        """Return the sum of the squared values."""
        return float(self.value.double().square().sum())

    def _of(self, chosen: Tensor) -> "Entries":
        return Entries(self.row[chosen], self.column[chosen], self.value[chosen])


def _place_in_row(row: Tensor) -> Tensor:
    """Return [n]: how many entries before each are in its row; row [n] is sorted."""
    counts = row.bincount()
    starts = counts.cumsum(0) - counts
    return torch.arange(len(row)) - starts[row]


def as_rows(entries: Entries, weight: Tensor, k: int) -> ModuleBypass:
    """Return the entries as rows of k, by falling |weight|, ties to the lower column, as
    magnitude selection orders them.

    Rows with fewer are filled with value 0 at the largest weights that they do not use. So entries
    at the largest weights get the very index that magnitude selection gives, which adapters share.

    Args:
        entries: distinct, at most k in a row.
        weight: [d_out, d_in] of the base.
        k: at most d_in.

    Returns:
        index [d_out, k] int32, bypass [d_out, k] in the entries' dtype.
    """
    d_out, d_in = weight.shape
    order = entries.row.argsort(stable=True)
    row, column, value = entries.row[order], entries.column[order], entries.value[order]
    place = _place_in_row(row)
    index = torch.zeros(d_out, k, dtype=torch.int64)
    bypass = torch.zeros(d_out, k, dtype=value.dtype)
    index[row, place] = column
    bypass[row, place] = value

    counts = row.bincount(minlength=d_out)
    short = (counts < k).nonzero().flatten()
    if len(short):
        largest = magnitude_index(weight[short], k).long()  # (short rows, k)
        used = torch.zeros(len(short), d_in, dtype=torch.bool)
        number = torch.full((d_out,), -1).index_copy(0, short, torch.arange(len(short)))
        in_short = number[row] >= 0
        used[number[row[in_short]], column[in_short]] = True
        unused_first = used.gather(1, largest).int().argsort(dim=1, stable=True)
        fill = largest.gather(1, unused_first)
        free = torch.arange(k).expand(len(short), k) - counts[short].unsqueeze(1)
        index[short] = torch.where(free < 0, index[short], fill.gather(1, free.clamp(min=0)))

    order = magnitude_order(weight, index)
    return ModuleBypass(index.gather(1, order).int(), bypass.gather(1, order))


def from_rows(part: ModuleBypass) -> Entries:
    """Return the non-zero entries of an adapter's rows, sorted by row and column."""
    index, order = part.index.long().sort(dim=1)
    row = torch.arange(len(index)).repeat_interleave(index.shape[1])
    entries = Entries(row, index.flatten(), part.bypass.gather(1, order).flatten())
    return entries.without_zeros()
