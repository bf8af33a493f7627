"""A directory of adapter folders, known by their headers, so that scanning thousands takes
seconds.

A folder is an adapter once both its files are whole; what is still being written, or breaks the
format, is told and passed over. Nothing is watched: `scan` looks again when asked to.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.adapters.reader import AdapterHeader, AdapterReader, adapter_stamp
from neuroada_serve.config import ADAPTER_NAME
from neuroada_serve.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Scan:
    """The contents of an adapter directory at one time, by folder name.

    headers: of adapters that are new or have changed.
    unchanged: names of those that have the files they had before.
    faults: why the other folders with an adapter_config.json are no adapters, or not yet.
    """

    headers: Mapping[str, AdapterHeader] = field(default_factory=dict)
    unchanged: frozenset[str] = frozenset()
    faults: Mapping[str, str] = field(default_factory=dict)


class AdapterDirectory:
    """Scan one directory for adapter folders.

    Raises:
        UsageError: it is no directory.
    """

    def __init__(self, root: Path, files: AdapterReader) -> None:
        if not root.is_dir():
            raise UsageError(f"--adapter-dir {root} is not a directory")
        self.root = root
        self._files = files

    def scan(
        self,
        known: Mapping[str, tuple[int, ...]],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scan:
        """Look at every folder.

        Args:
            known: name -> stamp of the adapters that were found before.
            on_progress: told how many of how many folders have been looked at.
        """
        with os.scandir(self.root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        headers: dict[str, AdapterHeader] = {}
        unchanged: set[str] = set()
        faults: dict[str, str] = {}
        for done, name in enumerate(names):
            on_progress(done, len(names))
            folder = self.root / name
            try:
                if name in known and adapter_stamp(folder) == known[name]:
                    unchanged.add(name)
                    continue
                if not (folder / CONFIG_FILE).exists():
                    continue  # not meant to be one
                if not ADAPTER_NAME.fullmatch(name):
                    faults[name] = f"{name[:80]!r} is not allowed as an adapter's name"
                    continue
                headers[name] = self._files.header(folder, self.root)
            except AdapterError as error:
                faults[name] = str(error)
            except OSError as error:
                faults[name] = f"its files cannot be read: {error.strerror}"
        on_progress(len(names), len(names))
        return Scan(headers, frozenset(unchanged), faults)
