"""Read and write single entries of a weight's storage.

index_copy_ on the flat storage costs what the entries cost; scatter_ on a bf16 weight on CPU costs
what the whole matrix does, however few entries it writes.
"""

from torch import Tensor

from neuroada_serve.ops import cpu_bypass


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
