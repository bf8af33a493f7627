"""A frozen weight matrix, stored the way its device multiplies fastest, single entries in reach.

oneDNN multiplies a bf16 matrix by few rows faster when the matrix lies in blocks of its own
choosing; given a plain matrix, it brings it into that shape at every call (bench/LOG.md). Merging
must still find single entries, so the place of entry (row, column) in the blocks is learnt once
per shape, by packing matrices that hold their own row and column numbers.
"""

import ctypes
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_CODE = 32_000  # numbers up to here are finite positive values when read as bf16


class FrozenMatrix(Protocol):
    """A weight [d_out, d_in] that changes only entry by entry.

    entries: [at least d_out * d_in], all of it, flat, in the order of its storage.
    """

    entries: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., d_in] times the weight, plus bias [d_out]: [..., d_out]."""
        ...

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        """Where in `entries` the columns index [rows, k] of rows first_row and on are.

        Returns:
            [rows * k] int64, row by row.
        """
        ...

    def dense(self) -> Tensor:
        """[d_out, d_in] row by row; a copy, or the storage itself."""
        ...


class DenseMatrix:
    """A weight as torch keeps it.

    Args:
        weight: [d_out, d_in], or [d_in, d_out] with transposed (GPT-2's Conv1D); contiguous.
    """

    def __init__(self, weight: Tensor, transposed: bool = False) -> None:
        self.entries = weight.detach().view(-1)
        self.transposed = transposed
        self._weight = weight

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight.t() if self.transposed else self._weight, bias)

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        rows = torch.arange(first_row, first_row + len(index), device=index.device).unsqueeze(1)
        stride, columns = self._weight.shape[1], index.long()
        positions = columns * stride + rows if self.transposed else rows * stride + columns
        return positions.flatten()

    def dense(self) -> Tensor:
        return self._weight.t() if self.transposed else self._weight


class PackedMatrix:
    """A bf16 weight on the CPU in oneDNN's blocks.

    Args:
        weight: [d_out, d_in]; copied.

    in_blocks_of_64: whether entry (i, j) lies where `ops/cpu_forward.py` looks for it: blocks of 64
        rows; in a block, for each pair of columns, the 64 pairs.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = _pack(weight.detach())
        self.entries = _storage(self._packed)
        self.d_out, self.d_in = weight.shape
        self.in_blocks_of_64 = _lies_in_blocks_of_64(weight.detach(), self.entries)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return product

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        layout = _layout(self.d_out, self.d_in)
        assert layout is not None
        of_row, of_column = layout
        rows = of_row[first_row : first_row + len(index)].unsqueeze(1)
        return (rows + of_column[index.long()]).flatten()

    def dense(self) -> Tensor:
        return self._packed.to_dense()


def frozen_matrix(weight: Tensor, transposed: bool = False) -> FrozenMatrix:
    """The fastest form of a weight on its device; the weight itself where that is as it is."""
    if not transposed and packs_faster(weight) and _layout(*weight.shape) is not None:
        return PackedMatrix(weight)
    return DenseMatrix(weight, transposed)


def packs_faster(weight: Tensor) -> bool:
    """Whether oneDNN has a faster form for this weight, and torch lets us use it."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _can_pack()


@cache
def _can_pack() -> bool:
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_nbytes", "data_ptr")
    return all(hasattr(torch.ops.mkldnn, name) for name in needed) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return packed


def _storage(packed: Tensor) -> Tensor:
    """The memory of a packed weight as a flat tensor; lives no longer than the weight."""
    size_bytes = torch.ops.mkldnn._nbytes(packed)
    memory = (ctypes.c_char * size_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@cache
def _layout(d_out: int, d_in: int) -> tuple[Tensor, Tensor] | None:
    """(of_row [d_out], of_column [d_in]) int64: entry (i, j) lies at of_row[i] + of_column[j].

    None if this torch packs matrices of the shape in another way.
    """
    if max(d_out, d_in) > _LARGEST_CODE:
        return None
    rows = _codes_after_packing(torch.arange(1, d_out + 1).unsqueeze(1).expand(d_out, d_in))
    columns = _codes_after_packing(torch.arange(1, d_in + 1).expand(d_out, d_in))
    (places,) = rows.nonzero(as_tuple=True)  # padding holds zeros
    if len(places) != d_out * d_in:
        return None
    i, j = rows[places].long() - 1, columns[places].long() - 1
    of_row, of_column = torch.empty(d_out).long(), torch.empty(d_in).long()
    first_column, first_row = j == 0, i == 0
    of_row[i[first_column]] = places[first_column]
    of_column[j[first_row]] = places[first_row]
    of_column -= of_column[0].item()
    return (of_row, of_column) if torch.equal(of_row[i] + of_column[j], places) else None


def _lies_in_blocks_of_64(weight: Tensor, entries: Tensor) -> bool:
    """By all of its places; of a matrix too large for that, by its first and its last rows."""
    d_out, d_in = weight.shape
    if d_in % 2 or len(entries) != -(-d_out // 64) * 64 * d_in:
        return False
    layout = _layout(d_out, d_in)
    if layout is not None:
        rows, columns = torch.arange(d_out), torch.arange(d_in)
        return torch.equal(layout[0], rows // 64 * 64 * d_in + rows % 64 * 2) and torch.equal(
            layout[1], columns // 2 * 128 + columns % 2
        )
    for first in (0, (d_out - 1) // 64 * 64):
        rows = weight[first : first + 64]
        block = entries[first * d_in : (first + 64) * d_in].view(d_in // 2, 64, 2)
        if not torch.equal(block[:, : len(rows)], rows.view(len(rows), -1, 2).transpose(0, 1)):
            return False
    return True


def _codes_after_packing(codes: Tensor) -> Tensor:
    """[entries] int16: codes [d_out, d_in], as the bits of bf16 values, where packing puts them."""
    packed = _pack(codes.to(torch.int16).contiguous().view(torch.bfloat16))
    return _storage(packed).clone().view(torch.int16)
