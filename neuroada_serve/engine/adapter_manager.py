"""The manager of an engine's adapters: names, tiers and weights, and what may be done to them
while it runs.

Loading, replacing and unloading belong to whatever thread asks; they touch neither the weights nor
a running step. The engine's thread brings the device and the merged weights in line between steps.
"""

import logging
import os
import queue
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from neuroada_serve.adapters.bank import AdapterBank
from neuroada_serve.adapters.directory import AdapterDirectory, OnProgress, Rescan
from neuroada_serve.adapters.format import Adapter, check_adapter
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader
from neuroada_serve.adapters.slot_memory import SlotMemory
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.adapters.values import FlatOrder, ValuesReader
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.faults import raise_device_fault
from neuroada_serve.engine.merge_control import MergeControl
from neuroada_serve.engine.merge_policy import Load
from neuroada_serve.errors import AdapterError, UsageError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.bypass_linear import AttachedBypass
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

_UNMERGE_TIMEOUT_S = 2.0
_GPU_SHARE = 0.1  # of its memory, for adapters
_DEVICE_BYTES_CPU = 2 << 30
_HOST_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class AdapterInfo:
    """All that is known of one version.

    state: loading, ready or draining. tier: disk, host or device.
    num_leases: requests that wait or run with it; a merged one has one more.
    size_bytes: of its values on the device.
    labels: of a classifier.
    """

    name: str
    digest: str
    state: str
    tier: str
    k: int | None
    nnz: int
    size_bytes: int
    num_leases: int
    is_pinned: bool
    is_merged: bool
    since: int  # unix time
    labels: tuple[str, ...] = ()


