"""The gradient of an adapter's values, as a Triton kernel for CUDA.

A program owns some rows of the weight and some of the tokens. The columns that its rows keep are
rows of the transposed activations, so that every load is of neighbouring tokens; the gradients of
its outputs are read as they lie. Programs of the same rows write partial sums, which are added in
a fixed order: the same inputs always give the same bits.

Importing this file needs no Triton; calling its function does (`HAS_TRITON`).
"""

# Triton reads the annotations of a kernel: its pointers and numbers cannot have any.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # kernels are defined, not run, where Triton is absent

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # an installation for CPU
    triton = tl = None

HAS_TRITON = triton is not None

_TURNED = 64  # rows and columns that a program transposes


@dataclass(frozen=True)
class GradTile:
    """The cut of one launch.

    rows: rows of the weight per program, a power of two.
    tokens: tokens a program multiplies at once, a power of two.
    span: tokens per program, a multiple of `tokens`.
    warps: warps per program.
    """

    rows: int = 32
    tokens: int = 128
    span: int = 512
    warps: int = 4


def value_grad_triton(
    grad_output: Tensor, x: Tensor, index: Tensor, tile: GradTile | None = None
) -> Tensor:
    """`value_grad` on CUDA.

    Semantics:
        out[i, j] = sum_t grad_output[t, i] * x[t, index[i, j]]
    A column outside [0, d_in) counts as zeros.

    Args:
        grad_output: [num_tokens, d_out], any strides.
        x: [num_tokens, d_in].
        index: [d_out, k] int32 or int64.
        tile: how to cut the work; None takes the default.

    Returns:
        [d_out, k] float32; summed in float32.
    """
    tile = tile or GradTile()
    num_tokens, d_out = grad_output.shape
    d_in, k = x.shape[1], index.shape[1]
    x_t = _transposed(x)
    index = index.contiguous()
    spans = max(1, -(-num_tokens // tile.span))
    parts = torch.empty(spans, d_out, k, dtype=torch.float32, device=x.device)
    _value_grad_kernel[(-(-d_out // tile.rows), spans)](
        grad_output,
        x_t,
        index,
        parts,
        num_tokens,
        d_in,
        d_out,
        grad_output.stride(0),
        grad_output.stride(1),
        K=k,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        SPAN=tile.span,
        num_warps=tile.warps,
    )
    return parts[0] if spans == 1 else parts.sum(dim=0)


def _transposed(x: Tensor) -> Tensor:
    """[d_in, num_tokens], a copy; torch's own takes five times as long on an H200."""
    rows, columns = x.shape
    x_t = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    if x.numel():
        grid = (-(-rows // _TURNED), -(-columns // _TURNED))
        _transpose_kernel[grid](x, x_t, rows, columns, x.stride(0), x.stride(1), BLOCK=_TURNED)
    return x_t


def _jit(function: Any) -> Any:
    return triton.jit(function) if HAS_TRITON else function


@_jit
def _transpose_kernel(x, x_t, rows, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = x + row[:, None] * row_stride + column[None, :] * column_stride
    tile = tl.load(source, mask=(row < rows)[:, None] & (column < columns)[None, :])
    target = x_t + column[:, None] * rows + row[None, :]
    tl.store(target, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


@_jit
def _value_grad_kernel(
    grad_output,
    x_t,
    index,
    parts,
    num_tokens,
    d_in,
    d_out,
    grad_stride,
    grad_row_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < d_out
    first = tl.program_id(1) * SPAN
    for j in range(K):
        columns = tl.load(index + rows.to(tl.int64) * K + j, mask=is_row, other=-1)
        is_column = is_row & (columns >= 0) & (columns < d_in)
        row_x = x_t + columns.to(tl.int64) * num_tokens
        sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for start in range(0, SPAN, TOKENS):
            tokens = first + start + tl.arange(0, TOKENS)
            is_token = tokens < num_tokens
            grads = tl.load(
                grad_output
                + tokens.to(tl.int64)[None, :] * grad_stride
                + rows.to(tl.int64)[:, None] * grad_row_stride,
                mask=is_row[:, None] & is_token[None, :],
                other=0.0,
            )
            inputs = tl.load(
                row_x[:, None] + tokens[None, :],
                mask=is_column[:, None] & is_token[None, :],
                other=0.0,
            )
            sums += grads.to(tl.float32) * inputs.to(tl.float32)
        place = (tl.program_id(1).to(tl.int64) * d_out + rows) * K + j
        tl.store(parts + place, tl.sum(sums, axis=1), mask=is_row)
