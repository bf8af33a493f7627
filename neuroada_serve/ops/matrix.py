"""A frozen weight matrix, stored the way its device multiplies fastest, single entries in reach.

oneDNN multiplies a bf16 matrix by few rows faster when the matrix lies in blocks of its own
choosing; given a plain matrix, it brings it into that shape at every call (bench/LOG.md). Merging
must still find single entries, so the place of entry (row, column) in the blocks is learnt once
per shape, by packing matrices that hold their own row and column numbers.

Where oneDNN has no bf16, on x86 without AVX-512, torch takes several times as long for it as for
float32. There a weight is packed by ourselves, in the same blocks, and multiplied by our kernel.
"""

import ctypes
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.ops import cpu_product, cpu_team

_LARGEST_CODE = 32_000  # numbers up to here are finite positive values when read as bf16


class FrozenMatrix(Protocol):
    """A weight [d_out, d_in] that changes only entry by entry.

    entries: [at least d_out * d_in], all of it, flat, in the order of its storage.
    """

    entries: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """x [..., d_in] times the weight, plus bias [d_out]: [..., d_out].

        Args:
            out: [num_tokens, d_out], contiguous, for x [num_tokens, d_in]; filled and returned.
        """
        ...

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        """Find the columns index [rows, k] of rows first_row and on in `entries`.

        Returns:
            [rows * k] int64, row by row.
        """
        ...

    def dense(self) -> Tensor:
        """[d_out, d_in] row by row; a copy, or the storage itself."""
        ...


def multiply_in_pieces(matrix: FrozenMatrix, x: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The product in pieces of so many rows, the last one padded: equal rows give equal bits.

    A library's product takes another way, and so sums in another order, for every number of rows.
    In pieces of one shape a row's result depends on nothing beside it.

    Args:
        x: [num_tokens, d_in].
    """
    if not len(x):
        return matrix.multiply(x, bias)
    pieces = []
    for first in range(0, len(x), rows):
        piece = x[first : first + rows]
        missing = rows - len(piece)
        padded = F.pad(piece, (0, 0, 0, missing)) if missing else piece
        pieces.append(matrix.multiply(padded, bias)[: len(piece)])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class DenseMatrix:
    """A weight as torch keeps it.

    Args:
        weight: [d_out, d_in], or [d_in, d_out] with transposed (GPT-2's Conv1D); contiguous.
    """

    def __init__(self, weight: Tensor, transposed: bool = False) -> None:
        self.entries = weight.detach().view(-1)
        self.transposed = transposed
        self._weight = weight

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        weight = self.dense()
        if out is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        rows = torch.arange(first_row, first_row + len(index), device=index.device).unsqueeze(1)
        stride, columns = self._weight.shape[1], index.long()
        positions = columns * stride + rows if self.transposed else rows * stride + columns
        return positions.flatten()

    def dense(self) -> Tensor:
        return self._weight.t() if self.transposed else self._weight


class PackedMatrix(FrozenMatrix):
    """A copy of a bf16 weight [d_out, d_in] on the CPU, in blocks.

    in_blocks_of_64: whether entry (i, j) lies where `ops/cpu_forward.py` looks for it: blocks of 64
        rows; in a block, for each pair of columns, the 64 pairs.
    """

    d_out: int
    d_in: int
    in_blocks_of_64: bool


class OneDnnMatrix(PackedMatrix):
    """In the blocks that oneDNN chooses for the shape.

    Args:
        weight: [d_out, d_in]; copied.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = _pack(weight.detach())
        self.entries = _storage(self._packed)
        self.d_out, self.d_in = weight.shape
        self.in_blocks_of_64 = _lies_in_blocks_of_64(weight.detach(), self.entries)

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return product if out is None else out.copy_(product)

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        layout = _layout(self.d_out, self.d_in)
        assert layout is not None
        of_row, of_column = layout
        rows = of_row[first_row : first_row + len(index)].unsqueeze(1)
        return (rows + of_column[index.long()]).flatten()

    def dense(self) -> Tensor:
        return self._packed.to_dense()


class BlockMatrix(PackedMatrix):
    """In blocks of 64 rows, for `ops/cpu_product.py`; an odd column and missing rows are zeros.

    Args:
        weight: [d_out, d_in]; copied.
    """

    in_blocks_of_64 = True

    def __init__(self, weight: Tensor) -> None:
        self.d_out, self.d_in = weight.shape
        self._blocks, self._pairs = -(-self.d_out // 64), -(-self.d_in // 2)
        missing = (0, 2 * self._pairs - self.d_in, 0, 64 * self._blocks - self.d_out)
        padded = F.pad(weight.detach(), missing).view(self._blocks, 64, self._pairs, 2)
        self.entries = padded.transpose(1, 2).reshape(-1).clone()
        self._product = cpu_product.BlockProduct(self.entries, self.d_out, self.d_in)

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        y = self._product(x.reshape(-1, self.d_in), bias, out)
        return y.view(*x.shape[:-1], self.d_out)

    def positions(self, index: Tensor, first_row: int = 0) -> Tensor:
        rows = torch.arange(first_row, first_row + len(index)).unsqueeze(1)
        columns = index.long()
        of_row = rows // 64 * 128 * self._pairs + rows % 64 * 2
        return (of_row + columns // 2 * 128 + columns % 2).flatten()

    def dense(self) -> Tensor:
        blocks = self.entries.view(self._blocks, self._pairs, 64, 2).transpose(1, 2)
        return blocks.reshape(-1, 2 * self._pairs)[: self.d_out, : self.d_in].contiguous()


def frozen_matrix(weight: Tensor, transposed: bool = False) -> FrozenMatrix:
    """The fastest form of a weight on its device; the weight itself where that is as it is."""
    if not packs_faster(weight):
        return DenseMatrix(weight, transposed)
    if not _onednn_packs():
        return BlockMatrix(weight.t() if transposed else weight)
    if not transposed and _layout(*weight.shape) is not None:
        return OneDnnMatrix(weight)
    return DenseMatrix(weight, transposed)


def packed_matrix(weight: Tensor) -> PackedMatrix:
    """A weight [d_out, d_in] that `packs_faster` has said yes to."""
    return OneDnnMatrix(weight) if _onednn_packs() else BlockMatrix(weight)


def packs_faster(weight: Tensor) -> bool:
    """Tell if there is a faster form for this weight."""
    is_bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bf16 and (_onednn_packs() or cpu_team.forward_kernels() is not None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for many rows and a weight [d_out, d_in] that stays as torch has it.

    bf16 goes through float32, and is rounded once, on a processor where torch multiplies it element
    by element; the weight is copied there. Compiled code is left to the compiler.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _onednn_has_bf16():
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide).to(x.dtype)
    return F.linear(x, weight, bias)


@cache
def _onednn_has_bf16() -> bool:
    """Tell if oneDNN, and so torch, has fast products of bf16 on this processor."""
    says = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # None: a torch without it
    return says is not None and bool(says())


@cache
def _onednn_packs() -> bool:
    """Tell if oneDNN multiplies bf16 on this processor, and torch lets us pack for it."""
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_nbytes", "data_ptr")
    return all(hasattr(torch.ops.mkldnn, name) for name in needed) and _onednn_has_bf16()


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
    """Compare all of its places; of a matrix too large for that, its first and its last rows."""
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
