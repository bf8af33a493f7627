"""The device tier of adapters: one memory for all of them, with each distinct index in it once.

The linear layers that read the same input (q, k and v, say) are one site: their rows are numbered
through, and the op runs once for all of them. Adapters of one index and one k form a plane: they
differ in their values alone, which lie in one stretch of the memory per adapter. A slot is where
such a stretch begins, in units of 128 bytes, so adapters of any sizes share the memory without
padding. Index tables lie in the same memory. That of k=1 is a table of its own beside that of k=8,
whose first column it is: read out of the wider one, every neuron would cost a cache line
(bench/LOG.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, groupby

from torch import Tensor

from neuroada_serve.adapters.slot_memory import Extent, SlotMemory
from neuroada_serve.adapters.values import IndexTable, realise
from neuroada_serve.ops.bypass import NO_SLOT, BypassTable, TokenSlots
from neuroada_serve.ops.step_plan import StepPlan, Tables, TokenRun

_MOST_ORIGINALS = 8  # planes whose base weights are kept at hand
# So many consecutive tokens of one adapter are multiplied by a weight that holds its values; fewer
# go through `bypass_add_`. By `bench/choices.py` on the CPU. On an H200 (`bench/gpu`), in
# Llama-3-8B's shape, a token without a run costs 6 us at k=1 and 22 us at k=8, and a run 2 to
# 10 ms: hundreds of small launches, at the mercy of the host.
RUN_TOKENS = {"cpu": 192, "cuda": 256}


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
        # Views of the memory's `tables_version`, see `AdapterBank.tables`.
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

    The engine's thread reads it in every step. Others may take room, write values and release them
    beside it, one at a time (`AdapterTiers` has the lock), but must not touch values that a running
    step reads. New planes, and the memory's `compact`, are the engine thread's.

    memory: of all values and index tables.
    """

    def __init__(self, memory: SlotMemory) -> None:
        self.memory = memory
        self._planes: dict[IndexTable, Plane] = {}
        self._empty: dict[IndexTable, None] = {}  # planes without adapters, and some with
        self._numbers = count()

    @property
    def index_bytes(self) -> int:
        """Bytes of the slots that index tables take."""
        tables = self._planes
        return sum(self.memory.columns_bytes(table.layout.num_entries) for table in tables)

    @property
    def num_resident(self) -> int:
        return sum(plane.num_slots for plane in self._planes.values())

    def evict_plane(self) -> bool:
        """Free the memory of one index table that no adapter uses; False: there is none."""
        for table in list(self._empty):
            plane = self._planes[table]
            if plane.num_slots:
                del self._empty[table]
            else:
                del self._empty[table], self._planes[table]
                self.memory.release(plane.index)
                return True
        return False

    def plane(self, table: IndexTable) -> Plane | None:
        """Return the plane of adapters on this table, if there is one."""
        return self._planes.get(table)

    def add_plane(self, table: IndexTable) -> Plane | None:
        """Make a plane for adapters on this table; None if there is no room for its index."""
        num_entries = table.layout.num_entries
        index = self.memory.take(self.memory.columns_bytes(num_entries))
        if index is None:
            return None
        plane = Plane(next(self._numbers), table, index)
        try:
            self.memory.columns(index, num_entries).copy_(table.index)
        except BaseException:
            self.memory.release(index)
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

    def settle(self, extent: Extent, plane: Plane, head: Tensor | None = None) -> ResidentAdapter:
        """Give room that was taken to an adapter of a plane; what it does not need is released."""
        head = None if head is None else head.to(self.memory.device)
        self.memory.shrink(extent, self.memory.values_bytes(plane.nnz))
        plane.num_slots += 1
        return ResidentAdapter(plane, extent, head)

    def write(self, resident: ResidentAdapter, originals: Tensor, values: Tensor) -> None:
        """Fill an adapter's room with what it changes.

        Args:
            originals: [nnz] the base's weights at the index, and its biases, on the device.
            values: [nnz] the adapter's own, see `realise`.
        """
        own = values.to(self.memory.device, non_blocking=True)
        self.values(resident).copy_(realise(originals, own))

    def values(self, resident: ResidentAdapter) -> Tensor:
        """Return [nnz] what an adapter changes, a view."""
        return self.memory.values(resident.extent, resident.plane.nnz)

    def release(self, resident: ResidentAdapter) -> None:
        """Release an adapter's room; its plane stays, for the next one."""
        plane = resident.plane
        plane.num_slots -= 1
        if not plane.num_slots:
            self._empty[plane.table] = None
        self.memory.release(resident.extent)

    def tables(self, plane: Plane) -> tuple[Tables, Tables]:
        """Return a plane's tables and those of its biases, one per stretch of adjacent rows of a
        site."""
        memory = self.memory
        if plane.tables_version != memory.version:
            layout = plane.table.layout
            k, nnz, columns = layout.k, layout.nnz, memory.columns(plane.index, layout.num_entries)
            tables: dict[str, list[BypassTable]] = {}
            for stretch in layout.stretches:
                offset, rows = stretch.offset, stretch.rows
                index = columns[offset : offset + rows * k].view(rows, k)
                values = memory.values_of_all(nnz, offset, rows, k)
                table = BypassTable(index, values, stretch.first)
                tables.setdefault(stretch.site, []).append(table)
            biases: dict[str, list[BypassTable]] = {}
            for stretch in layout.biases:
                values = memory.values_of_all(nnz, stretch.offset, stretch.rows, 1)
                table = BypassTable(None, values, stretch.first)
                biases.setdefault(stretch.site, []).append(table)
            plane.tables, plane.tables_version = (tables, biases), memory.version
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
            shortest = RUN_TOKENS.get(self.memory.device.type, RUN_TOKENS["cpu"])
        long = self._runs(residents, merged, shortest) if runs else []
        in_runs = list(residents)
        for run in long:
            in_runs[run.start : run.stop] = [merged] * (run.stop - run.start)  # nothing to add
        # In one order, whichever tokens come first: equal sets of planes have equal layouts, and a
        # token's sums do not depend on its neighbours. The merged adapter's plane comes first.
        planes = sorted(
            {r.plane for r in (merged, *in_runs) if r is not None},
            key=lambda plane: (merged is None or plane is not merged.plane, plane.number),
        )
        layout, groups, of_biases = [self.memory.version], [], []
        for plane in planes:
            slots = tuple(r.slot if r and r.plane is plane else NO_SLOT for r in in_runs)
            merged_slot = merged.slot if merged is not None and merged.plane is plane else None
            token_slots = TokenSlots(slots, self.memory.device, merged_slot)
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
