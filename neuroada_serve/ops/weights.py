"""Read and write single entries of a weight's storage.

index_copy_ on the flat storage costs what the entries cost; scatter_ on a bf16 weight on CPU costs
what the whole matrix does, however few entries it writes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuroada_serve.ops import cpu_team, triton_bypass
from neuroada_serve.ops.cpu_blocks import KINDS, EntriesBlock


def read_entries(storage: Tensor, positions: Tensor) -> Tensor:
    """storage[positions], a copy; storage [entries], positions [nnz] int64."""
    return storage.index_select(0, positions)


def write_entries_(storage: Tensor, positions: Tensor, values: Tensor) -> None:
    """storage[positions] = values, in place; positions distinct, values in its dtype."""
    if cpu_team.supports(storage, values):
        _run_kernel("put_entries", storage, positions, values.contiguous(), values)
    else:
        storage.index_copy_(0, positions, values)


def add_entries_(storage: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """storage[positions] += values, in float32 and rounded once; return what was there before."""
    if cpu_team.supports(storage, values):
        saved = torch.empty_like(values)
        _run_kernel("add_entries", storage, positions, values.contiguous(), saved)
        return saved
    saved = read_entries(storage, positions)
    storage.index_copy_(0, positions, (saved.float() + values.float()).to(storage.dtype))
    return saved


def _run_kernel(
    name: str, storage: Tensor, positions: Tensor, values: Tensor, saved: Tensor
) -> None:
    addresses = [t.data_ptr() for t in (storage, positions, values, saved)]
    block = EntriesBlock(0, KINDS[storage.dtype], *addresses, len(positions))
    cpu_team.TeamKernel(getattr(cpu_team.kernels(), name))(block, len(positions))


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
        elif cpu_team.supports(self._origin, values):
            _run_kernel("put_entries", self._origin, self._places, values.contiguous(), values)
        else:
            parts = torch.split(values, self._sizes)
            for (storage, positions), part in zip(self._parts, parts, strict=True):
                storage.index_copy_(0, positions, part)
