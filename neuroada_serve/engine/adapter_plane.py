"""The engine's adapters: names, tiers and the weights, and what may be done to them while it runs.

Loading, replacing and unloading belong to whatever thread asks; they touch neither the weights nor
a running step. The engine's thread brings the device and the merged weights in line between steps.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.directory import AdapterDirectory
from neuroada_serve.adapters.format import Adapter, check_adapter
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader
from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion, VersionState
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.adapters.values import FlatOrder, ValuesReader
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.merge_control import MergeControl
from neuroada_serve.engine.merge_policy import Load
from neuroada_serve.errors import AdapterError, NeuroAdaError, UsageError
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
    """What there is to know of one version.

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


@dataclass(frozen=True)
class Rescan:
    """What looking at the adapter directory again has changed, by name."""

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class AdapterPlane:
    """Owns bank, store, tiers and what is merged of one engine; the scheduler's `Adapters`.

    Args:
        wakeup: notified, in any thread, when the engine's thread has something to do.
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
        self.bank = AdapterBank(base.device, base.dtype, _device_bytes(config, base.device))
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
        self.store = AdapterStore(base.spec.name, self.tiers.forget, wakeup.notify)
        self._merging = MergeControl(
            config.merge,
            merger,
            self.bank,
            self.store,
            self.tiers,
            metrics,
            device,
            config.max_num_seqs,
        )
        self._to_abort: queue.SimpleQueue[AdapterVersion] = queue.SimpleQueue()
        self._directory: AdapterDirectory | None = None
        self._scanned: dict[str, tuple[AdapterVersion, tuple[int, ...]]] = {}
        self._scanning = threading.Lock()

    # --- any thread: what there is -----------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that requests can use now."""
        return self.store.names

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is merged into the weights."""
        version = self.merged_version
        return None if version is None else version.name

    @property
    def merge_mode(self) -> str:
        """never, auto, or the name of the adapter to keep merged."""
        return self._merging.mode

    def describe(self) -> list[AdapterInfo]:
        """All adapters, in the order of their names."""
        return sorted(map(self._info, self.store.versions), key=lambda info: info.name)

    def describe_one(self, name: str) -> AdapterInfo:
        """An adapter, or a mix that requests could name.

        Raises:
            AdapterNotFoundError
            AdapterError: it is written like a mix, and is none.
        """
        lease = self.store.acquire(name)
        lease.release()
        return self._info(lease.version)

    def check_model(self, name: str) -> None:
        """Whether requests may name this adapter, or mix, now.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            AdapterError: it is no mix either.
        """
        self.store.acquire(name).release()

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes in use and set aside, on the device and on the host, and how many adapters are
        there."""
        used, size = self.tiers.device_bytes
        host_used, host_size = self.tiers.host_bytes
        return {
            "device": {"used": used, "size": size, "adapters": self.tiers.num_resident},
            "host": {"used": host_used, "size": host_size, "adapters": self.tiers.num_in_host},
        }

    def _info(self, version: AdapterVersion) -> AdapterInfo:
        source = version.source
        return AdapterInfo(
            name=version.name,
            digest=version.digest,
            state=version.state.value,
            tier=self.tiers.tier_of(version),
            k=source.config.k if isinstance(source, AdapterHeader | Adapter) else None,
            nnz=version.nnz,
            size_bytes=self.bank.values_bytes(version.nnz),
            num_leases=version.num_leases,
            is_pinned=version.is_pinned,
            is_merged=self.merged_version is version,
            since=version.since,
            labels=version.task.labels,
        )

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
        return self.store.add(AdapterVersion(name, digest, nnz, source), self._read, replace)

    def _read(self, version: AdapterVersion) -> None:
        self.tiers.read(version)

    def reserve(self, names: Sequence[str]) -> None:
        """As `AdapterStore.reserve`."""
        self.store.reserve(names)

    def unload(self, name: str, timeout_s: float = 0.0, abort: bool = False) -> None:
        """Stop serving an adapter, and free all it holds, once its requests have finished.

        Args:
            timeout_s: most seconds to wait for them.
            abort: end them then, instead of giving up.

        Raises:
            AdapterNotFoundError
            AdapterInUseError: they had not finished; the adapter is served as before.
        """
        if self.merged == name:  # the engine, too, must let go of it: between two steps
            timeout_s = max(timeout_s, _UNMERGE_TIMEOUT_S)
        self.store.remove(name, timeout_s, self._abort if abort else None)

    def _abort(self, version: AdapterVersion) -> None:
        self._to_abort.put(version)
        self._wakeup.notify()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, or let it go like others again.

        Raises:
            AdapterNotFoundError
            AdapterError: what is pinned would leave no room for another adapter.
        """
        if not pinned:
            self.store.pin(name, False)
            return
        versions = self.store.versions
        largest = max((v.nnz for v in versions), default=0)
        own = self.store.get(name)
        kept = sum(self.bank.values_bytes(v.nnz) for v in versions if v.is_pinned and v is not own)
        needed = kept + self.bank.values_bytes(own.nnz) + self.bank.values_bytes(largest)
        if needed + self.bank.columns_bytes(largest) > self.bank.size_bytes:
            raise AdapterError(
                f"pinning {name!r} would leave no room for others: {kept} of "
                f"{self.bank.size_bytes} bytes are pinned already; unpin one or raise "
                "--adapter-memory"
            )
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

    def set_merge_mode(self, mode: str) -> None:
        """never, auto, or the name of an adapter to keep merged; the next step brings it about.

        Raises:
            AdapterNotFoundError
        """
        if mode not in ("never", "auto"):
            self.store.get(mode)
        self._merging.set_mode(mode)
        self._wakeup.notify()

    # --- any thread: the adapter directory ---------------------------------------------------

    def open_directory(
        self, root: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Rescan:
        """Serve every adapter folder in a directory under its folder's name.

        Raises:
            UsageError: it is no directory.
        """
        self._directory = AdapterDirectory(root, self._files)
        return self.rescan(on_progress)

    def rescan(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Rescan:
        """Look at the adapter directory again. New folders are served, by their header alone;
        changed ones once their values are read and right; adapters whose folder has gone are
        unloaded when their requests have finished. What was loaded in another way stays as it is.

        Raises:
            UsageError: there is no adapter directory.
        """
        if self._directory is None:
            raise UsageError("there is no adapter directory; start with --adapter-dir")
        with self._scanning:
            known = {
                name: stamp
                for name, (version, stamp) in self._scanned.items()
                if version.state is VersionState.READY
            }
            scan = self._directory.scan(known, on_progress)
            failed, added, replaced = dict(scan.faults), list[str](), list[str]()
            unchanged = len(scan.unchanged)
            for name, header in scan.headers.items():
                before = self._scanned.get(name) if name in known else None
                try:
                    self.tiers.check_size(header.nnz, name)
                    version = AdapterVersion(name, header.digest, header.nnz, header)
                    if before is None:
                        served = self.store.add(version)
                        added += [name] * (served is version)
                    else:
                        served = self.store.add(version, self._read, replace=True)
                        replaced += [name] * (served is version)
                    unchanged += served is not version  # touched, or loaded by name: the same bytes
                    self._scanned[name] = served, header.stamp
                except NeuroAdaError as error:
                    failed[name] = str(error)
                except OSError as error:
                    failed[name] = f"its files cannot be read: {error.strerror}"
            gone = [n for n in known if n not in scan.unchanged and n not in scan.headers]
            gone = [name for name in gone if name not in scan.faults]
            for name in gone:
                version, _ = self._scanned.pop(name)
                if self.store.find(name) is version:
                    self.store.remove(name, wait=False)
            return Rescan(tuple(added), tuple(replaced), tuple(gone), unchanged, failed)

    def preload(
        self, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Mapping[str, str]:
        """Bring all adapters to the device, or to the host, while there is room, by name; for the
        engine's thread, before it serves.

        Returns:
            Why some are no adapters, by name.
        """
        failed: dict[str, str] = {}
        versions = sorted(self.store.versions, key=lambda version: version.name)
        device_is_full = False
        for done, version in enumerate(versions):
            on_progress(done, len(versions))
            used, size = self.tiers.host_bytes
            try:
                if not device_is_full:
                    before = self.tiers.metrics.num_device_evictions
                    self.tiers.fetch(version)
                    device_is_full = self.tiers.metrics.num_device_evictions > before
                elif used + 2 * version.nnz <= size:
                    self.tiers.read(version)
                else:
                    break
            except NeuroAdaError as error:
                failed[version.name] = str(error)
        on_progress(len(versions), len(versions))
        return failed

    # --- the engine's thread -----------------------------------------------------------------

    def poll(self, loads: Callable[[], Iterable[Load]]) -> list[AdapterVersion]:
        """What is to be done between two steps: uploads that need this thread, and the weights.

        Args:
            loads: tokens still to come, by adapter.

        Returns:
            Versions whose requests are to be aborted.
        """
        self.tiers.poll()
        self._merging.bring_in_line(loads)
        to_abort = []
        while not self._to_abort.empty():
            to_abort.append(self._to_abort.get())
        return to_abort

    @property
    def merged_version(self) -> AdapterVersion | None:
        """What is in the weights."""
        return self._merging.version

    def bring_in(self, name: str) -> None:
        """Bring an adapter to the device now, where there is room, and into the weights if it is to
        be kept there.

        Raises:
            AdapterNotFoundError
            AdapterError: its files are not right.
        """
        self.tiers.fetch(self.store.get(name))
        self._merging.bring_in_line(lambda: ())

    def add_resident(self, name: str, adapter: Adapter, replace: bool = False) -> None:
        """`add` and `bring_in`."""
        self.add(name, adapter, replace)
        self.bring_in(name)

    def merge(self, name: str) -> None:
        """Write an adapter, or a mix, into the weights now; see `MergeControl.merge`."""
        self._merging.merge(name)

    def unmerge(self) -> None:
        """Give the base weights back, bit for bit, and keep them so."""
        self._merging.unmerge()

    def remove(self, name: str) -> None:
        """Take a name away at once; requests that run with it finish.

        Raises:
            AdapterNotFoundError
        """
        version = self.store.get(name)
        if self.merged_version is version:
            self._merging.put_back()
        self.store.remove(name, wait=False)

    # The scheduler's view.

    def is_ready(self, version: AdapterVersion) -> bool:
        return self.tiers.is_ready(version)

    def readiness(self, version: AdapterVersion) -> Readiness:
        return self.tiers.readiness(version)

    def can_leave(self, version: AdapterVersion) -> bool:
        return not version.is_pinned and version is not self.merged_version

    def make_way(self) -> None:
        """Nothing can run for want of room: what auto has merged need not stay."""
        if self._merging.is_auto and self.merged_version is not None:
            self._merging.put_back()

    def could_fit(self, version: AdapterVersion) -> bool:
        """Whether there would be room if all left that may."""
        # What auto has merged may.
        return self.tiers.could_fit(version, None if self._merging.is_auto else self.merged_version)

    def hold(self, version: AdapterVersion) -> None:
        self.tiers.hold(version)

    def let_go(self, version: AdapterVersion) -> None:
        self.tiers.let_go(version)

    def resident(self, version: AdapterVersion) -> ResidentAdapter:
        """Where a version that is held is on the device."""
        return self.tiers.resident(version)


def _device_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.adapter_memory is not None:
        return config.adapter_memory
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE)
    return _DEVICE_BYTES_CPU
