"""The device side of the adapters: one memory for all of them, each distinct index in it once.

The linear layers that read the same input (q, k and v, say) are one site: their rows are numbered
through, and the op runs once for all of them. Adapters of one index and one k form a plane: they
differ in their values alone, which lie in one stretch of the memory per adapter. A slot is where
such a stretch begins, in units of 128 bytes, so adapters of any sizes share the memory without
padding, and it is never allocated anew. Index tables lie in the same memory. That of k=1 is a table
of its own beside that of k=8, whose first column it is: read out of the wider one, every neuron
would cost a cache line (bench/LOG.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, groupby

import torch
from torch import Tensor

from neuroada_serve.adapters.extents import Extents
from neuroada_serve.adapters.values import IndexTable, Stretch, realise
from neuroada_serve.ops.bypass import NO_SLOT, BypassTable, TokenSlots
from neuroada_serve.ops.step_plan import StepPlan, Tables, TokenRun

SLOT_BYTES = 128  # a GPU reads lines of this size
_MOST_ORIGINALS = 8  # planes whose base weights are kept at hand
# So many consecutive tokens of one adapter are multiplied by a weight that holds its values; fewer
# go through `bypass_add_`. By `bench/choices.py` on the CPU. On an H200 (`bench/gpu`), in
# Llama-3-8B's shape, a token without a run costs 6 us at k=1 and 22 us at k=8, and a run 2 to
# 10 ms: hundreds of small launches, at the mercy of the host.
RUN_TOKENS = {"cpu": 192, "cuda": 256}


class Extent:
    """A stretch of the bank's memory: `size` slots from `start` on. Compaction moves it."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


