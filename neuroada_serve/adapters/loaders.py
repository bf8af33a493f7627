"""The threads that bring adapters to the device while the engine computes.

The engine's thread is needed only where an index is new to the device: the base's weights at that
index can be read between two steps alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.host import HostValues
from neuroada_serve.adapters.residency import (
    ABSENT,
    Failed,
    NeedsIndex,
    Reading,
    Residency,
    Resident,
    Writing,
)
from neuroada_serve.adapters.room import Room
from neuroada_serve.adapters.store import AdapterVersion, VersionState
from neuroada_serve.adapters.values import AdapterValues
from neuroada_serve.errors import AdapterUnavailable, NeuroAdaError
from neuroada_serve.metrics import TierMetrics
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

_MOST_ERRORS = 16  # kept for `take_errors`


class Loaders:
    """Read and write versions in threads; whoever moves one to READING hands it over with
    `read`.

    Args:
        pool: the threads.
        lock: guards the residency, the room and reserving in the bank.
        wakeup: notified when a version has arrived, has failed or needs its index.

    needs_index: versions that wait for the engine's thread, and some that no longer do.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        lock: threading.Lock,
        bank: AdapterBank,
        host: HostValues,
        residency: Residency,
        room: Room,
        metrics: TierMetrics,
        wakeup: Wakeup,
    ) -> None:
        self.needs_index: list[AdapterVersion] = []
        self._pool = pool
        self._lock = lock
        self._bank = bank
        self._host = host
        self._residency = residency
        self._room = room
        self._metrics = metrics
        self._wakeup = wakeup
        self._streams = threading.local()
        self._errors: deque[BaseException] = deque(maxlen=_MOST_ERRORS)

    def read(self, version: AdapterVersion, reading: Reading) -> None:
        """Read a version in a loader thread, and write it where its index is on the device."""
        self._submit(version, partial(self._read, version, reading))

    def write(
        self, version: AdapterVersion, writing: Writing, originals: Tensor, values: AdapterValues
    ) -> None:
        """Write a version in a loader thread."""
        self._submit(version, partial(self.write_now, version, writing, originals, values))

    def write_now(
        self, version: AdapterVersion, writing: Writing, originals: Tensor, values: AdapterValues
    ) -> None:
        """Write a version into its room, in this thread."""
        self._fill(writing.resident, originals, values)
        with self._lock:
            if self._finish(version, Resident(writing.resident)):
                self._room.add(version)
                self._metrics.num_uploads += 1

    def fail(self, version: AdapterVersion, error: BaseException) -> None:
        """Give up a version that is on its way, and keep the reason for a while."""
        if not isinstance(error, NeuroAdaError):
            logger.error("adapter %s could not be loaded", version.name, exc_info=error)
            self._errors.append(error)
            error = AdapterUnavailable("the server failed to load it; its log has the cause")
        with self._lock:
            self._metrics.num_failures += 1
            if isinstance(self._residency[version], Reading | NeedsIndex | Writing):
                self._finish(version, Failed(error))

    def take_errors(self) -> list[BaseException]:
        """Take the latest errors of `fail` that are none of ours."""
        return [self._errors.popleft() for _ in range(len(self._errors))]

    def _finish(self, version: AdapterVersion, state: Resident | Failed) -> bool:
        """End the way of a version; False: it has been unloaded meanwhile."""
        self._residency.move(version, state)
        if version.state is VersionState.GONE:
            self._residency.move(version, ABSENT)
        return version.state is not VersionState.GONE

    def _submit(self, version: AdapterVersion, work: Callable[[], None]) -> None:
        try:
            self._pool.submit(self._run, version, work)
        except RuntimeError:  # the pool is closed: the process ends
            self.fail(version, AdapterUnavailable("the server is shutting down"))

    def _run(self, version: AdapterVersion, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.fail(version, error)
        self._wakeup.notify()

    def _read(self, version: AdapterVersion, reading: Reading) -> None:
        values = self._host.read(version)
        with self._lock:
            if self._residency[version] is not reading:
                return  # it has been unloaded
            plane = self._bank.plane(values.table)
            originals = None if plane is None else plane.originals
            if originals is None:
                needs_index = NeedsIndex(values, reading.room, reading.index_room)
                self._residency.move(version, needs_index)
                self.needs_index.append(version)
                return
            writing = self._residency.settle(version, values)
        self.write_now(version, writing, originals, values)

    def _fill(self, resident: ResidentAdapter, originals: Tensor, values: AdapterValues) -> None:
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
