"""The device memory of the adapters, taken in slots."""

import torch
from torch import Tensor

from neuroada_serve.adapters.extents import Extents

SLOT_BYTES = 128  # a GPU reads lines of this size


class Extent:
    """A stretch of the memory: `size` slots from `start` on. Compaction moves it."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


class SlotMemory:
    """One memory for values and index tables, never allocated anew.

    Args:
        device: where the memory is.
        dtype: of values: the weights' own.
        size_bytes: on the CPU, pages that were never written cost nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size_bytes: int) -> None:
        num_slots = max(1, size_bytes // SLOT_BYTES)
        self._memory = torch.empty(num_slots * SLOT_BYTES, dtype=torch.uint8, device=device)
        self._values = self._memory.view(dtype)
        self._columns = self._memory.view(torch.int32)
        self._slot_values = SLOT_BYTES // self._values.element_size()
        self._extents = Extents(num_slots)
        self._held: dict[int, Extent] = {}  # by start
        self.device, self.dtype = device, dtype
        self.version = 0  # counts compactions: views of earlier versions show other things

    @property
    def size_bytes(self) -> int:
        return self._extents.size * SLOT_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of all taken slots."""
        return self._extents.num_taken * SLOT_BYTES

    @property
    def free_bytes(self) -> int:
        """Bytes of all free slots, not necessarily in one piece."""
        return self._extents.num_free * SLOT_BYTES

    def values_bytes(self, nnz: int) -> int:
        """Bytes of the slots that nnz values take."""
        return -(-nnz // self._slot_values) * SLOT_BYTES

    def columns_bytes(self, num_entries: int) -> int:
        """Bytes of the slots that an index of so many columns takes."""
        return -(-4 * num_entries // SLOT_BYTES) * SLOT_BYTES

    def take(self, num_bytes: int) -> Extent | None:
        """Take slots; None where there are not so many in one piece."""
        size = -(-num_bytes // SLOT_BYTES)
        start = self._extents.take(size)
        if start is None:
            return None
        extent = self._held[start] = Extent(start, size)
        return extent

    def shrink(self, extent: Extent, num_bytes: int) -> None:
        """Release the end of an extent beyond so many bytes."""
        extent.size = -(-num_bytes // SLOT_BYTES)
        self._extents.shrink(extent.start, extent.size)

    def release(self, extent: Extent) -> None:
        """Release all slots of an extent."""
        del self._held[extent.start]
        self._extents.free(extent.start)

    def compact(self) -> None:
        """Close all holes. Moves what is in extents: nobody may read or write meanwhile."""
        moves = self._extents.close_holes()
        for start, new in moves.items():
            extent = self._held.pop(start)
            if start != new:
                size = extent.size * SLOT_BYTES
                source = self._memory[start * SLOT_BYTES :][:size]
                if new + extent.size > start:  # they overlap
                    source = source.clone()
                self._memory[new * SLOT_BYTES :][:size].copy_(source)
                extent.start = new
            self._held[new] = extent
        self.version += 1

    def columns(self, extent: Extent, num_entries: int) -> Tensor:
        """View an extent as [num_entries] int32."""
        return self._columns[extent.start * SLOT_BYTES // 4 :][:num_entries]

    def values(self, extent: Extent, nnz: int) -> Tensor:
        """View an extent as [nnz] values."""
        return self._values[extent.start * self._slot_values :][:nnz]

    def values_of_all(self, nnz: int, offset: int, rows: int, each: int) -> Tensor:
        """View [num_slots, rows, each]: those values from `offset` on of an adapter of nnz values
        that begins in any slot."""
        num_slots = (len(self._values) - nnz) // self._slot_values + 1
        shape, strides = (num_slots, rows, each), (self._slot_values, each, 1)
        return self._values.as_strided(shape, strides, offset)
