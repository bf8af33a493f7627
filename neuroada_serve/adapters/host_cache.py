"""Adapters' values in host memory, as many as a number of bytes holds."""

from collections import OrderedDict

from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.adapters.values import AdapterValues, IndexTable


class HostCache:
    """Adapters' values in host memory, at most `size_bytes`. Guarded by its owner."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.used_bytes = 0  # tables included, each once
        self._values: OrderedDict[AdapterVersion, AdapterValues] = OrderedDict()
        self._table_users: dict[IndexTable, int] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, version: AdapterVersion) -> bool:
        return version in self._values

    def get(self, version: AdapterVersion) -> AdapterValues | None:
        values = self._values.get(version)
        if values is not None:
            self._values.move_to_end(version)
        return values

    def put(self, version: AdapterVersion, values: AdapterValues) -> int:
        """Keep values if they fit at all; return how many others were evicted for them."""
        self.remove(version)
        if values.size_bytes > self.size_bytes:
            return 0
        self._values[version] = values
        users = self._table_users.get(values.table, 0)
        self._table_users[values.table] = users + 1
        self.used_bytes += values.size_bytes + (0 if users else values.table.size_bytes)
        evicted = 0
        while self.used_bytes > self.size_bytes:
            self.remove(next(iter(self._values)))
            evicted += 1
        return evicted

    def remove(self, version: AdapterVersion) -> None:
        values = self._values.pop(version, None)
        if values is None:
            return
        self.used_bytes -= values.size_bytes
        self._table_users[values.table] -= 1
        if not self._table_users[values.table]:
            del self._table_users[values.table]
            self.used_bytes -= values.table.size_bytes
