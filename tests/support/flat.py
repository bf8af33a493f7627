"""Adapters as flat vectors in a bank, without an engine around it."""

from collections.abc import Mapping

import torch

from neuroada_serve.adapters.bank import AdapterBank, ResidentAdapter
from neuroada_serve.adapters.format import Adapter, BaseSpec
from neuroada_serve.adapters.slot_memory import SlotMemory
from neuroada_serve.adapters.values import FlatOrder, ValuesReader

CPU = torch.device("cpu")


class FlatBank(AdapterBank):
    """A bank that takes whole adapters.

    shapes: module -> (d_out, d_in).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        sites: Mapping[str, Mapping[str, int]] | None = None,
        size_bytes: int = 1 << 20,
    ) -> None:
        super().__init__(SlotMemory(CPU, dtype, size_bytes))
        order = FlatOrder(sites or {}, {name: d_out for name, (d_out, _) in shapes.items()})
        self.reader = ValuesReader(order, BaseSpec("base", "0" * 64, shapes), dtype)

    def upload(self, adapter: Adapter) -> ResidentAdapter:
        """As if the base's weights were zeros, so what is served is what the adapter has."""
        values = self.reader.of(adapter)
        plane = self.plane(values.table) or self.add_plane(values.table)
        assert plane is not None
        extent = self.memory.take(self.memory.values_bytes(plane.nnz))
        assert extent is not None
        resident = self.settle(extent, plane)
        self.write(resident, torch.zeros(plane.nnz, dtype=self.memory.dtype), values.values)
        return resident
