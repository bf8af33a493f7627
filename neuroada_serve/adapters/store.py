"""The store of adapters: a name points to an immutable version, and versions outlive their name.

A request holds a lease on the version it was admitted with. Replacing or removing a name leaves
leased versions alone; a version goes when it has lost its name and its last lease.

    LOADING --its files are right--> READY --replaced or removed--> DRAINING --no lease left--> GONE
    DRAINING --removal gave up waiting--> READY

Safe in any thread. Changes of one name wait for each other, those of different names never do;
finding and leasing a version waits for nobody.
"""

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

from neuroada_serve.adapters.format import Adapter
from neuroada_serve.adapters.reader import AdapterHeader
from neuroada_serve.config import ADAPTER_NAME
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterInUseError,
    AdapterNotFoundError,
)
from neuroada_serve.tasks import GENERATE, Task

MAX_MIXED = 8  # adapters in one mix
MAX_WEIGHT = 100.0  # of an adapter in a mix, either sign
_MOST_IDLE_MIXES = 256
_ABORT_TIMEOUT_S = 10.0  # aborted requests are gone after the engine's step


class VersionState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True)
class Mix:
    """A weighted sum of versions."""

    parts: tuple[tuple["AdapterVersion", float], ...]


class AdapterVersion:
    """One version of an adapter: its content, which never changes, under one name.

    digest: of its weights file; of a mix, over those of its parts and their weights.
    source: where its values come from: files, memory, or other versions.
    nnz: values; of a mix, at most.
    """

    def __init__(
        self, name: str, digest: str, nnz: int, source: AdapterHeader | Adapter | Mix
    ) -> None:
        self.name: Final = name
        self.digest: Final = digest
        self.nnz: Final = nnz
        self.source: Final = source
        self.since: Final = int(time.time())
        # Guarded by the store.
        self.state = VersionState.LOADING
        self.num_leases = 0
        self.is_pinned = False

    @property
    def task(self) -> Task:
        """The task that it is made for; a mix generates."""
        source = self.source
        return source.config.task if isinstance(source, AdapterHeader | Adapter) else GENERATE

    @property
    def is_mix(self) -> bool:
        return isinstance(self.source, Mix)

    @property
    def parts(self) -> tuple["AdapterVersion", ...]:
        """The versions that a mix is made of; of another version, none."""
        return tuple(p for p, _ in self.source.parts) if isinstance(self.source, Mix) else ()

    @property
    def is_current(self) -> bool:
        """True while requests can ask for it: it, and all its parts, are READY."""
        return all(v.state is VersionState.READY for v in (self, *self.parts))

    def __repr__(self) -> str:
        return f"AdapterVersion({self.name!r}, {self.digest[:12]}, {self.state.value})"


