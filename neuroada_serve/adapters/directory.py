"""A directory of adapter folders, known by their headers, so that scanning thousands takes
seconds.

A folder is an adapter once both its files are whole; what is still being written, or breaks the
format, is reported and passed over. Nothing is watched: `rescan` looks again when asked to.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader, adapter_stamp
from neuroada_serve.adapters.store import AdapterStore, AdapterVersion, VersionState
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.config import ADAPTER_NAME
from neuroada_serve.errors import AdapterError, NeuroAdaError, UsageError

OnProgress = Callable[[int, int], None]  # is told how many of how many are done


@dataclass(frozen=True)
class _Scan:
    """The contents of an adapter directory at one time, by folder name.

    headers: of adapters that are new or have changed.
    unchanged: names of those that have the files they had before.
    faults: why the other folders with an adapter_config.json are no adapters, or not yet.
    """

    headers: Mapping[str, AdapterHeader] = field(default_factory=dict)
    unchanged: frozenset[str] = frozenset()
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rescan:
    """Changes that were found in the adapter directory, by name."""

    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class AdapterDirectory:
    """Serves every adapter folder in a directory under its folder's name, once `rescan` has been
    called. Safe in any thread.

    Raises:
        UsageError: it is no directory.
    """

    def __init__(
        self, root: Path, files: AdapterReader, store: AdapterStore, tiers: AdapterTiers
    ) -> None:
        if not root.is_dir():
            raise UsageError(f"--adapter-dir {root} is not a directory")
        self._root = root
        self._files = files
        self._store = store
        self._tiers = tiers
        self._scanning = threading.Lock()  # guards what follows
        self._found: dict[str, tuple[AdapterVersion, tuple[int, ...]]] = {}  # with their stamps

    def rescan(self, on_progress: OnProgress = lambda done, total: None) -> Rescan:
        """Look at the directory again. New folders are served, by their header alone; changed ones
        once their values are read and right; adapters whose folder has gone are unloaded when their
        requests have finished. Adapters that were loaded in another way stay as they are."""
        with self._scanning:
            known = {
                name: stamp
                for name, (version, stamp) in self._found.items()
                if version.state is VersionState.READY
            }
            scan = self._scan(known, on_progress)
            failed, added, replaced = dict(scan.faults), list[str](), list[str]()
            unchanged = len(scan.unchanged)
            for name, header in scan.headers.items():
                is_new = name not in known
                try:
                    self._tiers.check_size(header.nnz, name)
                    version = AdapterVersion(name, header.digest, header.nnz, header)
                    if is_new:
                        served = self._store.add(version)
                    else:
                        served = self._store.add(version, self._tiers.host.read, replace=True)
                    if served is version:
                        (added if is_new else replaced).append(name)
                    else:
                        unchanged += 1  # touched, or loaded by name: the same bytes
                    self._found[name] = served, header.stamp
                except NeuroAdaError as error:
                    failed[name] = str(error)
                except OSError as error:
                    failed[name] = f"its files cannot be read: {error.strerror}"
            there = scan.unchanged | scan.headers.keys() | scan.faults.keys()
            gone = [name for name in known if name not in there]
            for name in gone:
                version, _ = self._found.pop(name)
                if self._store.find(name) is version:
                    self._store.remove(name, wait=False)
            return Rescan(tuple(added), tuple(replaced), tuple(gone), unchanged, failed)

    def _scan(self, known: Mapping[str, tuple[int, ...]], on_progress: OnProgress) -> _Scan:
        """Look at every folder.

        Args:
            known: name -> stamp of the adapters that were found before.
        """
        with os.scandir(self._root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        headers: dict[str, AdapterHeader] = {}
        unchanged: set[str] = set()
        faults: dict[str, str] = {}
        for done, name in enumerate(names):
            on_progress(done, len(names))
            folder = self._root / name
            try:
                if name in known and adapter_stamp(folder) == known[name]:
                    unchanged.add(name)
                    continue
                if not (folder / CONFIG_FILE).exists():
                    continue  # not meant to be one
                if not ADAPTER_NAME.fullmatch(name):
                    faults[name] = f"{name[:80]!r} is not allowed as an adapter's name"
                    continue
                headers[name] = self._files.header(folder, self._root)
            except AdapterError as error:
                faults[name] = str(error)
            except OSError as error:
                faults[name] = f"its files cannot be read: {error.strerror}"
        on_progress(len(names), len(names))
        return _Scan(headers, frozenset(unchanged), faults)
