"""Which adapters exist: a name points to an immutable version, and versions outlive their name.

A request holds a lease on the version it was admitted with. Replacing or removing a name leaves
leased versions alone; a version goes when it has lost its name and its last lease.

    READY --replaced or removed, leases left--> DRAINING --last lease released--> GONE
    READY --replaced or removed, no leases--> GONE
"""

from collections.abc import Callable
from enum import Enum

from neuroada_serve.adapters.bank import ResidentAdapter
from neuroada_serve.adapters.format import Adapter
from neuroada_serve.errors import AdapterConflictError, AdapterNotFoundError


class VersionState(Enum):
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class AdapterVersion:
    """One adapter under one name. `adapter` and `resident` never change."""

    def __init__(self, name: str, adapter: Adapter, resident: ResidentAdapter) -> None:
        self.name = name
        self.adapter = adapter
        self.resident = resident
        self.state = VersionState.READY
        self.num_leases = 0

    def __repr__(self) -> str:
        return f"AdapterVersion({self.name!r}, {self.adapter.digest[:12]}, {self.state.value})"


class Lease:
    """The right to use one version until `release`, which counts once, however often called."""

    def __init__(self, store: "AdapterStore", version: AdapterVersion) -> None:
        self._store: AdapterStore | None = store
        self.version = version

    def release(self) -> None:
        if self._store is not None:
            store, self._store = self._store, None
            store._release(self.version)


class AdapterStore:
    """All names and versions of one engine. Used by the engine's thread only."""

    def __init__(self, on_gone: Callable[[AdapterVersion], None]) -> None:
        self._versions: dict[str, AdapterVersion] = {}
        self._on_gone = on_gone

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._versions)

    def get(self, name: str) -> AdapterVersion:
        """The version that the name points to now.

        Raises:
            AdapterNotFoundError
        """
        if (version := self._versions.get(name)) is None:
            known = ", ".join(sorted(self._versions)) or "none is loaded"
            raise AdapterNotFoundError(f"no adapter named {name!r}; adapters here: {known}")
        return version

    def publish(self, version: AdapterVersion, replace: bool = False) -> None:
        """Point the version's name to it.

        Raises:
            AdapterConflictError: the name is taken, and replace is False.
        """
        old = self._versions.get(version.name)
        if old is not None and not replace:
            raise AdapterConflictError(f"an adapter named {version.name!r} is already loaded")
        self._versions[version.name] = version
        if old is not None:
            self._retire(old)

    def remove(self, name: str) -> None:
        """Take the name away; requests that run with the version finish with it.

        Raises:
            AdapterNotFoundError
        """
        version = self.get(name)
        del self._versions[name]
        self._retire(version)

    def acquire(self, name: str) -> Lease:
        """A lease on the version that the name points to now.

        Raises:
            AdapterNotFoundError
        """
        version = self.get(name)
        version.num_leases += 1
        return Lease(self, version)

    def _release(self, version: AdapterVersion) -> None:
        assert version.num_leases > 0
        version.num_leases -= 1
        if version.state is VersionState.DRAINING and version.num_leases == 0:
            self._end(version)

    def _retire(self, version: AdapterVersion) -> None:
        if version.num_leases:
            version.state = VersionState.DRAINING
        else:
            self._end(version)

    def _end(self, version: AdapterVersion) -> None:
        version.state = VersionState.GONE
        self._on_gone(version)