class Lease:
    """The right to use one version until `release`, which counts once, however often called."""

    def __init__(self, store: "AdapterStore", version: AdapterVersion) -> None:
        self._store: AdapterStore | None = store
        self.version = version

    def share(self) -> "Lease":
        """Take one more lease on the same version, whatever its name points to now."""
        assert self._store is not None, "the lease has been released"
        with self._store._changed:
            return self._store._lease_locked(self.version)

    def release(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store._release(self.version)


class _Mixes:
    """Versions of mixes, the least recently asked for first. Guarded by the store."""

    def __init__(self) -> None:
        self._versions: OrderedDict[Mix, AdapterVersion] = OrderedDict()

    def version(self, name: str, mix: Mix) -> AdapterVersion:
        """Return the version of a mix, and make it where there is none."""
        version = self._versions.get(mix)
        if version is None:
            said = "+".join(f"{part.digest}:{weight!r}" for part, weight in mix.parts)
            digest = hashlib.sha256(f"mix {said}".encode()).hexdigest()
            nnz = sum(part.nnz for part, _ in mix.parts)
            version = self._versions[mix] = AdapterVersion(name, digest, nnz, mix)
            version.state = VersionState.READY
        self._versions.move_to_end(mix)
        return version

    def remove_unused(self, named: Mapping[str, AdapterVersion]) -> list[AdapterVersion]:
        """Remove and return mixes that nobody uses and nobody can ask for again, or that are too
        many to keep.

        Args:
            named: all versions that have a name.
        """
        spare = len(self._versions) - _MOST_IDLE_MIXES
        removed: list[AdapterVersion] = []
        for mix, version in list(self._versions.items()) if self._versions else ():
            if version.num_leases:
                continue
            is_stale = any(named.get(part.name) is not part for part, _ in mix.parts)
            if is_stale or len(removed) < spare:
                del self._versions[mix]
                version.state = VersionState.GONE
                removed.append(version)
        return removed


class _NameLocks:
    """A lock for every name that is being changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, list[None]]] = {}

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Make one change of a name at a time."""
        with self._lock:
            lock, users = self._locks.setdefault(name, (threading.Lock(), []))
            users.append(None)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._locks[name]


class AdapterStore:
    """All names and versions of one engine.

    Args:
        base_name: of the base model; no adapter may have it.
        on_gone: called once per version that has gone, without locks held.
        on_change: called when a name has got another version, or is about to lose its own.
    """

    def __init__(
        self,
        base_name: str,
        on_gone: Callable[[AdapterVersion], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._base_names = {base_name}
        self._on_gone = on_gone
        self._on_change = on_change
        self._changed = threading.Condition()  # guards everything below; held for moments only
        self._versions: dict[str, AdapterVersion] = {}  # READY, and DRAINING ones that may return
        self._loading: dict[str, AdapterVersion] = {}
        self._mixes = _Mixes()
        self._in_change = _NameLocks()

    # --- what there is -----------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests can use now."""
        with self._changed:
            return tuple(n for n, v in self._versions.items() if v.state is VersionState.READY)

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """Return all versions with a name: those in use, and those that are loading."""
        with self._changed:
            return (*self._versions.values(), *self._loading.values())

    def __contains__(self, name: str) -> bool:
        with self._changed:
            return self._find(name) is not None

    def get(self, name: str) -> AdapterVersion:
        """Return the version that the name points to now.

        Raises:
            AdapterNotFoundError
        """
        with self._changed:
            return self._get(name)

    def acquire(self, name: str) -> Lease:
        """Take a lease on the version that a name points to now, or on a mix such as
        "sql:0.7+json:0.3".

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterError: the mix is not written as one.
        """
        with self._changed:
            return self._lease_locked(self._get_or_mix(name))

    def find(self, name: str) -> AdapterVersion | None:
        """Return the version that the name points to now, if any."""
        with self._changed:
            return self._find(name)

    def lease_of(self, version: AdapterVersion) -> Lease | None:
        """Take a lease on this very version; None if it may no longer be used."""
        with self._changed:
            return self._lease_locked(version) if version.state is VersionState.READY else None

    # --- change ------------------------------------------------------------------------------

    def reserve(self, names: Sequence[str]) -> None:
        """Reserve names for the base, beside its own.

        Raises:
            AdapterConflictError: an adapter has one of them.
        """
        with self._changed:
            for name in names:
                if name in self._versions or name in self._loading:
                    raise AdapterConflictError(
                        f"{name!r} is to be the base's name, and is an adapter's; rename one"
                    )
            self._base_names |= set(names)

    def add(
        self,
        version: AdapterVersion,
        prepare: Callable[[AdapterVersion], object] = lambda version: None,
        replace: bool = False,
    ) -> AdapterVersion:
        """Point the version's name to it, once `prepare` has run.

        Args:
            version: LOADING.
            prepare: reads and checks what must be right before a request may get the version. When
                it raises, nothing has changed.
            replace: take the name from another adapter; its running requests keep it.

        Returns:
            The version that has the name now: another one where that has the same digest.

        Raises:
            AdapterConflictError: the name is taken, and replace is False, or it is the base's.
            AdapterError: the name is not allowed.
        """
        name = version.name
        if not ADAPTER_NAME.fullmatch(name):
            raise AdapterError(
                f"adapter name {name[:80]!r} is not allowed; use letters, digits, '.', '_' and "
                "'-', a letter or digit first, at most 63"
            )
        if name in self._base_names:
            raise AdapterConflictError(f"{name!r} is the base model's name")
        with self._in_change.hold(name):
            with self._changed:
                old = self._versions.get(name)
                if old is not None and old.digest == version.digest:
                    return old
                if old is not None and not replace:
                    raise AdapterConflictError(f"an adapter named {name!r} is already loaded")
                self._loading[name] = version
            try:
                prepare(version)
            except BaseException:
                with self._changed:
                    del self._loading[name]
                    version.state = VersionState.GONE
                self._on_gone(version)  # what was prepared
                raise
            with self._changed:
                del self._loading[name]
                version.state = VersionState.READY
                version.is_pinned = old is not None and old.is_pinned
                self._versions[name] = version
                gone = [] if old is None else self._drain(old)
        self._tell_gone(gone)
        self._on_change()
        return version

    def remove(
        self,
        name: str,
        timeout_s: float = 0.0,
        abort: Callable[[AdapterVersion], None] | None = None,
        wait: bool = True,
    ) -> AdapterVersion:
        """Take a name away. New requests no longer get it; running ones finish with it.

        Args:
            timeout_s: how long to wait for running requests, after which the name stays.
            abort: called when they have not finished in time, to end them, which takes a step.
            wait: False leaves the version to its last request, at once.

        Raises:
            AdapterNotFoundError
            AdapterInUseError: requests still ran with it at the end; it is served as before.
        """
        with self._in_change.hold(name):
            with self._changed:
                version = self._get(name)
                version.state = VersionState.DRAINING
            self._on_change()
            if wait and not self._wait_unleased(version, timeout_s):
                if abort is not None:
                    abort(version)
                if abort is None or not self._wait_unleased(
                    version, max(timeout_s, _ABORT_TIMEOUT_S)
                ):
                    with self._changed:
                        version.state = VersionState.READY
                        num_leases = version.num_leases
                    raise AdapterInUseError(name, num_leases)
            with self._changed:
                del self._versions[name]
                gone = self._drain(version)
        self._tell_gone(gone)
        return version

    def pin(self, name: str, pinned: bool = True) -> AdapterVersion:
        """Set whether the adapter of this name, and what replaces it, stays on the device.

        Raises:
            AdapterNotFoundError
        """
        with self._changed:
            version = self._get(name)
            version.is_pinned = pinned
            return version

    # --- inside ------------------------------------------------------------------------------

    def _find(self, name: str) -> AdapterVersion | None:
        version = self._versions.get(name)
        return version if version is not None and version.state is VersionState.READY else None

    def _get(self, name: str) -> AdapterVersion:
        if (version := self._find(name)) is None:
            known = sorted(n for n, v in self._versions.items() if v.state is VersionState.READY)
            raise AdapterNotFoundError(f"no adapter named {name[:80]!r}; {_listed(known)}")
        return version

    def _get_or_mix(self, name: str) -> AdapterVersion:
        weights = parse_mix(name)
        if weights is None:
            return self._get(name)
        mix = Mix(tuple((self._get(part), weight) for part, weight in weights.items()))
        for part, _ in mix.parts:
            if part.task.head_rows:
                raise AdapterError(f"{part.name!r} is a {part.task.noun}, which cannot be mixed")
        return self._mixes.version(name, mix)

    def _lease_locked(self, version: AdapterVersion) -> Lease:
        for part in (version, *version.parts):  # a lease is on all of them
            assert part.state is not VersionState.GONE
            part.num_leases += 1
        return Lease(self, version)

    def _release(self, version: AdapterVersion) -> None:
        with self._changed:
            gone = []
            for part in (version, *version.parts):
                assert part.num_leases > 0
                part.num_leases -= 1
                if part.num_leases:
                    continue
                self._changed.notify_all()
                named = self._versions.get(part.name) is part
                if part.state is VersionState.DRAINING and not named:
                    gone.append(part)
                    part.state = VersionState.GONE
            gone += self._mixes.remove_unused(self._versions)
        self._tell_gone(gone)

    def _drain(self, version: AdapterVersion) -> list[AdapterVersion]:
        """Let a version without a name go with its last lease; return those that are gone."""
        version.state = VersionState.DRAINING if version.num_leases else VersionState.GONE
        gone = [] if version.num_leases else [version]
        return gone + self._mixes.remove_unused(self._versions)

    def _wait_unleased(self, version: AdapterVersion, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not version.num_leases, timeout_s)

    def _tell_gone(self, gone: list[AdapterVersion]) -> None:
        for version in gone:
            self._on_gone(version)


def parse_mix(name: str) -> Mapping[str, float] | None:
    """Return the weights of "sql:0.7+json:0.3", by adapter; 1 if none is given. None: a plain
    name.

    Raises:
        AdapterError: it is neither a name nor a mix.
    """
    if "+" not in name and ":" not in name:
        return None
    weights: dict[str, float] = {}
    for term in name.split("+"):
        adapter, colon, number = term.partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not ADAPTER_NAME.fullmatch(adapter) or not 0 < abs(weight) <= MAX_WEIGHT:
            raise AdapterError(
                f"{name[:80]!r} is no mix of adapters; write NAME:WEIGHT+NAME:WEIGHT, such as "
                f"sql:0.7+json:0.3, weights within -{MAX_WEIGHT:g} and {MAX_WEIGHT:g} and not 0"
            )
        if adapter in weights:
            raise AdapterError(f"{name[:80]!r} names {adapter!r} twice; add its weights up")
        weights[adapter] = weight
    if len(weights) > MAX_MIXED:
        raise AdapterError(f"{len(weights)} adapters in one mix, at most {MAX_MIXED} are allowed")
    return weights


def mix_name(weights: Mapping[str, float]) -> str:
    """Return the name of a mix as requests write it; the inverse of `parse_mix`."""
    return "+".join(f"{name}:{weight:g}" for name, weight in weights.items())


def _listed(names: list[str]) -> str:
    if not names:
        return "adapters here: none is loaded"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"adapters here: {', '.join(names[:20])}{more}"
