"""The device side of the adapters: each distinct index once, every adapter's values by slot.

The linear layers that read the same input (q, k and v, say) are one site: their rows are numbered
through, and the op runs once for all of them. Adapters of one index and one k form a plane: a pool
[num_slots, nnz] in which an adapter is one row. Tables are shared by all adapters of a base and k;
that of a smaller k is the first columns of the larger k's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby

import torch
from torch import Tensor

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.ops.bypass import NO_SLOT, BypassTable, TokenSlots

_FIRST_SLOTS = 4
# So many consecutive tokens of one adapter are multiplied by a weight that holds its values; fewer
# go through `bypass_add_`. By `bench/choices.py` on the CPU; that of CUDA is a guess, and
# `bench/gpu.py` times both ways.
RUN_TOKENS = {"cpu": 192, "cuda": 256}


@dataclass(frozen=True)
class _Rows:
    """Rows first..stop - 1 of a site in one plane."""

    first: int
    stop: int
    table: int  # id of their index table
    offset: int  # where their values start in a slot


@dataclass(eq=False)
class SiteBypass:
    """What all adapters of a plane have for some rows of a site; lives until the bank changes.

    rows: of the site.
    table: views into the bank's memory.
    positions: where the entries lie in the site's weight; kept here by the site.
    """

    rows: slice
    table: BypassTable
    positions: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Run:
    """Tokens start..stop - 1 of one adapter.

    adds: (plane, slot, sign): what to add to the weights for them, in this order.
    """

    start: int
    stop: int
    adds: tuple[tuple["_Plane", int, int], ...]


class _Plane:
    """The adapters that share one index table per module and one k."""

    def __init__(self, number: int, k: int, sites: Mapping[str, Sequence[_Rows]]) -> None:
        self.number = number
        self.k = k
        self.sites = dict(sites)
        self.nnz = sum((r.stop - r.first) * k for rows in sites.values() for r in rows)
        self.values: Tensor | None = None  # (num_slots, nnz)
        self.free: list[int] = []
        self.used: set[int] = set()
        self.views: dict[str, list[SiteBypass]] = {}  # by site, of views_version of the bank
        self.views_version = -1

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

    def bypass(self, rows: _Rows) -> Tensor:
        """[num_slots, rows, k], a view."""
        assert self.values is not None
        num_rows = rows.stop - rows.first
        part = self.values[:, rows.offset : rows.offset + num_rows * self.k]
        return part.view(-1, num_rows, self.k)


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """Where an adapter's values are on the device."""

    plane: _Plane
    slot: int


class BankBatch:
    """What one forward adds.

    runs: long stretches of tokens of one adapter, in order; their tokens are in no call.
    """

    def __init__(
        self,
        bank: "AdapterBank",
        plan: Sequence[tuple[_Plane, TokenSlots]],
        runs: Sequence[Run] = (),
    ) -> None:
        self._bank = bank
        self._plan = plan
        self._views = [(bank.views(plane), token_slots) for plane, token_slots in plan]
        self.runs = runs

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
        return BankBatch(self._bank, plan, self.runs)

    def calls(self, site: str) -> list[tuple[SiteBypass, TokenSlots]]:
        """The calls of `bypass_add_` that a site needs."""
        return [
            (part, token_slots)
            for views, token_slots in self._views
            for part in views.get(site, ())
        ]

    def run_parts(self, site: str, run: Run) -> list[tuple[SiteBypass, int, int]]:
        """What a run adds to a site's weight: parts with their slot and sign, in order."""
        return [
            (part, slot, sign)
            for plane, slot, sign in run.adds
            for part in self._bank.views(plane).get(site, ())
        ]

    def adds(self, site: str, run: Run) -> list[tuple[SiteBypass, Tensor]]:
        """The same with their values, [rows, k]."""
        return [
            (part, part.table.bypass[slot] if sign > 0 else -part.table.bypass[slot])
            for part, slot, sign in self.run_parts(site, run)
        ]


