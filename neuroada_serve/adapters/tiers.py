"""Where the values of adapters are: on disk, in host memory, on the device.

Host copies are the files' own values, checked; the device has what they change. Both are caches of
bytes: the least recently used go first, those that are pinned or in use stay. Loader threads bring
values up while the engine computes; it is needed only where an index is new to the device, since
the base's weights at that index can be read between two steps alone.

    prefetch: room -> loader: host copy, or disk -> [engine's thread: plane] -> loader: upload
"""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from neuroada_serve.adapters.bank import AdapterBank, Extent, Plane, ResidentAdapter
from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.host_cache import HostCache
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader
from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.adapters.values import AdapterValues, IndexTable, ValuesReader
from neuroada_serve.errors import AdapterError, AdapterUnavailable, NeuroAdaError
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # an adapter that could not be loaded is tried again after so long
FRESH_S = 0.5  # one that has arrived for a request stays so long before another takes its place
_LOADERS = 2
_WAIT_S = 0.02


@dataclass
class TierMetrics:
    """Totals since the start. hits: an adapter was on the device when it was first wanted."""

    num_hits: int = 0
    num_uploads: int = 0
    num_disk_reads: int = 0
    num_device_evictions: int = 0
    num_host_evictions: int = 0
    num_failures: int = 0
    num_compactions: int = 0


@dataclass(eq=False)
class _Place:
    """What a version has on the device, or is about to have."""

    is_coming: bool = False
    room: Extent | None = None  # reserved for its values
    index_room: Extent | None = None  # for an index that is new to the device
    lacks_index: bool = False  # there was no room for that the last time
    resident: ResidentAdapter | None = None  # once they are written
    num_holders: int = 0
    is_wanted: bool = False  # by a request that waits for it
    stays_until: float = 0.0
    error: NeuroAdaError | None = None
    failed_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.resident is not None


@dataclass(frozen=True)
class _Ready:
    """A plane with the base's weights at its index, [nnz] on the device."""

    plane: Plane
    originals: Tensor


@dataclass(frozen=True)
class _Load:
    """A version on its way to its place."""

    version: AdapterVersion
    place: _Place
    values: AdapterValues | None = None  # once they are read
    ready: _Ready | None = None


