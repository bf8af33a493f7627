"""The CPU kernel of the value gradient, compiled by numba like those of `cpu_kernels.py`.

A piece of work is a span of tokens and a group of neurons. Tokens lie in vector lanes: both sides
of the sum are turned, 32 x 16 elements at a time, so that an entry of the gradient is a dot product
of two contiguous stretches, whichever column its neuron keeps. Each span writes sums of its own,
to be added in order: how the pieces fall to the threads does not change a bit.
"""

from typing import Any

import numpy as np
from numba import njit

from neuroada_serve.ops.cpu_blocks import LANES, ValueGradBlock
from neuroada_serve.ops.cpu_vectors import (
    TILE,
    address_of,
    block_reader,
    c_function,
    draw,
    floats_at,
    fma,
    ints_at,
    kernel_sources,
    put,
    read_tile,
    reduced,
    size_of,
    spread,
    vector_at,
)

SPAN = 128  # tokens in one piece of work
BLOCKS = SPAN // LANES
ROW = 4 * LANES  # bytes of a turned row's block

_block_at = block_reader(ValueGradBlock)


@njit
def _set_rows(
    rows: Any, source: int, stride_bytes: int, first: int, tokens: int, zeros: int
) -> None:
    """rows [8, 16]: where the rows of tokens first..first + 127 begin; zeros beyond the last."""
    for t in range(SPAN):
        known = first + t < tokens
        rows[t // LANES, t % LANES] = source + (first + t) * stride_bytes if known else zeros


@njit
def _value_grad(args: Any) -> None:
    """parts[span, i, j] = sum over the span's tokens of grads[t, i] * x[t, index[i, j]]"""
    kind, tokens, k = args.kind, args.tokens, args.k
    d_out, d_in, group = args.d_out, args.d_in, args.group
    size = size_of(kind)
    index = ints_at(args.index)
    groups = (d_out + group - 1) // group
    spans = (tokens + SPAN - 1) // SPAN
    counter = address_of(args)
    work = draw(counter)
    if work >= spans * groups:
        return
    x_rows, g_rows = np.empty((BLOCKS, LANES), np.int64), np.empty((BLOCKS, LANES), np.int64)
    tile = np.empty(TILE * LANES, np.float32)
    g = np.empty(BLOCKS * TILE * LANES, np.float32)  # (block, neuron, lane)
    x = np.empty(d_in * SPAN, np.float32)  # (column, block, lane)
    x_at, g_at, tile_at = address_of(x), address_of(g), address_of(tile)
    ready = -1  # the span that x is of
    while work < spans * groups:
        span, row = work // groups, work % groups * group
        stop = min(row + group, d_out)
        if span != ready:
            first = span * SPAN
            _set_rows(x_rows, args.x, args.x_stride * size, first, tokens, args.zeros)
            _set_rows(g_rows, args.grads, args.grad_stride * size, first, tokens, args.zeros)
            for start in range(0, d_in, TILE):
                column = min(start, d_in - TILE)  # the last tile overlaps the one before
                for b in range(BLOCKS):
                    read_tile(address_of(x_rows[b]), column, tile_at, kind)
                    for i in range(TILE):
                        put(vector_at(tile_at + ROW * i), x_at + ROW * ((column + i) * BLOCKS + b))
            ready = span
        parts = floats_at(args.parts + 4 * span * d_out * k)
        for start in range(row, stop, TILE):
            neuron = min(start, d_out - TILE)
            for b in range(BLOCKS):
                read_tile(address_of(g_rows[b]), neuron, g_at + ROW * TILE * b, kind)
            for i in range(TILE):
                for j in range(k):
                    entry = (neuron + i) * k + j
                    x_row = x_at + ROW * BLOCKS * np.int64(index[entry])
                    even, odd = spread(np.float32(0)), spread(np.float32(0))
                    for b in range(0, BLOCKS, 2):
                        g_row = g_at + ROW * (TILE * b + i)
                        even = fma(vector_at(g_row), vector_at(x_row + ROW * b), even)
                        g_row += ROW * TILE
                        odd = fma(vector_at(g_row), vector_at(x_row + ROW * (b + 1)), odd)
                    parts[entry] = reduced(even) + reduced(odd)
        work = draw(counter)
    # numba frees an array after its last use in the code
    tile[0] = g[0] = x[0] = x_rows[0, 0] = g_rows[0, 0] = 0


def _c_functions(sources: int) -> Any:
    def value_grad(block: Any) -> None:
        if sources:
            _value_grad(_block_at(block))

    return c_function(value_grad)


value_grad = _c_functions(kernel_sources())
