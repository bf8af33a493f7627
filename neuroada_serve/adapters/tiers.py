"""Tiers: the values of adapters on disk, in host memory, on the device.

Host copies are the files' own values, checked; the device has what they change. Both
evict the least recently used first; on the device, pinned adapters and those in use stay.

    request: room -> loader: values -> [engine's thread: index] -> loader: write
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.host import HostValues
from neuroada_serve.adapters.loaders import Loaders
from neuroada_serve.adapters.reader import AdapterReader
from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.adapters.residency import (
    ABSENT,
    Absent,
    Failed,
    NeedsIndex,
    Reading,
    Residency,
    Resident,
    Writing,
)
from neuroada_serve.adapters.room import Room
from neuroada_serve.adapters.store import AdapterVersion, VersionState
from neuroada_serve.adapters.values import AdapterValues, IndexTable, ValuesReader
from neuroada_serve.errors import AdapterError, AdapterUnavailable
from neuroada_serve.metrics import TierMetrics
from neuroada_serve.wakeup import Wakeup

_LOADERS = 2
_WAIT_S = 0.02


class AdapterTiers:
    """Moves adapters between disk, host and device.

    Args:
        bank: the device's memory; nobody else reserves or frees in it.
        files: reads headers and bytes; values: makes flat vectors of them.
        originals: the base's weights at an index; for the engine's thread.
        host_bytes: of host copies.
        wakeup: notified when the engine's thread has something to do or to find.

    host: values that are not on the device. residency: how far each version has come.
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
        self._pool = ThreadPoolExecutor(_LOADERS, thread_name_prefix="adapters")
        self.host = HostValues(files, values, host_bytes, self._pool, self.metrics, wakeup)
        self._bank = bank
        self._originals = originals
        self._wakeup = wakeup
        self._lock = threading.Lock()  # guards everything below, and reserving in the bank
        self.residency = Residency(bank)
        self._room = Room(bank, self.residency, self.metrics)
        self._loaders = Loaders(
            self._pool,
            self._lock,
            bank,
            self.host,
            self.residency,
            self._room,
            self.metrics,
            wakeup,
        )

    # --- any thread --------------------------------------------------------------------------

    def tier_of(self, version: AdapterVersion) -> str:
        """Return the highest tier with a version's values: device, host or disk. An adapter in
        memory that has no file is on the host."""
        if self.is_ready(version):
            return "device"
        return "host" if version in self.host else "disk"

    def check_size(self, nnz: int, name: str) -> None:
        """Refuse an adapter of so many values that it never fits the device memory set aside.

        Raises:
            AdapterError: an adapter of so many values never fits the device memory set aside.
        """
        needed = self._bank.memory.values_bytes(nnz) + self._bank.memory.columns_bytes(nnz)
        if needed > self._bank.memory.size_bytes:
            raise AdapterError(
                f"adapter {name!r} needs {needed} bytes on the device with its index, and "
                f"{self._bank.memory.size_bytes} are set aside; raise --adapter-memory"
            )

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to bring a version to the device, unless it is there or on its way."""
        with self._lock:
            self.metrics.num_hits += self.is_ready(version)
            if self._room.is_lacking:
                return  # others wait for what it would take; its turn comes
            reading = self._begin(version)
        if reading is not None:
            self._loaders.read(version, reading)

    def discard(self, version: AdapterVersion) -> None:
        """Discard everything of a version that has gone; nobody may hold it."""
        self.host.discard(version)
        with self._lock:
            self._room.discard(version)
            if not isinstance(self.residency[version], Writing):  # its loader sees to that
                self.residency.move(version, ABSENT)
        self._wakeup.notify()

    def close(self) -> None:
        """Let the loader threads finish their work, and end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- the engine's thread, between two steps ----------------------------------------------

    def poll(self) -> None:
        """Bring the indexes that versions wait for, and close holes if nothing fits for them."""
        with self._lock:
            self._room.compact()
            self._room.start_stays()
            waiting, self._loaders.needs_index = self._loaders.needs_index, []
            by_table: dict[IndexTable, list[AdapterVersion]] = {}
            for version in waiting:
                if isinstance(state := self.residency[version], NeedsIndex):
                    by_table.setdefault(state.values.table, []).append(version)
        for table, versions in by_table.items():
            try:
                ready = self._bring_index(table, versions)
            except Exception as error:  # for want of memory, say: the engine goes on
                for version in versions:
                    self._loaders.fail(version, error)
            else:
                for version, writing, originals, values in ready:
                    self._loaders.write(version, writing, originals, values)

    def take_errors(self) -> list[BaseException]:
        """Take the latest errors of loading that nobody expected; their versions have FAILED."""
        return self._loaders.take_errors()

    def request(self, version: AdapterVersion) -> Readiness:
        """Ask for a version for the next step: begin to bring it up if it is not on the device."""
        with self._lock:
            if self.is_ready(version):
                return Readiness.READY
            if version.state is VersionState.GONE:  # nobody would discard it again
                return Readiness.NO_ROOM
            self._room.want(version)
            reading = self._begin(version)
            state = self.residency[version]
            if isinstance(state, Failed) and state.is_recent:
                return Readiness.FAILED
            if isinstance(state, Absent | Failed):
                self._room.report_lack()
                return Readiness.NO_ROOM
        if reading is not None:
            self._loaders.read(version, reading)
        return Readiness.COMING

    def fetch(self, version: AdapterVersion) -> Readiness:
        """Bring a version to the device at once, in this thread, which has nothing else to do.

        Raises:
            AdapterNotFoundError, AdapterFormatError: as `HostValues.read`.
        """
        with self._lock:
            reading = self._begin(version)
            if reading is None and self._room.compact():
                reading = self._begin(version)
        if reading is not None:
            try:
                values = self.host.read(version)
                with self._lock:
                    if self.residency[version] is reading:  # else it has been unloaded
                        needs_index = NeedsIndex(values, reading.room, reading.index_room)
                        self.residency.move(version, needs_index)
                for load in self._bring_index(values.table, [version]):
                    self._loaders.write_now(*load)
            except BaseException as error:
                self._loaders.fail(version, error)
                raise
        while (readiness := self.request(version)) is Readiness.COMING:  # a loader was first
            self.poll()
            self._wakeup.wait(_WAIT_S)
        return readiness

    def is_ready(self, version: AdapterVersion) -> bool:
        """Return whether a version is on the device."""
        return isinstance(self.residency[version], Resident)

    def could_fit(self, version: AdapterVersion, beside: AdapterVersion | None) -> bool:
        """Return whether a version would have room if all left but the pinned ones and `beside`."""
        with self._lock:
            return self._room.could_fit(version, beside)

    def error(self, version: AdapterVersion) -> AdapterUnavailable:
        """Make the error of requests for a version that has FAILED."""
        state = self.residency[version]
        error = state.error if isinstance(state, Failed) else None
        return AdapterUnavailable(f"adapter {version.name!r} cannot be used now: {error}")

    def hold(self, version: AdapterVersion) -> bool:
        """Keep a version on the device until `release`; counted. False: it is not there, since a
        loader may just have taken its room for another one."""
        with self._lock:
            is_ready = self.is_ready(version)
            if is_ready:
                self._room.hold(version)
            return is_ready

    def release(self, version: AdapterVersion) -> None:
        with self._lock:
            self._room.release(version)

    def resident(self, version: AdapterVersion) -> ResidentAdapter:
        """Return the place of a version that is held."""
        resident = self.residency.resident(version)
        assert resident is not None
        return resident

    # --- inside ------------------------------------------------------------------------------

    def _begin(self, version: AdapterVersion) -> Reading | None:
        """Reserve room for a version, if it is neither there nor on its way."""
        state = self.residency[version]
        can_begin = isinstance(state, Absent) or (isinstance(state, Failed) and not state.is_recent)
        if not can_begin or version.state is VersionState.GONE:
            return None
        lacks_index = isinstance(state, Absent) and state.lacks_index
        reading = self._room.reserve(version.nnz, with_index=lacks_index)
        if reading is not None:
            self.residency.move(version, reading)
        return reading

    def _bring_index(
        self, table: IndexTable, versions: Sequence[AdapterVersion]
    ) -> list[tuple[AdapterVersion, Writing, Tensor, AdapterValues]]:
        """Bring an index, and the base's weights at it, to the device.

        Returns:
            The versions that can be written now, with all that takes; none where there is no room
            for the index.
        """
        with self._lock:
            waiting = {v: s for v in versions if isinstance(s := self.residency[v], NeedsIndex)}
            plane = self._bank.plane(table)
            if plane is None:
                for version, state in waiting.items():
                    self.residency.move(version, replace(state, index_room=None))
                plane = self._room.add_plane(table)
            if plane is None:
                for version in waiting:
                    self.residency.move(version, Absent(lacks_index=True))
                return []
            writing = {v: self.residency.settle(v, s.values) for v, s in waiting.items()}
        if (originals := plane.originals) is None:
            originals = self._originals(table)
            with self._lock:
                self._bank.keep_originals(plane, originals)
        return [(v, writing[v], originals, state.values) for v, state in waiting.items()]