class AdapterManager:
    """Put together the adapters of one engine, and do what takes more than one of its parts.

    Args:
        wakeup: notified, in any thread, when the engine's thread has something to do.

    bank: the device's memory. store: names and versions. tiers: where values are. merging: what is
    in the weights.
    """

    def __init__(
        self,
        base: BaseModel,
        attached: AttachedBypass,
        config: EngineConfig,
        metrics: EngineMetrics,
        wakeup: Wakeup,
    ) -> None:
        device = base.device.type
        self._base = base
        self._allow_other_base = config.allow_other_base
        self._wakeup = wakeup
        merger = WeightMerger(attached.layers)
        self.bank = AdapterBank(
            SlotMemory(base.device, base.dtype, _device_bytes(config, base.device))
        )
        self._files = AdapterReader(base.spec, allow_other_base=config.allow_other_base)
        d_outs = {module: d_out for module, (d_out, _) in base.spec.shapes.items()}
        values = ValuesReader(
            FlatOrder(attached.sites, d_outs), base.spec, base.dtype, pin=device == "cuda"
        )
        host_bytes = config.adapter_host_memory
        self.tiers = AdapterTiers(
            self.bank,
            self._files,
            values,
            merger.originals,
            _HOST_BYTES[device] if host_bytes is None else host_bytes,
            wakeup,
        )
        self.store = AdapterStore(base.spec.name, self.tiers.discard, wakeup.notify)
        self.merging = MergeControl(
            config.merge,
            merger,
            self.bank,
            self.store,
            self.tiers,
            metrics,
            device,
            config.max_num_seqs,
            wakeup,
        )
        self._to_abort: queue.SimpleQueue[AdapterVersion] = queue.SimpleQueue()
        self._directory: AdapterDirectory | None = None

    # --- any thread: what there is -----------------------------------------------------------

    def describe(self) -> list[AdapterInfo]:
        """Describe all adapters, in the order of their names."""
        infos = [_info(v, self.tiers, self.bank, self.merging) for v in self.store.versions]
        return sorted(infos, key=lambda info: info.name)

    def describe_one(self, name: str) -> AdapterInfo:
        """Describe an adapter, or a mix that requests could name.

        Raises:
            AdapterNotFoundError
            AdapterError: it is written like a mix, and is none.
        """
        lease = self.store.acquire(name)
        lease.release()
        return _info(lease.version, self.tiers, self.bank, self.merging)

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Return bytes in use and set aside, on the device and on the host, and the number of
        adapters there."""
        device, host = self.bank.memory, self.tiers.host
        return {
            "device": {
                "used": device.used_bytes,
                "size": device.size_bytes,
                "adapters": self.bank.num_resident,
            },
            "host": {"used": host.used_bytes, "size": host.size_bytes, "adapters": len(host)},
        }

    # --- any thread: changes -----------------------------------------------------------------

    def check(self, adapter: Adapter) -> None:
        """Check an adapter in memory against the base.

        Raises:
            AdapterFormatError: it belongs to another base or does not fit this one.
        """
        check_adapter(adapter, self._base.spec, allow_other_base=self._allow_other_base)

    def add(self, name: str, adapter: Adapter, replace: bool = False) -> AdapterVersion:
        """Serve an adapter in memory, which has been checked.

        Raises:
            AdapterError: as `load`.
        """
        return self._add(name, adapter.digest, adapter.nnz, adapter, replace)

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        root: Path | None = None,
        replace: bool = False,
    ) -> AdapterVersion:
        """Read, check and serve an adapter directory. Requests that run keep the version they have.

        The same file under the same name again changes nothing and is no error.

        Args:
            root: refuse what leads outside this directory.
            replace: take the name from another adapter. Until the new one is ready, and if it never
                is, the old one is served.

        Raises:
            AdapterNotFoundError, AdapterFormatError: as `AdapterReader.header`.
            AdapterConflictError: the name is taken, and replace is False, or it is the base's.
            AdapterError: the name is not allowed, or the adapter larger than its memory.
        """
        header = self._files.header(path, root)
        return self._add(name, header.digest, header.nnz, header, replace)

    def _add(
        self, name: str, digest: str, nnz: int, source: AdapterHeader | Adapter, replace: bool
    ) -> AdapterVersion:
        self.tiers.check_size(nnz, name)
        version = AdapterVersion(name, digest, nnz, source)
        return self.store.add(version, self.tiers.host.read, replace)

    def unload(self, name: str, timeout_s: float = 0.0, abort: bool = False) -> None:
        """Stop serving an adapter, and free all it holds, once its requests have finished.

        Args:
            timeout_s: most seconds to wait for them.
            abort: end them then, instead of giving up.

        Raises:
            AdapterNotFoundError
            AdapterInUseError: they had not finished; the adapter is served as before.
        """
        merged = self.merging.version
        if merged is not None and any(v.name == name for v in (merged, *merged.parts)):
            timeout_s = max(timeout_s, _UNMERGE_TIMEOUT_S)  # released between two steps
        self.store.remove(name, timeout_s, self._abort if abort else None)

    def _abort(self, version: AdapterVersion) -> None:
        self._to_abort.put(version)
        self._wakeup.notify()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, or stop keeping it there.

        Raises:
            AdapterNotFoundError
            AdapterError: what is pinned would leave no room for another adapter.
        """
        if not pinned:
            self.store.pin(name, False)
            return
        _check_pin(self.store.get(name), self.store.versions, self.bank.memory)
        self.tiers.prefetch(self.store.pin(name))

    def prefetch(self, name: str | None) -> None:
        """Begin to bring an adapter or a mix to the device; None, the base, is there.

        Raises:
            AdapterNotFoundError, AdapterError: as `AdapterStore.acquire`.
        """
        if name is not None:
            lease = self.store.acquire(name)
            self.tiers.prefetch(lease.version)
            lease.release()

    # --- any thread: the adapter directory ---------------------------------------------------

    def open_directory(
        self, root: Path, on_progress: OnProgress = lambda done, total: None
    ) -> Rescan:
        """Serve every adapter folder in a directory under its folder's name.

        Raises:
            UsageError: it is no directory.
        """
        self._directory = AdapterDirectory(root, self._files, self.store, self.tiers)
        return self._directory.rescan(on_progress)

    def rescan(self) -> Rescan:
        """Scan the adapter directory again; see `AdapterDirectory.rescan`.

        Raises:
            UsageError: there is no adapter directory.
        """
        if self._directory is None:
            raise UsageError("there is no adapter directory; start with --adapter-dir")
        return self._directory.rescan()

    # --- the engine's thread -----------------------------------------------------------------

    def poll(self, loads: Callable[[], Iterable[Load]]) -> list[AdapterVersion]:
        """Do the work between two steps: uploads that need this thread, and the weights.

        Args:
            loads: tokens still to come, by adapter.

        Returns:
            Versions whose requests are to be aborted.
        """
        self.tiers.poll()
        for error in self.tiers.take_errors():
            raise_device_fault(error, self._base.device)
        self.merging.bring_in_line(loads)
        to_abort = []
        while not self._to_abort.empty():
            to_abort.append(self._to_abort.get())
        return to_abort

    def bring_in(self, name: str) -> None:
        """Bring an adapter to the device now if there is room, and into the weights if it is to
        be kept there.

        Raises:
            AdapterNotFoundError
            AdapterError: its files are not right.
        """
        self.tiers.fetch(self.store.get(name))
        self.merging.bring_in_line(lambda: ())

    def add_resident(self, name: str, adapter: Adapter, replace: bool = False) -> None:
        """Add an adapter and bring it in: `add`, then `bring_in`."""
        self.add(name, adapter, replace)
        self.bring_in(name)

    def remove(self, name: str) -> None:
        """Remove a name at once; requests that run with it finish.

        Raises:
            AdapterNotFoundError
        """
        version = self.store.get(name)
        if self.merging.version is version:
            self.merging.restore()
        self.store.remove(name, wait=False)


def _info(
    version: AdapterVersion, tiers: AdapterTiers, bank: AdapterBank, merging: MergeControl
) -> AdapterInfo:
    source, nnz = version.source, tiers.residency.nnz(version)
    return AdapterInfo(
        name=version.name,
        digest=version.digest,
        state=version.state.value,
        tier=tiers.tier_of(version),
        k=source.config.k if isinstance(source, AdapterHeader | Adapter) else None,
        nnz=nnz,
        size_bytes=bank.memory.values_bytes(nnz),
        num_leases=version.num_leases,
        is_pinned=version.is_pinned,
        is_merged=merging.version is version,
        since=version.since,
        labels=version.task.labels,
    )


def _check_pin(
    own: AdapterVersion, versions: tuple[AdapterVersion, ...], memory: SlotMemory
) -> None:
    """Refuse a pin that leaves too little room.

    Raises:
        AdapterError: with `own`, the pinned versions would leave no room for the largest one.
    """
    largest = max((v.nnz for v in versions), default=0)
    kept = sum(memory.values_bytes(v.nnz) for v in versions if v.is_pinned and v is not own)
    needed = kept + memory.values_bytes(own.nnz) + memory.values_bytes(largest)
    if needed + memory.columns_bytes(largest) > memory.size_bytes:
        raise AdapterError(
            f"pinning {own.name!r} would leave no room for others: {kept} of "
            f"{memory.size_bytes} bytes are pinned already; unpin one or raise --adapter-memory"
        )


def _device_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.adapter_memory is not None:
        return config.adapter_memory
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE)
    return _DEVICE_BYTES_CPU
