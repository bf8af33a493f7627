"""Merge control: keeps the weights in line with the merge mode, between two steps."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch

from neuroada_serve.adapters.bank import AdapterBank
from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion, Lease
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.adapters.values import AdapterValues
from neuroada_serve.engine.faults import raise_device_fault
from neuroada_serve.engine.merge_policy import Load, MergePolicy
from neuroada_serve.errors import AdapterUnavailable, EngineError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.merge import WeightMerger
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Mode:
    """The wanted content of the weights: what the policy says, one adapter, or nothing.

    An adapter may be named never or auto: only `MergeControl.merge` can mean that one.
    """

    policy: MergePolicy | None = None
    name: str | None = None


class MergeControl:
    """Merge and unmerge adapters. For the engine's thread only, except `mode`, `set_mode` and
    `version`.

    Args:
        mode: never, auto, or the name of an adapter, which may come later.
        device_type: "cpu" or "cuda".
        max_num_seqs: most requests that run at once.
    """

    def __init__(
        self,
        mode: str,
        merger: WeightMerger,
        bank: AdapterBank,
        store: AdapterStore,
        tiers: AdapterTiers,
        metrics: EngineMetrics,
        device_type: str,
        max_num_seqs: int,
        wakeup: Wakeup,
    ) -> None:
        self._merger = merger
        self._bank = bank
        self._store = store
        self._tiers = tiers
        self._nnz = tiers.residency.nnz
        self._metrics = metrics
        self._device_type = device_type
        self._max_num_seqs = max_num_seqs
        self._wakeup = wakeup
        self._merged: Lease | None = None
        self._refused: WeakSet[AdapterVersion] = WeakSet()  # merging these has failed
        self._mode = self._new_mode(mode)  # replaced as a whole, by any thread

    @property
    def mode(self) -> str:
        """The mode: never, auto, or the name of the adapter to keep merged."""
        mode = self._mode
        return "auto" if mode.policy is not None else mode.name or "never"

    @property
    def is_auto(self) -> bool:
        return self._mode.policy is not None

    @property
    def version(self) -> AdapterVersion | None:
        """The adapter version that is in the weights, or None."""
        merged = self._merged
        return None if merged is None else merged.version

    @property
    def merged(self) -> str | None:
        """The name of the version that is in the weights."""
        version = self.version
        return None if version is None else version.name

    def set_mode(self, mode: str) -> None:
        """Set the mode: never, auto, or the name of an adapter to keep merged. It takes effect with
        the next `bring_in_line`.

        Raises:
            AdapterNotFoundError
        """
        if mode not in ("never", "auto"):
            self._store.get(mode)
        self._mode = self._new_mode(mode)
        self._wakeup.notify()

    def can_leave(self, version: AdapterVersion) -> bool:
        """Return whether a version may leave the device once no sequence holds it."""
        return not version.is_pinned and version is not self.version

    def could_fit(self, version: AdapterVersion) -> bool:
        """Return whether a version would have room if all left that may."""
        # The version that auto has merged may: see `make_way`.
        return self._tiers.could_fit(version, None if self.is_auto else self.version)

    def make_way(self) -> None:
        """Take the version that auto has merged out of the weights, because nothing can run for
        lack of room."""
        if self.is_auto and self.version is not None:
            self.restore()

    def bring_in_line(self, loads: Callable[[], Iterable[Load]]) -> None:
        """Merge what the mode wants if everything it takes is there; request what is not.

        Args:
            loads: tokens still to come, by adapter.

        Raises:
            DirtyWeightsError: the weights could not be restored after an error.
            DeviceError
        """
        merged = self.version
        if merged is not None and not merged.is_current:
            self.restore()  # it, or a part of a mix, is being unloaded or is replaced
            merged = None
        policy, name = self._mode.policy, self._mode.name
        wanted: AdapterVersion | None = None
        if policy is not None:
            chosen = policy.choose(loads(), merged)
            assert chosen is None or isinstance(chosen, AdapterVersion)
            wanted = chosen
        elif name is not None:
            wanted = merged if merged is not None and merged.is_mix else self._store.find(name)
        if wanted is merged or wanted in self._refused:
            return
        if wanted is None:
            self.restore()
        elif (lease := self._store.lease_of(wanted)) is not None:
            is_ready = self._tiers.request(wanted) is Readiness.READY
            if not is_ready or not self._tiers.hold(wanted):
                lease.release()
                return
            values = self._tiers.host.request(wanted)
            if values is None:
                self._release(lease)
                return
            try:
                self._swap_in(lease, values)
            except EngineError:
                raise
            except Exception as error:
                raise_device_fault(error)
                logger.exception("adapter %s cannot be merged; it is served unmerged", wanted.name)
                self._refused.add(wanted)

    def merge(self, name: str) -> None:
        """Write an adapter, or a mix, into the weights now, and keep it there; swap out a merged
        one.

        Raises:
            AdapterNotFoundError
            AdapterUnavailable: the device has no room for it beside what is in use.
            AdapterFormatError: a merged weight overflows; nothing has changed.
            DirtyWeightsError: the weights could not be restored after an error.
        """
        lease = self._store.acquire(name)
        try:
            while True:
                if self._tiers.fetch(lease.version) is not Readiness.READY:
                    raise AdapterUnavailable(
                        f"no room on the device to merge {name!r} beside the adapters in use"
                    )
                if self._tiers.hold(lease.version):
                    break
        except BaseException:
            lease.release()
            raise
        try:
            values = self._tiers.host.read(lease.version)
        except BaseException:
            self._release(lease)
            raise
        self._swap_in(lease, values)
        self._mode = _Mode(name=name)

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit, and keep them so."""
        self._mode = _Mode()
        self.restore()

    def restore(self) -> None:
        """Restore the base weights, bit for bit; the mode stays."""
        started, before = time.perf_counter(), self.version
        self._merger.unmerge()
        self._observe_switch(started, None)
        self._release_merged()
        if before is not None:
            logger.info("adapter %r taken out of the weights", before.name)
        self._metrics.num_unmerges += 1

    def _swap_in(self, lease: Lease, values: AdapterValues) -> None:
        """Swap an adapter in. From here on merging has its lease and its hold: otherwise a
        loader could take the room of a version while it is written, and it would be in the
        weights unknown to us."""
        if lease.version is self.version:
            self._release(lease)
            return
        started = time.perf_counter()
        plane = self._bank.plane(values.table)
        try:
            self._merger.merge(values, None if plane is None else plane.originals)
        except BaseException:
            self._release(lease)
            if not self._merger.is_merged:  # the weights are the base's again
                self._release_merged()
            raise
        self._observe_switch(started, lease.version)
        self._release_merged()
        self._merged = lease
        logger.info("adapter %r merged, digest %s", lease.version.name, lease.version.digest[:12])
        self._metrics.num_merges += 1

    def _release_merged(self) -> None:
        """Release the previously merged version."""
        before, self._merged = self._merged, None
        if before is not None:
            self._release(before)

    def _release(self, lease: Lease) -> None:
        """Release a version that was held to be merged, and its lease."""
        self._tiers.release(lease.version)
        lease.release()

    def _observe_switch(self, started: float, version: AdapterVersion | None) -> None:
        policy = self._mode.policy
        if policy is None:
            return
        if self._device_type == "cuda":
            torch.cuda.synchronize()
        written = [self._nnz(v) for v in (self.version, version) if v is not None]
        policy.observe_switch(sum(written), time.perf_counter() - started)

    def _new_mode(self, mode: str) -> _Mode:
        if mode == "auto":
            policy = MergePolicy(self._device_type, self._max_num_seqs, self._nnz)
            return _Mode(policy=policy)
        return _Mode(name=None if mode == "never" else mode)