class AdapterTiers:
    """Moves adapters between disk, host and device.

    Args:
        bank: the device's memory; nobody else reserves or frees in it.
        files: reads headers and bytes; values: makes flat vectors of them.
        originals: the base's weights at an index; for the engine's thread.
        host_bytes: of host copies.
        wakeup: notified, in any thread, when the engine's thread has something to do or to find.
    """

    def __init__(
        self,
        bank: AdapterBank,
        files: AdapterReader,
        values: ValuesReader,
        originals: Callable[[IndexTable], Tensor],
        host_bytes: int,
        wakeup: Wakeup,
    ) -> None:
        self.metrics = TierMetrics()
        self._bank = bank
        self._files = files
        self._values = values
        self._originals = originals
        self._wakeup = wakeup
        self._lock = threading.Lock()  # guards everything below, and reserving in the bank
        self._host = HostCache(host_bytes)
        self._places: dict[AdapterVersion, _Place] = {}
        self._idle: OrderedDict[AdapterVersion, None] = OrderedDict()  # on the device, not held
        self._forgotten: WeakSet[AdapterVersion] = WeakSet()
        # Uploads that wait for the engine's thread to make a plane of their table.
        self._waiting: dict[IndexTable, list[_Load]] = {}
        self._reading: WeakSet[AdapterVersion] = WeakSet()  # for `values_at_hand`
        self._read_ahead: WeakKeyDictionary[AdapterVersion, AdapterValues] = WeakKeyDictionary()
        self._needs_compaction = False
        self._short_of_room_at = -math.inf
        self._fresh: list[_Place] = []  # arrived for a request since the last `poll`
        self._num_writing = 0
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="adapters")
        self._streams = threading.local()

    # --- any thread --------------------------------------------------------------------------

    @property
    def device_bytes(self) -> tuple[int, int]:
        """(used, all), of the device memory set aside for adapters."""
        return self._bank.used_bytes, self._bank.size_bytes

    @property
    def host_bytes(self) -> tuple[int, int]:
        """(used, most) of host copies."""
        return self._host.used_bytes, self._host.size_bytes

    @property
    def num_resident(self) -> int:
        return self._bank.num_resident

    @property
    def num_in_host(self) -> int:
        return len(self._host)

    def tier_of(self, version: AdapterVersion) -> str:
        """device, host or disk: the highest where its values are; memory without a file is host."""
        with self._lock:
            place = self._places.get(version)
            if place is not None and place.is_ready:
                return "device"
            in_host = version in self._host or isinstance(version.source, Adapter)
            return "host" if in_host else "disk"

    def check_size(self, nnz: int, name: str) -> None:
        """
        Raises:
            AdapterError: an adapter of so many values never fits the device memory set aside.
        """
        needed = self._bank.values_bytes(nnz) + self._bank.columns_bytes(nnz)
        if needed > self._bank.size_bytes:
            raise AdapterError(
                f"adapter {name!r} needs {needed} bytes on the device with its index, and "
                f"{self._bank.size_bytes} are set aside; raise --adapter-memory"
            )

    def read(self, version: AdapterVersion) -> AdapterValues:
        """A version's values, from the host or from disk, where they are checked.

        Raises:
            AdapterNotFoundError, AdapterFormatError: the files have gone or are not what they were.
        """
        with self._lock:
            known = self._host.get(version)
        if known is not None:
            return known
        source = version.source
        if isinstance(source, AdapterHeader):
            values = self._values.read(source, self._files)
            self.metrics.num_disk_reads += 1
        elif isinstance(source, Adapter):
            values = self._values.of(source)
        else:
            values = self._values.mix([(self.read(part), weight) for part, weight in source.parts])
        with self._lock:
            if version not in self._forgotten:
                self.metrics.num_host_evictions += self._host.put(version, values)
        return values

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to bring a version to the device, unless it is there or on its way."""
        with self._lock:
            if version in self._forgotten:
                return
            place = self._place(version)
            self.metrics.num_hits += place.is_ready
            if time.monotonic() - self._short_of_room_at < FRESH_S:
                return  # others wait for what it would take; its turn comes
            starts = self._begin(version, place)
        if starts:
            self._submit(_Load(version, place))

    def forget(self, version: AdapterVersion) -> None:
        """Free everything of a version that has gone; nobody may hold it."""
        with self._lock:
            self._forgotten.add(version)
            self._host.drop(version)
            place = self._places.pop(version, None)
            if place is None:
                return
            assert not place.num_holders, "a version that is held has a lease"
            self._idle.pop(version, None)
            if place.resident is not None:
                self._bank.free(place.resident)
            # Room for values on their way is given back by whoever brings them.
        self._wakeup.notify()

    def values_at_hand(self, version: AdapterVersion) -> AdapterValues | None:
        """A version's values where that takes no reading; else None, and a loader reads them for
        the next time."""
        with self._lock:
            known = self._host.get(version) or self._read_ahead.pop(version, None)
            if known is not None or version in self._reading:
                return known
            self._reading.add(version)
        self._loaders.submit(self._run_reading, version)
        return None

    def adopt(self, version: AdapterVersion, resident: ResidentAdapter) -> None:
        """Take over an adapter whose values somebody else has written to the bank: benchmarks make
        thousands on the device, faster than from files."""
        with self._lock:
            place = self._place(version)
            assert not place.is_ready
            place.resident = resident
            self._idle[version] = None

    def close(self) -> None:
        """Let the loader threads finish what they are at, and end."""
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # --- the engine's thread, between two steps ----------------------------------------------

    def poll(self) -> None:
        """Make the planes that uploads wait for, and close holes where nothing fits for them."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            for place in self._fresh:
                if place.stays_until == math.inf:
                    place.stays_until = time.monotonic() + FRESH_S
            self._fresh.clear()
        for table, loads in waiting.items():
            try:
                ready = self._ready_plane(table, [load.place for load in loads])
            except Exception as error:  # for want of memory, say: the engine goes on
                for load in loads:
                    self._failed(load, error)
                continue
            for load in loads:
                if ready is None:
                    self._give_up(load.place)
                else:
                    self._submit(replace(load, ready=ready))
        with self._lock:
            if self._needs_compaction and not self._num_writing:
                self._compact()

    def fetch(self, version: AdapterVersion) -> Readiness:
        """Bring a version to the device at once, in this thread, which has nothing else to do.

        Raises:
            AdapterNotFoundError, AdapterFormatError: as `read`.
        """
        with self._lock:
            place = self._place(version)
            starts = self._begin(version, place)
            if not starts and self._needs_compaction and not self._num_writing:
                self._compact()
                starts = self._begin(version, place)
        if starts:
            load = _Load(version, place)
            try:
                values = self.read(version)
                ready = self._ready_plane(values.table, [place])
                if ready is None:
                    self._give_up(place)
                else:
                    self._upload(_Load(version, place, values, ready))
            except BaseException as error:
                self._failed(load, error)
                raise
        while self.readiness(version) is Readiness.COMING:  # a loader was first
            self.poll()
            self._wakeup.wait(_WAIT_S)
        return self.readiness(version)

    def readiness(self, version: AdapterVersion) -> Readiness:
        """Whether the next step can have a version; begins to bring it up if it is not there."""
        with self._lock:
            place = self._place(version)
            if place.is_ready:
                return Readiness.READY
            place.is_wanted = True
            starts = self._begin(version, place)
            if not place.is_coming:
                if self._failed_lately(place):
                    return Readiness.FAILED
                self._short_of_room_at = time.monotonic()
                return Readiness.NO_ROOM
        if starts:
            self._submit(_Load(version, place))
        return Readiness.COMING

    def is_ready(self, version: AdapterVersion) -> bool:
        """Whether a version is on the device; begins nothing."""
        with self._lock:
            place = self._places.get(version)
            return place is not None and place.is_ready

    def could_fit(self, version: AdapterVersion, beside: AdapterVersion | None) -> bool:
        """Whether a version would have room if all left but those that are pinned, and `beside`."""
        with self._lock:
            kept = [v for v in self._places if v.is_pinned or v is beside]
            residents = [self._places[v].resident for v in kept]
            planes = {r.plane.number: r.plane.nnz for r in residents if r is not None}
        indexes = list(planes.values())
        if version.nnz not in indexes:  # else it may well be on one of these
            indexes.append(version.nnz)
        needed = sum(self._bank.values_bytes(v.nnz) for v in (version, *kept))
        needed += sum(map(self._bank.columns_bytes, indexes))
        return needed <= self._bank.size_bytes

    def error(self, version: AdapterVersion) -> AdapterUnavailable:
        """Why a version has FAILED."""
        with self._lock:
            error = self._place(version).error
        return AdapterUnavailable(f"adapter {version.name!r} cannot be used now: {error}")

    def hold(self, version: AdapterVersion) -> None:
        """Keep a version that is READY on the device until `let_go`; counted."""
        is_held = self.hold_if_ready(version)
        assert is_held

    def hold_if_ready(self, version: AdapterVersion) -> bool:
        """Hold a version unless a loader has just taken its room for another one."""
        with self._lock:
            place = self._places.get(version)
            if place is None or not place.is_ready:
                return False
            if not place.num_holders:
                self._idle.pop(version, None)
            place.num_holders += 1
            place.is_wanted, place.stays_until = False, 0.0
            return True

    def resident(self, version: AdapterVersion) -> ResidentAdapter:
        """Where a version that is held is."""
        resident = self._places[version].resident
        assert resident is not None
        return resident

    def let_go(self, version: AdapterVersion) -> None:
        with self._lock:
            place = self._places[version]
            place.num_holders -= 1
            assert place.num_holders >= 0
            if not place.num_holders:
                self._idle[version] = None

    # --- inside ------------------------------------------------------------------------------

    def _place(self, version: AdapterVersion) -> _Place:
        return self._places.setdefault(version, _Place())

    def _begin(self, version: AdapterVersion, place: _Place) -> bool:
        """Reserve room for a version that is neither there nor on its way: whether its values are
        to be brought up now."""
        if place.is_ready or place.is_coming or self._failed_lately(place):
            return False
        place.error = None
        values_bytes = self._bank.values_bytes(version.nnz)
        index_bytes = self._bank.columns_bytes(version.nnz) if place.lacks_index else 0
        place.room = self._reserve(values_bytes)
        if place.room is not None and index_bytes:
            place.index_room = self._reserve(index_bytes)
            if place.index_room is None:
                self._bank.cancel(place.room)
                place.room = None
        if place.room is None and self._bank.free_bytes >= values_bytes + index_bytes:
            self._needs_compaction = True  # what is free would do in one piece
        place.is_coming = place.room is not None
        return place.is_coming

    def _reserve(self, num_bytes: int) -> Extent | None:
        """Room in one piece; idle adapters go for it."""
        while (room := self._bank.reserve(num_bytes)) is None:
            if not self._make_room():
                return None
        return room

    def _failed_lately(self, place: _Place) -> bool:
        return place.error is not None and time.monotonic() - place.failed_at < RETRY_S

    def _run_reading(self, version: AdapterVersion) -> None:
        try:
            values = self.read(version)
        except Exception as error:
            # Left among those that are being read: it is not tried again.
            logger.error("adapter %s cannot be read to be merged: %s", version.name, error)
            return
        with self._lock:
            self._read_ahead[version] = values
            self._reading.discard(version)
        self._wakeup.notify()

    def _submit(self, load: _Load) -> None:
        try:
            self._loaders.submit(self._run, load)
        except RuntimeError:  # the pool is closed: the process ends
            self._failed(load, AdapterUnavailable("the server is shutting down"))

    def _run(self, load: _Load) -> None:
        """The next part of a load, in a loader thread."""
        try:
            if load.values is None:
                load = replace(load, values=self.read(load.version))
            assert load.values is not None
            if load.ready is None:
                with self._lock:
                    plane = self._bank.plane(load.values.table)
                    if plane is None or plane.originals is None:
                        self._waiting.setdefault(load.values.table, []).append(load)
                    else:
                        plane.num_coming += 1
                        load = replace(load, ready=_Ready(plane, plane.originals))
            if load.ready is not None:
                self._upload(load)
        except BaseException as error:
            self._failed(load, error)
        self._wakeup.notify()

    def _upload(self, load: _Load) -> None:
        """Write a version's values into the room reserved for it."""
        version, place, values, ready = load.version, load.place, load.values, load.ready
        assert values is not None
        assert ready is not None
        with self._lock:
            assert place.room is not None
            resident = self._bank.settle(place.room, ready.plane)
            ready.plane.num_coming -= 1
            place.room = None
            version.nnz = ready.plane.nnz  # of a mix, it was a bound
            if values.head is not None:
                version.head = values.head.to(ready.originals.device)
            self._num_writing += 1
        try:
            self._write(resident, ready.originals, values)
        except BaseException:
            with self._lock:
                self._num_writing -= 1
                self._bank.free(resident)
            raise
        with self._lock:
            self._num_writing -= 1
            if place.index_room is not None:  # another had brought the index
                self._bank.cancel(place.index_room)
                place.index_room = None
            if self._places.get(version) is not place:
                self._bank.free(resident)  # it went while it was written
                return
            place.resident, place.is_coming, place.lacks_index = resident, False, False
            if place.is_wanted:
                place.stays_until = math.inf  # until the engine has had a look, and then some
                self._fresh.append(place)
            self._idle[version] = None
            self.metrics.num_uploads += 1

    def _write(self, resident: ResidentAdapter, originals: Tensor, values: AdapterValues) -> None:
        if not originals.is_cuda:
            self._bank.write(resident, originals, values.values)
            return
        # Beside the engine's own stream; what it has queued so far may still read the room.
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(originals.device)  # type: ignore[no-untyped-call]
        stream: Any = self._streams.own
        stream.wait_stream(torch.cuda.default_stream(originals.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            self._bank.write(resident, originals, values.values)
        stream.synchronize()

    def _make_room(self, besides: IndexTable | None = None) -> bool:
        """Free the memory of an index that nobody uses, or of the adapter idle for longest."""
        if self._bank.drop_empty_plane(besides):
            return True
        now = time.monotonic()
        for version in self._idle:
            place = self._places[version]
            if version.is_pinned or now < place.stays_until:
                continue
            del self._idle[version]
            assert place.resident is not None
            self._bank.free(place.resident)
            place.resident = None
            self.metrics.num_device_evictions += 1
            return True
        return False

    def _ready_plane(self, table: IndexTable, places: Sequence[_Place]) -> _Ready | None:
        """A table's plane, made where there is none; None where there is no room for it."""
        with self._lock:
            plane = self._bank.plane(table)
            for place in places if plane is None else ():
                if place.index_room is not None:
                    self._bank.cancel(place.index_room)
                    place.index_room = None
            while plane is None and (plane := self._bank.add_plane(table)) is None:
                if not self._make_room(table):
                    for place in places:
                        place.lacks_index = True
                    return None
            plane.num_coming += len(places)
        originals = plane.originals
        if originals is None:
            try:
                originals = self._originals(table)
            except BaseException:
                with self._lock:
                    plane.num_coming -= len(places)
                raise
            with self._lock:
                self._bank.keep_originals(plane, originals)
        return _Ready(plane, originals)

    def _compact(self) -> None:
        self._bank.compact()
        self._needs_compaction = False
        self.metrics.num_compactions += 1

    def _give_up(self, place: _Place, error: NeuroAdaError | None = None) -> None:
        """A version does not come now; its room is free for others."""
        with self._lock:
            for room in (place.room, place.index_room):
                if room is not None:
                    self._bank.cancel(room)
            place.room = place.index_room = None
            place.is_coming = False
            if error is not None:
                place.error, place.failed_at = error, time.monotonic()

    def _failed(self, load: _Load, error: BaseException) -> None:
        if not isinstance(error, NeuroAdaError):
            logger.error("adapter %s could not be loaded", load.version.name, exc_info=error)
            error = AdapterUnavailable("the server failed to load it; its log has the cause")
        self.metrics.num_failures += 1
        self._give_up(load.place, error)
