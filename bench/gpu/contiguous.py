"""Decode attention over a contiguous cache, as it was before the cache had blocks: for comparison.

Same arithmetic as `engine/triton_attention.py`, without a table to look positions up in.
"""

from __future__ import annotations  # the kernel is defined, not run, where Triton is absent

import torch
from torch import Tensor

from neuroada_serve.engine.triton_attention import (
    add_columns,
    columns_per_tile,
    combine,
    jit,
    num_splits,
    power_of_two,
    score_factors,
    scores_of,
    split_buffers,
)

try:
    import triton.language as tl
except ImportError:  # an installation for CPU
    tl = None


def contiguous_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of row t over positions 0..positions[t] of slot t.

    Args:
        query: [n, heads, head_dim], contiguous.
        keys, values: [n, kv_heads, num_tokens, head_dim], contiguous.
        positions: [n] int32.
    """
    n, heads, dim = query.shape
    kv_heads = keys.shape[1]
    splits, block_d = num_splits(n, kv_heads), max(16, power_of_two(dim))
    out = torch.empty_like(query)
    parts, weights = split_buffers(n, heads, splits, dim, query.device)
    _contiguous_kernel[(n, kv_heads, splits)](
        *(query, keys, values, positions, out, parts, weights),
        *(score_factors(dim, None, None)[0], keys.stride(0), keys.stride(1)),
        HEADS=heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_G=max(16, power_of_two(heads // kv_heads)),
        BLOCK_D=block_d,
        BLOCK_N=columns_per_tile(block_d, keys.element_size()),
        SPLITS=splits,
        num_warps=4,
    )
    if splits > 1:
        combine(parts, weights, out)
    return out


@jit
def _contiguous_kernel(
    query,
    keys,
    values,
    positions,
    out,
    parts,
    weights,
    scale,
    slot_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Compute one part of one sequence's context, for the GROUP heads that share a kv head."""
    t = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    stop = tl.load(positions + t) + 1
    chunk = ((stop + BLOCK_N - 1) // BLOCK_N + SPLITS - 1) // SPLITS * BLOCK_N
    first = split * chunk
    stop = tl.minimum(stop, first + chunk)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    row = t * HEADS + kv_head * GROUP + g
    q_mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + row[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    base = t * slot_stride + kv_head * head_stride
    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        seen = columns < stop
        cell = base + columns[:, None].to(tl.int64) * DIM + d[None, :]
        mask = seen[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        scores = scores_of(q, k, scale, 0.0, False)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        v = tl.load(values + cell, mask=mask, other=0.0)
        highest, total, acc = add_columns(scores, v, highest, total, acc)
    empty = first >= stop
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if SPLITS == 1:
        tl.store(out + row[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        part = row * SPLITS + split
        tl.store(parts + part[:, None] * DIM + d[None, :], acc, mask=q_mask)
        weight = tl.where(empty, float("-inf"), highest + tl.log2(total))
        tl.store(weights + part, weight, mask=g < GROUP)
