"""Room on the device: which adapters stay, and which make way."""

import math
import time
from collections import OrderedDict

from neuroada_serve.adapters.bank import AdapterBank, Plane
from neuroada_serve.adapters.residency import ABSENT, Reading, Residency
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.adapters.values import IndexTable
from neuroada_serve.metrics import TierMetrics

FRESH_S = 0.5  # an adapter that has arrived for a request stays so long before it makes way


class Room:
    """Reserves the bank's memory, and evicts for it: the indexes that nobody uses first, then
    resident adapters that nobody holds, the least recently used first. Pinned ones stay, and for a
    moment those that have arrived for a request. Guarded by its owner.

    needs_compaction: what is free would do for somebody if it were in one piece.
    """

    def __init__(self, bank: AdapterBank, residency: Residency, metrics: TierMetrics) -> None:
        self.needs_compaction = False
        self._bank = bank
        self._residency = residency
        self._metrics = metrics
        self._num_holders: dict[AdapterVersion, int] = {}
        self._idle: OrderedDict[AdapterVersion, None] = OrderedDict()  # resident, not held
        self._wanted: set[AdapterVersion] = set()  # by requests that wait for them
        self._stays_until: dict[AdapterVersion, float] = {}
        self._fresh: list[AdapterVersion] = []  # arrived for a request since `start_stays`
        self._lacking_at = -math.inf

    # --- who stays ---------------------------------------------------------------------------

    def want(self, version: AdapterVersion) -> None:
        """Note that a request waits for a version that is not resident."""
        self._wanted.add(version)

    def add(self, version: AdapterVersion) -> None:
        """Note that a version has become resident."""
        self._idle[version] = None
        if version in self._wanted:
            self._stays_until[version] = math.inf  # until the engine has had a look, and then some
            self._fresh.append(version)

    @property
    def versions(self) -> set[AdapterVersion]:
        """All versions of which anything is known."""
        return {*self._wanted, *self._stays_until, *self._num_holders, *self._idle, *self._fresh}

    def start_stays(self) -> None:
        """Count from now how long those stay that the engine now finds there."""
        for version in self._fresh:
            if version in self._stays_until:
                self._stays_until[version] = time.monotonic() + FRESH_S
        self._fresh.clear()

    def hold(self, version: AdapterVersion) -> None:
        """Keep a resident version until `release` has been called as often."""
        self._idle.pop(version, None)
        self._num_holders[version] = self._num_holders.get(version, 0) + 1
        self._wanted.discard(version)
        self._stays_until.pop(version, None)

    def release(self, version: AdapterVersion) -> None:
        self._num_holders[version] -= 1
        if not self._num_holders[version]:
            del self._num_holders[version]
            self._idle[version] = None

    def discard(self, version: AdapterVersion) -> None:
        """Discard what is known of a version that has gone and left the device."""
        assert version not in self._num_holders, "a version that is held has a lease"
        self._wanted.discard(version)
        self._idle.pop(version, None)
        self._stays_until.pop(version, None)
        self._fresh = [fresh for fresh in self._fresh if fresh is not version]

    # --- room --------------------------------------------------------------------------------

    @property
    def is_lacking(self) -> bool:
        """True if requests have just found no room, and wait for what becomes free."""
        return time.monotonic() - self._lacking_at < FRESH_S

    def report_lack(self) -> None:
        """Note that a request has found no room."""
        self._lacking_at = time.monotonic()

    def reserve(self, nnz: int, with_index: bool) -> Reading | None:
        """Reserve room for so many values, and for an index of theirs; None: too many stay."""
        memory = self._bank.memory
        values_bytes = memory.values_bytes(nnz)
        index_bytes = memory.columns_bytes(nnz) if with_index else 0
        while (room := memory.take(values_bytes)) is None and self.evict():
            pass
        if room is not None and not index_bytes:
            return Reading(room, None)
        if room is not None:
            while (index_room := memory.take(index_bytes)) is None and self.evict():
                pass
            if index_room is not None:
                return Reading(room, index_room)
            memory.release(room)
        if memory.free_bytes >= values_bytes + index_bytes:
            self.needs_compaction = True
        return None

    def add_plane(self, table: IndexTable) -> Plane | None:
        """Add a plane for adapters on a table; None: too many stay."""
        while (plane := self._bank.add_plane(table)) is None and self.evict():
            pass
        return plane

    def evict(self) -> bool:
        """Free the memory of an index that nobody uses, or of the adapter idle for longest."""
        if self._bank.evict_plane():
            return True
        now = time.monotonic()
        for version in self._idle:
            if version.is_pinned or now < self._stays_until.get(version, now):
                continue
            del self._idle[version]
            self._stays_until.pop(version, None)
            self._residency.move(version, ABSENT)
            self._metrics.num_device_evictions += 1
            return True
        return False

    def compact(self) -> bool:
        """Close the bank's holes if that is needed and nobody writes; for the engine's thread."""
        if not self.needs_compaction or self._residency.num_writing:
            return False
        self._bank.memory.compact()
        self.needs_compaction = False
        self._metrics.num_compactions += 1
        return True

    def could_fit(self, version: AdapterVersion, beside: AdapterVersion | None) -> bool:
        """Return whether a version would have room if all left but the pinned ones and `beside`."""
        kept = [v for v in self._residency if v.is_pinned or v is beside]
        residents = [r for v in kept if (r := self._residency.resident(v)) is not None]
        planes = {r.plane.number: r.plane.nnz for r in residents}
        indexes = list(planes.values())
        if version.nnz not in indexes:  # else it may well be on one of these
            indexes.append(version.nnz)
        memory, nnz = self._bank.memory, self._residency.nnz
        needed = sum(memory.values_bytes(nnz(v)) for v in (version, *kept))
        needed += sum(map(memory.columns_bytes, indexes))
        return needed <= memory.size_bytes