class AdapterBank:
    """All resident adapters of one model. Used by the engine's thread only.

    Args:
        device: where the values are kept.
        sites: site -> its modules in the order of their rows, with their d_out. A module that is
            in none is a site of its own.
    """

    def __init__(
        self, device: torch.device, sites: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        self._device = device
        self._sites = dict(sites or {})
        self._site_of = {m: site for site, modules in self._sites.items() for m in modules}
        self._tables: dict[int, Tensor] = {}  # table id -> [rows, largest k] int32
        self._narrower: dict[tuple[int, int], Tensor] = {}  # (table id, k) -> its first k columns
        self._tables_of: dict[tuple[str, int], list[int]] = {}  # (site, first row) -> table ids
        self._planes: dict[tuple[object, ...], _Plane] = {}
        self._next_table = count()
        self._next_plane = count()
        self.version = 0  # counts the times that device memory was replaced or freed

    @property
    def index_bytes(self) -> int:
        """Bytes of all index tables; shared by the adapters."""
        tables = (*self._tables.values(), *self._narrower.values())
        return sum(t.numel() * t.element_size() for t in tables)

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
        sites: dict[str, list[_Rows]] = {}
        parts, offset = [], 0
        for site, first, modules in self._stretches(adapter.modules):
            index = torch.cat([adapter.modules[m].index for m in modules])
            table = self._intern((site, first), index)
            sites.setdefault(site, []).append(_Rows(first, first + len(index), table, offset))
            offset += index.numel()
            parts += [deltas[m].flatten() for m in modules]
        key = (k, *((site, *rows) for site, rows in sites.items()))
        if key not in self._planes:
            self._planes[key] = _Plane(next(self._next_plane), k, sites)
        plane = self._planes[key]
        if not plane.free:
            self.version += 1  # the pool grows, and moves
        return ResidentAdapter(plane, plane.put(torch.cat(parts).to(self._device)))

    def evict(self, resident: ResidentAdapter) -> None:
        """Free the slot; the plane and its tables go with their last adapter."""
        plane = resident.plane
        plane.used.remove(resident.slot)
        plane.free.append(resident.slot)
        if not plane.used:
            self.version += 1
            self._planes = {key: p for key, p in self._planes.items() if p is not plane}
            used = {
                (rows.table, p.k)
                for p in self._planes.values()
                for site in p.sites.values()
                for rows in site
            }
            wanted = {table_id for table_id, _ in used}
            self._tables = {t: index for t, index in self._tables.items() if t in wanted}
            self._narrower = {key: index for key, index in self._narrower.items() if key in used}
            for place, ids in self._tables_of.items():
                self._tables_of[place] = [t for t in ids if t in wanted]

    def views(self, plane: _Plane) -> Mapping[str, list[SiteBypass]]:
        """What a plane has, by site, one part per stretch of adjacent rows."""
        if plane.views_version != self.version:
            plane.views = {
                name: [
                    SiteBypass(
                        slice(rows.first, rows.stop),
                        BypassTable(self._index(rows.table, plane.k), plane.bypass(rows)),
                    )
                    for rows in stretches
                ]
                for name, stretches in plane.sites.items()
            }
            plane.views_version = self.version
        return plane.views

    def batch(
        self,
        residents: Sequence[ResidentAdapter | None],
        merged: ResidentAdapter | None,
        runs: bool = True,
        shortest: int | None = None,
    ) -> BankBatch:
        """Plan one forward.

        Args:
            residents: per token its adapter, None for the base.
            merged: the adapter that is in the weights just now; every other token takes it out.
            runs: whether long stretches may become runs; not in a CUDA graph.
            shortest: tokens of a run; default: RUN_TOKENS of the device.
        """
        if shortest is None:
            shortest = RUN_TOKENS.get(self._device.type, RUN_TOKENS["cpu"])
        long = _runs(residents, merged, shortest) if runs else []
        in_runs = list(residents)
        for run in long:
            in_runs[run.start : run.stop] = [merged] * (run.stop - run.start)  # nothing to add
        planes = {r.plane: None for r in in_runs if r is not None}  # a dict keeps the order
        if merged is not None:
            planes[merged.plane] = None
        plan = []
        for plane in planes:
            slots = tuple(r.slot if r and r.plane is plane else NO_SLOT for r in in_runs)
            merged_slot = merged.slot if merged is not None and merged.plane is plane else None
            token_slots = TokenSlots(slots, self._device, merged_slot)
            if not token_slots.idle:
                plan.append((plane, token_slots))
        return BankBatch(self, plan, long)

    def _stretches(self, modules: Iterable[str]) -> list[tuple[str, int, list[str]]]:
        """(site, first row, modules) of every group of modules with adjacent rows, in order."""
        wanted, found = set(modules), []
        for site in sorted({self._site_of.get(module, module) for module in wanted}):
            row = 0
            members = self._sites.get(site, {site: 0})
            for is_wanted, group in groupby(members, lambda module: module in wanted):
                names = list(group)
                if is_wanted:
                    found.append((site, row, names))
                row += sum(members[name] for name in names)
        return found

    def _index(self, table_id: int, k: int) -> Tensor:
        """[rows, k] int32, contiguous: one entry out of many columns costs as much as the line."""
        table = self._tables[table_id]
        if table.shape[1] == k:
            return table
        if (table_id, k) not in self._narrower:
            self._narrower[table_id, k] = table[:, :k].contiguous()
        return self._narrower[table_id, k]

    def _intern(self, place: tuple[str, int], index: Tensor) -> int:
        """The id of the table that begins with these columns; the longer of two such is kept."""
        index = index.to(self._device)
        ids = self._tables_of.setdefault(place, [])
        for table_id in ids:
            table = self._tables[table_id]
            shared = min(table.shape[1], index.shape[1])
            if len(table) == len(index) and torch.equal(table[:, :shared], index[:, :shared]):
                if index.shape[1] > table.shape[1]:
                    self.version += 1
                    self._tables[table_id] = index.contiguous()
                return table_id
        table_id = next(self._next_table)
        self._tables[table_id] = index.contiguous()
        ids.append(table_id)
        return table_id


def _runs(
    residents: Sequence[ResidentAdapter | None], merged: ResidentAdapter | None, shortest: int
) -> list[Run]:
    """The stretches of at least `shortest` tokens of one adapter that is not in the weights."""
    runs, start = [], 0
    for resident, tokens in groupby(residents):
        stop = start + sum(1 for _ in tokens)
        if stop - start >= shortest and resident is not merged:
            adds = [(r.plane, r.slot, sign) for r, sign in ((merged, -1), (resident, 1)) if r]
            runs.append(Run(start, stop, tuple(adds)))
        start = stop
    return runs