class Plane:
    """The adapters on one index table.

    originals: [nnz] the base's weights at the index, and its biases, on the device; None if they
        are not at hand.
    """

    def __init__(self, number: int, table: IndexTable, index: Extent) -> None:
        self.number = number
        self.table = table
        self.index = index  # columns, [nnz] int32
        self.num_slots = 0  # taken
        self.originals: Tensor | None = None
        # Views into the memory of the bank at its `tables_version`: see `AdapterBank.tables`.
        self.tables: tuple[Tables, Tables] = ({}, {})
        self.tables_version = -1

    @property
    def k(self) -> int:
        return self.table.layout.k

    @property
    def nnz(self) -> int:
        return self.table.layout.nnz

    @property
    def has_biases(self) -> bool:
        return bool(self.table.layout.biases)


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter on the device.

    extent: where its values are.
    head: [labels, hidden_size] float32 on the device, of a classifier.
    """

    plane: Plane
    extent: Extent
    head: Tensor | None = None

    @property
    def slot(self) -> int:
        return self.extent.start


class AdapterBank:
    """All adapters that are on the device.

    The engine's thread reads it in every step. Others may reserve, write and free values beside it,
    one at a time (`AdapterTiers` has the lock), but must not touch values that a running step
    reads. New planes and `compact` are the engine thread's.

    Args:
        device: where the memory is.
        dtype: of the values: the weights' own.
        size_bytes: of the memory. On the CPU, pages that were never written cost nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size_bytes: int) -> None:
        self._device = device
        num_slots = max(1, size_bytes // SLOT_BYTES)
        self._memory = torch.empty(num_slots * SLOT_BYTES, dtype=torch.uint8, device=device)
        self._values = self._memory.view(dtype)
        self._columns = self._memory.view(torch.int32)
        self._slot_values = SLOT_BYTES // self._values.element_size()
        self._extents = Extents(num_slots)
        self._held: dict[int, Extent] = {}  # by start
        self._planes: dict[IndexTable, Plane] = {}
        self._empty: dict[IndexTable, None] = {}  # planes without adapters, and some with
        self._numbers = count()
        self.version = 0  # counts the times that what views show has moved

    # --- room --------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self._extents.size * SLOT_BYTES

    @property
    def used_bytes(self) -> int:
        """Of index tables and values, rounded up to slots."""
        return self._extents.num_taken * SLOT_BYTES

    @property
    def free_bytes(self) -> int:
        return self._extents.num_free * SLOT_BYTES

    @property
    def index_bytes(self) -> int:
        """Of the index tables, rounded up to slots."""
        return SLOT_BYTES * sum(plane.index.size for plane in self._planes.values())

    @property
    def num_resident(self) -> int:
        return sum(plane.num_slots for plane in self._planes.values())

    def values_bytes(self, nnz: int) -> int:
        """What so many values take."""
        return -(-nnz // self._slot_values) * SLOT_BYTES

    def columns_bytes(self, nnz: int) -> int:
        """What an index of so many columns takes."""
        return -(-4 * nnz // SLOT_BYTES) * SLOT_BYTES

    def evict_plane(self) -> bool:
        """Free the memory of one index table that no adapter uses; False: there is none."""
        for table in list(self._empty):
            plane = self._planes[table]
            if plane.num_slots:
                del self._empty[table]
            else:
                del self._empty[table], self._planes[table]
                self._give_back(plane.index)
                return True
        return False

    def compact(self) -> None:
        """Close all holes. Moves values and tables: for the engine's thread, between two steps,
        while nobody writes values."""
        moves = self._extents.close_holes()
        for start, new in moves.items():
            extent = self._held.pop(start)
            if start != new:
                size = extent.size * SLOT_BYTES
                source = self._memory[start * SLOT_BYTES :][:size]
                if new + extent.size > start:  # they overlap
                    source = source.clone()
                self._memory[new * SLOT_BYTES :][:size].copy_(source)
                extent.start = new
            self._held[new] = extent
        self.version += 1

    # --- adapters ----------------------------------------------------------------------------

    def plane(self, table: IndexTable) -> Plane | None:
        """The plane of adapters on this table, if there is one."""
        return self._planes.get(table)

    def add_plane(self, table: IndexTable) -> Plane | None:
        """A plane for adapters on this table; None where there is no room for its index."""
        index = self._take(-(-table.size_bytes // SLOT_BYTES))
        if index is None:
            return None
        plane = Plane(next(self._numbers), table, index)
        try:
            self._columns_of(plane).copy_(table.index)
        except BaseException:
            self._give_back(index)
            raise
        self._planes[table] = plane
        self._empty[table] = None
        return plane

    def keep_originals(self, plane: Plane, originals: Tensor) -> None:
        """Keep the base's weights [nnz] of this plane at hand, and discard those of others."""
        plane.originals = originals
        at_hand = [p for p in self._planes.values() if p.originals is not None and p is not plane]
        for other in at_hand[: max(0, len(at_hand) + 1 - _MOST_ORIGINALS)]:
            other.originals = None

    def reserve(self, num_bytes: int) -> Extent | None:
        """Room for later; None where there is none in one piece."""
        return self._take(-(-num_bytes // SLOT_BYTES))

    def settle(self, extent: Extent, plane: Plane, head: Tensor | None = None) -> ResidentAdapter:
        """Give reserved room to an adapter of a plane; what it does not need is free again."""
        head = None if head is None else head.to(self._device)
        size = -(-plane.nnz // self._slot_values)
        self._extents.shrink(extent.start, size)
        extent.size = size
        plane.num_slots += 1
        return ResidentAdapter(plane, extent, head)

    def cancel(self, extent: Extent) -> None:
        """Give reserved room back."""
        self._give_back(extent)

    def write(self, resident: ResidentAdapter, originals: Tensor, values: Tensor) -> None:
        """Fill reserved room with what an adapter changes.

        Args:
            originals: [nnz] the base's weights at the index, and its biases, on the device.
            values: [nnz] the adapter's own, see `realise`.
        """
        target = self._values[resident.slot * self._slot_values :][: resident.plane.nnz]
        target.copy_(realise(originals, values.to(self._device, non_blocking=True)))

    def values(self, resident: ResidentAdapter) -> Tensor:
        """[nnz] what an adapter changes, a view."""
        return self._values[resident.slot * self._slot_values :][: resident.plane.nnz]

    def free(self, resident: ResidentAdapter) -> None:
        """Give an adapter's room back; its plane stays, for the next one."""
        plane = resident.plane
        plane.num_slots -= 1
        if not plane.num_slots:
            self._empty[plane.table] = None
        self._give_back(resident.extent)

    def tables(self, plane: Plane) -> tuple[Tables, Tables]:
        """A plane's tables and those of its biases, one per stretch of adjacent rows of a site."""
        if plane.tables_version != self.version:
            layout, columns = plane.table.layout, self._columns_of(plane)
            tables: dict[str, list[BypassTable]] = {}
            for stretch in layout.stretches:
                entries = slice(stretch.offset, stretch.offset + stretch.rows * plane.k)
                index = columns[entries].view(stretch.rows, plane.k)
                table = BypassTable(index, self._strided(plane, stretch, plane.k), stretch.first)
                tables.setdefault(stretch.site, []).append(table)
            biases: dict[str, list[BypassTable]] = {}
            for stretch in layout.biases:
                table = BypassTable(None, self._strided(plane, stretch, 1), stretch.first)
                biases.setdefault(stretch.site, []).append(table)
            plane.tables, plane.tables_version = (tables, biases), self.version
        return plane.tables

    def plan(
        self,
        residents: Sequence[ResidentAdapter | None],
        merged: ResidentAdapter | None,
        runs: bool = True,
        shortest: int | None = None,
    ) -> StepPlan:
        """Plan one forward.

        Args:
            residents: per token its adapter, None for the base.
            merged: the adapter that is in the weights just now; every other token takes it out.
            runs: whether long stretches may become runs; not in a CUDA graph.
            shortest: tokens of a run; default: RUN_TOKENS of the device.
        """
        if shortest is None:
            shortest = RUN_TOKENS.get(self._device.type, RUN_TOKENS["cpu"])
        long = self._runs(residents, merged, shortest) if runs else []
        in_runs = list(residents)
        for run in long:
            in_runs[run.start : run.stop] = [merged] * (run.stop - run.start)  # nothing to add
        # The merged adapter's first: a token's sums are in one order, whatever else there is.
        planes = {r.plane: None for r in (merged, *in_runs) if r is not None}
        layout, groups, of_biases = [self.version], [], []
        for plane in planes:
            slots = tuple(r.slot if r and r.plane is plane else NO_SLOT for r in in_runs)
            merged_slot = merged.slot if merged is not None and merged.plane is plane else None
            token_slots = TokenSlots(slots, self._device, merged_slot)
            if not token_slots.idle:
                tables, biases = self.tables(plane)
                layout.append(plane.number)
                groups.append((tables, token_slots))
                if biases:
                    of_biases.append((biases, token_slots))
        return StepPlan(tuple(layout), [*groups, *of_biases], long)

    def _runs(
        self,
        residents: Sequence[ResidentAdapter | None],
        merged: ResidentAdapter | None,
        shortest: int,
    ) -> list[TokenRun]:
        """The stretches of at least `shortest` tokens of one adapter that is not in the weights."""
        runs, start = [], 0
        for resident, tokens in groupby(residents):
            stop = start + sum(1 for _ in tokens)
            if stop - start >= shortest and resident is not merged:
                signed = [(r, sign) for r, sign in ((merged, -1), (resident, 1)) if r]
                adds = [
                    (tables, r.slot, sign)
                    for r, sign in signed
                    for tables in self.tables(r.plane)
                    if tables
                ]
                runs.append(TokenRun(start, stop, adds))
            start = stop
        return runs

    def _strided(self, plane: Plane, stretch: Stretch, each: int) -> Tensor:
        """[num_slots, rows, each]: the stretch's values of an adapter in any slot of the memory."""
        num_slots = (len(self._values) - plane.nnz) // self._slot_values + 1
        shape, strides = (num_slots, stretch.rows, each), (self._slot_values, each, 1)
        return self._values.as_strided(shape, strides, stretch.offset)

    def _take(self, num_slots: int) -> Extent | None:
        start = self._extents.take(num_slots)
        if start is None:
            return None
        extent = self._held[start] = Extent(start, num_slots)
        return extent

    def _give_back(self, extent: Extent) -> None:
        del self._held[extent.start]
        self._extents.free(extent.start)

    def _columns_of(self, plane: Plane) -> Tensor:
        """[num_entries] int32, a view."""
        num_entries = plane.table.layout.num_entries
        return self._columns[plane.index.start * SLOT_BYTES // 4 :][:num_entries]
