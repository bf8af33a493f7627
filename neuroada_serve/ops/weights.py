"""Read and write single entries of a weight's storage.

index_copy_ on the flat storage costs what the entries cost; scatter_ on a bf16 weight on CPU costs
what the whole matrix does, however few entries it writes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_bypass, triton_bypass


def read_entries(storage: Tensor, positions: Tensor) -> Tensor:
    """storage[positions], a copy; storage [entries], positions [nnz] int64."""
    return storage.index_select(0, positions)


def write_entries_(storage: Tensor, positions: Tensor, values: Tensor) -> None:
    """storage[positions] = values, in place; positions distinct, values in its dtype."""
    if cpu_bypass.supports(storage, values):
        cpu_bypass.put_entries(storage, positions, values.contiguous())
    else:
        storage.index_copy_(0, positions, values)


def add_entries_(storage: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """storage[positions] += values, summed in float32 and rounded once; what was there before."""
    if cpu_bypass.supports(storage, values):
        return cpu_bypass.add_entries(storage, positions, values.contiguous())
    saved = read_entries(storage, positions)
    storage.index_copy_(0, positions, (saved.float() + values.float()).to(storage.dtype))
    return saved


class WeightEntries:
    """Chosen entries of many weights as one vector, written in one launch where there is a kernel.

    Args:
        parts: (storage [entries], positions [n] int64, distinct), in the order of the vector; all
            of one dtype and device. Storages stay where they are.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._parts = parts
        self._sizes = [len(positions) for _, positions in parts]
        # Places in memory, counted in elements from the lowest storage on.
        self._origin = min((storage for storage, _ in parts), key=Tensor.data_ptr)
        size, start = self._origin.element_size(), self._origin.data_ptr()
        assert all((storage.data_ptr() - start) % size == 0 for storage, _ in parts)
        self._places = torch.cat(
            [places + (storage.data_ptr() - start) // size for storage, places in parts]
        )

    def read(self) -> Tensor:
        """[nnz], a copy."""
        return torch.cat([read_entries(*part) for part in self._parts])

    def write_(self, values: Tensor) -> None:
        """Write values [nnz], in the weights' dtype."""
        if self._origin.is_cuda and triton_bypass.HAS_TRITON:
            triton_bypass.put_entries_(self._origin, self._places, values)
        elif cpu_bypass.supports(self._origin, values):
            cpu_bypass.put_entries(self._origin, self._places, values.contiguous())
        else:
            parts = torch.split(values, self._sizes)
            for (storage, positions), part in zip(self._parts, parts, strict=True):
                storage.index_copy_(0, positions, part)
