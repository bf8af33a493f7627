"""Selections: which inputs each neuron keeps.

Magnitude selection (NeuroAda, arXiv:2510.18940): the k columns of largest |W| in each row. It looks
at the base alone, so every adapter of one base shares one index, and the index of a smaller k is
the beginning of that of a larger k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError

_CHUNK_ENTRIES = 1 << 22  # rows are handled a few at a time: 32 MiB of sort keys


@dataclass(frozen=True)
class Selection:
    """The inputs that each neuron of a layer keeps.

    index: [d_out, k] int32 columns, distinct within a row.
    trained: [d_out, k] bool, the entries that are selected; the others only fill their rows up to
        k, and their values stay 0. None where all are.

    Raises:
        ShapeError: the two differ in shape.
    """

    index: Tensor
    trained: Tensor | None = None

    def __post_init__(self) -> None:
        if self.trained is not None and self.trained.shape != self.index.shape:
            raise ShapeError(
                f"trained {tuple(self.trained.shape)} must be [d_out, k], as index "
                f"{tuple(self.index.shape)}"
            )

    @property
    def nnz(self) -> int:
        """Number of selected entries."""
        return self.index.numel() if self.trained is None else int(self.trained.sum())


def magnitude_index(weight: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest |weight| of each row, largest first, ties to the lower
    column.

    The tie rule makes the result the same on every device and torch version; plain topk leaves it
    open, and bf16 rows often tie.

    Args:
        weight: [d_out, d_in], any float dtype.
        k: columns per row, 1 <= k <= d_in.

    Returns:
        index: [d_out, k] int32, distinct within a row.

    Raises:
        ShapeError: k is outside 1..d_in.
    """
    columns = torch.arange(weight.shape[1], device=weight.device)
    return _largest(weight.shape, k, weight, lambda rows: _sort_key(rows, columns))


def smallest_index(weight: Tensor, k: int) -> Tensor:
    """Return the columns of the k smallest |weight| of each row, smallest first, ties to the
    lower column.

    Arguments and result as of `magnitude_index`.
    """
    columns = torch.arange(weight.shape[1], device=weight.device)
    last = columns.flip(0)  # the lower column of equals is to come first, here too
    return _largest(weight.shape, k, weight, lambda rows: -_sort_key(rows, last))


def random_index(d_out: int, d_in: int, k: int, seed: int) -> Tensor:
    """Return k random columns of each row, [d_out, k] int32 on the CPU, the same for every
    device.

    Raises:
        ShapeError: k is outside 1..d_in.
    """
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty(d_out, 0)
    return _largest(
        (d_out, d_in), k, empty, lambda rows: torch.rand(len(rows), d_in, generator=generator)
    )


def _largest(
    shape: Sequence[int], k: int, weight: Tensor, key: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the columns of the k largest keys of each row; key: some rows of the weight ->
    [rows, d_in]."""
    d_out, d_in = shape
    if not 1 <= k <= d_in:
        raise ShapeError(f"k={k} must be within 1..d_in, and a weight here has d_in={d_in}")
    index = torch.empty(d_out, k, dtype=torch.int32, device=weight.device)
    rows = max(1, _CHUNK_ENTRIES // d_in)
    for start in range(0, d_out, rows):
        found = key(weight[start : start + rows].detach()).topk(k, dim=1, sorted=True)
        index[start : start + rows] = found.indices.int()
    return index


def magnitude_order(weight: Tensor, index: Tensor) -> Tensor:
    """Return the permutation that brings the columns of an index into the order of
    `magnitude_index`.

    Args:
        weight: [d_out, d_in].
        index: [d_out, k] int64, distinct within a row.

    Returns:
        order: [d_out, k] int64; index.gather(1, order) is in order.
    """
    key = _sort_key(weight.detach().gather(1, index), index)
    return key.argsort(dim=1, descending=True)


def _sort_key(weight: Tensor, columns: Tensor) -> Tensor:
    """Return int64 keys, larger for the larger |weight|, and among equals for the lower column."""
    # |W| as float32 has a sign bit of 0, so its bits order as its values do; the inverted column
    # below them breaks ties.
    magnitude = weight.abs().float().contiguous()
    return (magnitude.view(torch.int32).long() << 32) | (0xFFFFFFFF - columns)
