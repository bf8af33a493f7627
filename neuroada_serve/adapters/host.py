"""Values of adapters on this side of the device: in host memory, or read from their files."""

import logging
import threading
from concurrent.futures import Executor
from weakref import WeakKeyDictionary, WeakSet

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.host_cache import HostCache
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader
from neuroada_serve.adapters.store import AdapterVersion, VersionState
from neuroada_serve.adapters.values import AdapterValues, ValuesReader
from neuroada_serve.metrics import TierMetrics
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)


class HostValues:
    """Gives a version's values, and keeps copies in host memory. Safe in any thread.

    Args:
        files: reads bytes; values: checks them and makes flat vectors of them.
        size_bytes: of the copies.
        loaders: the threads that `request` reads in.
        wakeup: notified when these have read something.
    """

    def __init__(
        self,
        files: AdapterReader,
        values: ValuesReader,
        size_bytes: int,
        loaders: Executor,
        metrics: TierMetrics,
        wakeup: Wakeup,
    ) -> None:
        self._files = files
        self._values = values
        self._loaders = loaders
        self._metrics = metrics
        self._wakeup = wakeup
        self._lock = threading.Lock()  # guards everything below
        self._cache = HostCache(size_bytes)
        self._reading: WeakSet[AdapterVersion] = WeakSet()  # for `request`
        self._read_ahead: WeakKeyDictionary[AdapterVersion, AdapterValues] = WeakKeyDictionary()

    def __contains__(self, version: AdapterVersion) -> bool:
        """Return whether values can be had without reading a file; an adapter in memory has
        none."""
        return version in self._cache or isinstance(version.source, Adapter)

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def used_bytes(self) -> int:
        return self._cache.used_bytes

    @property
    def size_bytes(self) -> int:
        return self._cache.size_bytes

    def read(self, version: AdapterVersion) -> AdapterValues:
        """Return a version's values, from host memory or from disk, where they are checked.

        Raises:
            AdapterNotFoundError, AdapterFormatError: the files have gone or are not what they were.
        """
        with self._lock:
            known = self._cache.get(version)
        if known is not None:
            return known
        source = version.source
        if isinstance(source, AdapterHeader):
            values = self._values.read(source, self._files)
            self._metrics.num_disk_reads += 1
        elif isinstance(source, Adapter):
            values = self._values.of(source)
        else:
            values = self._values.mix([(self.read(part), weight) for part, weight in source.parts])
        with self._lock:
            if version.state is not VersionState.GONE:  # `discard` has come, or is to come
                self._metrics.num_host_evictions += self._cache.put(version, values)
        return values

    def request(self, version: AdapterVersion) -> AdapterValues | None:
        """Return a version's values if that takes no reading; else None, and a loader reads them
        for the next time."""
        with self._lock:
            known = self._cache.get(version) or self._read_ahead.pop(version, None)
            if known is not None or version in self._reading:
                return known
            self._reading.add(version)
        self._loaders.submit(self._read_for_request, version)
        return None

    def discard(self, version: AdapterVersion) -> None:
        """Discard the copy of a version that has gone."""
        with self._lock:
            self._cache.remove(version)

    def _read_for_request(self, version: AdapterVersion) -> None:
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
