"""The values of adapters in a frozen weight's own entries, from one product to the next."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from neuroada_serve.ops import triton_bypass
from neuroada_serve.ops.bypass import BypassTable
from neuroada_serve.ops.matrix import FrozenMatrix
from neuroada_serve.ops.weights import add_entries_, write_entries_

# A table, the slot of its values, and the sign with which they are added.
Add = tuple[BypassTable, int, int]


class HeldValues:
    """Values of adapters in a weight for a while; then it is again what it was, bit for bit.

    Of two adapters on the same index, one takes the other's place in one write.

    Args:
        matrix: the weight. Nobody else may change it while it holds something.
    """

    def __init__(self, matrix: FrozenMatrix) -> None:
        self._matrix = matrix
        self._held: list[tuple[Add, Tensor]] = []  # in the order of adding, with what was there

    def hold(self, adds: Iterable[Add]) -> None:
        """Have these values in the weight, added in this order, and no others. Biases, which are in
        no weight, are passed over."""
        wanted = [add for add in adds if add[0].index is not None]
        kept = 0
        for add, (held, _) in zip(wanted, self._held, strict=False):
            if add[0] is not held[0] or add[1:] != held[1:]:
                break
            kept += 1
        old, new = self._held[kept:], wanted[kept:]
        if old and _can_swap([add for add, _ in old], new):
            for place, (add, (_, saved)) in enumerate(zip(new, old, strict=True), kept):
                self._swap(add, saved)
                self._held[place] = add, saved
            return
        self._release(kept)
        for add in new:
            self._held.append((add, self._add(add)))

    def release(self) -> None:
        """Restore the weight."""
        self._release(0)

    @contextmanager
    def for_a_while(self) -> Iterator["HeldValues"]:
        """Restore the weight when the block ends, whatever ends it."""
        try:
            yield self
        finally:
            self.release()

    def _release(self, kept: int) -> None:
        while len(self._held) > kept:
            (table, _, _), saved = self._held[-1]
            index = _index(table)
            if (weight := self._rows(table)) is not None:
                triton_bypass.restore_entries_(weight, index, saved)
            else:
                write_entries_(self._matrix.entries, self._positions(table, index), saved)
            self._held.pop()

    def _add(self, add: Add) -> Tensor:
        table, index, values = add[0], _index(add[0]), _values(add)
        if (weight := self._rows(table)) is not None:
            return triton_bypass.add_entries_(weight, index, values)
        positions = self._positions(table, index)
        return add_entries_(self._matrix.entries, positions, values.reshape(-1))

    def _swap(self, add: Add, saved: Tensor) -> None:
        table, index, values = add[0], _index(add[0]), _values(add)
        if (weight := self._rows(table)) is not None:
            triton_bypass.swap_entries_(weight, index, values, saved)
            return
        total = (saved.float() + values.reshape(-1).float()).to(saved.dtype)
        write_entries_(self._matrix.entries, self._positions(table, index), total)

    def _rows(self, table: BypassTable) -> Tensor | None:
        """Return the table's rows of the weight where a kernel writes single entries; else None."""
        if not (self._matrix.entries.is_cuda and triton_bypass.HAS_TRITON):
            return None
        return self._matrix.dense()[table.rows]

    def _positions(self, table: BypassTable, index: Tensor) -> Tensor:
        if table.positions is None:
            table.positions = self._matrix.positions(index, table.first_row)
        return table.positions


def _can_swap(old: Sequence[Add], new: Sequence[Add]) -> bool:
    """Return whether values can take the place of others: on the same tables, no two of which share
    an entry, so that what was saved is of the weight itself."""
    if [id(add[0]) for add in old] != [id(add[0]) for add in new]:
        return False
    rows = sorted((table.rows.start, table.rows.stop) for table, _, _ in new)
    return all(this[1] <= following[0] for this, following in zip(rows, rows[1:], strict=False))


def _index(table: BypassTable) -> Tensor:
    assert table.index is not None
    return table.index


def _values(add: Add) -> Tensor:
    table, slot, sign = add
    values = table.bypass[slot]
    return (values if sign > 0 else -values).contiguous()
