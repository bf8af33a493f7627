"""The device side of the adapters: each distinct index once, every adapter's values by slot.

Adapters of one index and one k form a plane: a pool [num_slots, nnz] in which an adapter is one
row. A smaller k on the same index reads the first columns of the larger k's table, so tables are
kept once whatever the mix of budgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.ops.bypass import NO_SLOT, TokenSlots

_FIRST_SLOTS = 4


class _Plane:
    """The adapters that share one index table per module and one k."""

    def __init__(
        self, number: int, k: int, tables: Mapping[str, int], rows: Mapping[str, int]
    ) -> None:
        self.number = number
        self.k = k
        self.tables = dict(tables)  # module -> table id
        self.offsets: dict[str, int] = {}  # module -> where its values start in a slot
        self.rows = dict(rows)  # module -> d_out
        self.nnz = 0
        for module, d_out in rows.items():
            self.offsets[module] = self.nnz
            self.nnz += d_out * k
        self.values: Tensor | None = None  # (num_slots, nnz)
        self.free: list[int] = []
        self.used: set[int] = set()

    def put(self, values: Tensor) -> int:
        """Copy one adapter's values, [nnz], into a slot of their own."""
        if not self.free:
            capacity = 0 if self.values is None else self.values.shape[0]
            grown = values.new_zeros(max(_FIRST_SLOTS, 2 * capacity), self.nnz)
            if self.values is not None:
                grown[:capacity] = self.values
            self.values = grown
            self.free = list(range(grown.shape[0] - 1, capacity - 1, -1))
        slot = self.free.pop()
        assert self.values is not None
        self.values[slot] = values
        self.used.add(slot)
        return slot

    def bypass(self, module: str) -> Tensor:
        """[num_slots, d_out, k], a view."""
        assert self.values is not None
        start, d_out = self.offsets[module], self.rows[module]
        part = self.values[:, start : start + d_out * self.k]
        return part.view(-1, d_out, self.k)


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """Where an adapter's values are on the device."""

    plane: _Plane
    slot: int


class BankBatch:
    """What one forward adds: per plane in use, the slot of every token."""

    def __init__(self, bank: "AdapterBank", plan: Sequence[tuple[_Plane, TokenSlots]]) -> None:
        self._bank = bank
        self._plan = plan

    @property
    def layout(self) -> tuple[int, ...]:
        """Two batches of one layout read the same memory: a CUDA graph of one serves the other."""
        return (self._bank.version, *(plane.number for plane, _ in self._plan))

    @property
    def token_slots(self) -> list[TokenSlots]:
        """Per plane in use, in the order of `layout`."""
        return [token_slots for _, token_slots in self._plan]

    def with_static(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> "BankBatch":
        """The same batch reading its slots from these buffers, one pair per plane in use."""
        plan = [
            (plane, replace(token_slots, static=pair))
            for (plane, token_slots), pair in zip(self._plan, buffers, strict=True)
        ]
        return BankBatch(self._bank, plan)

    def calls(self, module: str) -> list[tuple[Tensor, Tensor, TokenSlots]]:
        """(index, bypass, token_slots) for each `bypass_add_` that this module needs."""
        return [
            (self._bank.index(plane, module), plane.bypass(module), token_slots)
            for plane, token_slots in self._plan
            if module in plane.tables
        ]


class AdapterBank:
    """All resident adapters of one model. Used by the engine's thread only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[int, Tensor] = {}  # table id -> [d_out, largest k] int32
        self._tables_of: dict[str, list[int]] = {}  # module -> table ids
        self._planes: dict[tuple[int, tuple[tuple[str, int], ...]], _Plane] = {}
        self._next_table = count()
        self._next_plane = count()
        self.version = 0  # counts the times that device memory was replaced or freed

    @property
    def index_bytes(self) -> int:
        """Bytes of all index tables; shared by the adapters."""
        return sum(t.numel() * t.element_size() for t in self._tables.values())

    @property
    def num_resident(self) -> int:
        return sum(len(plane.used) for plane in self._planes.values())

    def upload(self, adapter: Adapter, deltas: Mapping[str, Tensor]) -> ResidentAdapter:
        """Bring an adapter onto the device.

        Args:
            adapter: gives the index tables.
            deltas: module -> [d_out, k], the values to serve (`WeightMerger.realise`).
        """
        k = adapter.config.k
        tables = {m: self._intern(m, part.index) for m, part in sorted(adapter.modules.items())}
        key = (k, tuple(tables.items()))
        if key not in self._planes:
            rows = {module: adapter.modules[module].index.shape[0] for module in tables}
            self._planes[key] = _Plane(next(self._next_plane), k, tables, rows)
        plane = self._planes[key]
        values = torch.cat([deltas[module].flatten() for module in tables]).to(self._device)
        if not plane.free:
            self.version += 1  # the pool grows, and moves
        return ResidentAdapter(plane, plane.put(values))

    def evict(self, resident: ResidentAdapter) -> None:
        """Free the slot; the plane and its tables go with their last adapter."""
        plane = resident.plane
        plane.used.remove(resident.slot)
        plane.free.append(resident.slot)
        if not plane.used:
            self.version += 1
            self._planes = {key: p for key, p in self._planes.items() if p is not plane}
            wanted = {table for p in self._planes.values() for table in p.tables.values()}
            self._tables = {t: index for t, index in self._tables.items() if t in wanted}
            for module, ids in self._tables_of.items():
                self._tables_of[module] = [t for t in ids if t in wanted]

    def index(self, plane: _Plane, module: str) -> Tensor:
        """[d_out, k] int32, a view of the module's table."""
        return self._tables[plane.tables[module]][:, : plane.k]

    def batch(
        self, residents: Sequence[ResidentAdapter | None], merged: ResidentAdapter | None
    ) -> BankBatch:
        """Plan one forward.

        Args:
            residents: per token its adapter, None for the base.
            merged: the adapter that is in the weights just now; every other token takes it out.
        """
        planes = {r.plane: None for r in residents if r is not None}  # a dict keeps the order
        if merged is not None:
            planes[merged.plane] = None
        plan = []
        for plane in planes:
            slots = tuple(r.slot if r and r.plane is plane else NO_SLOT for r in residents)
            merged_slot = merged.slot if merged is not None and merged.plane is plane else None
            token_slots = TokenSlots(slots, self._device, merged_slot)
            if not token_slots.idle:
                plan.append((plane, token_slots))
        return BankBatch(self, plan)

    def _intern(self, module: str, index: Tensor) -> int:
        """The id of the table that begins with these columns; the longer of two such is kept."""
        index = index.to(self._device)
        ids = self._tables_of.setdefault(module, [])
        for table_id in ids:
            table = self._tables[table_id]
            shared = min(table.shape[1], index.shape[1])
            if torch.equal(table[:, :shared], index[:, :shared]):
                if index.shape[1] > table.shape[1]:
                    self.version += 1
                    self._tables[table_id] = index.contiguous()
                return table_id
        table_id = next(self._next_table)
        self._tables[table_id] = index.contiguous()
        ids.append(table_id)
        return table_id
