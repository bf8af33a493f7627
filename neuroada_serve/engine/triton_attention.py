"""Decode attention on CUDA: Triton kernels that read lengths on the device.

Keys and values lie in blocks of a fixed number of tokens, and a table gives each sequence's blocks
in order. One query token a sequence reads its whole context, so the step is bound by the cache's
bytes. The heads that share keys are computed together, and long contexts are split over several
programs whose parts a second kernel combines (split-KV, as in Flash-Decoding). The launch depends
on no length, so a CUDA graph may replay it for any context. A row of slot -1 reads and writes
nothing: the padding of a graph's batch.

Importing this file needs no Triton; calling its functions does.
"""

# Triton reads the annotations of a kernel: its pointers and numbers cannot have any.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # kernels are defined, not run, where Triton is absent

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # an installation for CPU
    triton = tl = None

HAS_TRITON = triton is not None
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # for tests

_MAX_HEAD_DIM = 256
_MAX_GROUP = 64
_PROGRAMS = 1056  # eight for each multiprocessor of an H200: about three waves, a short tail
_MAX_SPLITS = 32
_TILE_BYTES = 16384
_LOG2_E = math.log2(math.e)


def runs_on(tensor: Tensor) -> bool:
    """Return whether the kernels run on this tensor: on CUDA, or anywhere in Triton's
    interpreter."""
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def fits_decode(head_dim: int, group: int) -> bool:
    """Return whether `decode_attention` supports this head size and this many heads per kv head."""
    return head_dim <= _MAX_HEAD_DIM and group <= _MAX_GROUP


def write_kv_(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    """Store the keys and values of new tokens in their blocks; one launch for both.

    Semantics, for every token t with slots[t] >= 0:
        block, place = tables[slots[t], positions[t] // block_tokens], positions[t] % block_tokens
        keys[block, :, place] = k[t];  values[block, :, place] = v[t]

    Args:
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim], see `block_stride`. Changed in
            place.
        k, v: [T, kv_heads, head_dim], last stride 1.
        tables: [max_slots, max_blocks] int32.
        slots, positions: [T] int32 or int64.
    """
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    num_tokens, kv_heads, dim = k.shape
    if num_tokens == 0:
        return
    _write_kernel[(num_tokens,)](
        *(keys, values, k, v, tables, slots, positions),
        *(tables.stride(0), block_stride(keys, values)),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), kv_heads * dim),
        DIM=dim,
        BLOCK_TOKENS=keys.shape[2],
        BLOCK=power_of_two(kv_heads * dim),
        num_warps=4,
    )


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence over its own context.

    Semantics, for row t with s = slots[t], p = positions[t] and head h of kv head g:
        columns = max(0, p + 1 - window) .. p
        k, v = keys and values of these positions of s, by tables[s]
        scores = softcap * tanh(query[t, h] @ k[g].T * scaling / softcap)
        out[t, h] = softmax(scores) @ v[g]
    Without window all columns count, without softcap scores are the scaled products. Rows with
    slots[t] < 0 give zeros. Cells of other positions may hold anything, also NaN.

    Args:
        query: [n, heads, head_dim], last stride 1.
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim], see `block_stride`.
        tables: [max_slots, max_blocks] int32.
        slots, positions: [n] int32 or int64, on the device.
        scaling: None is head_dim ** -0.5.
        out: [n, heads, head_dim], contiguous, of query's dtype; filled and returned if given.

    Returns:
        [n, heads, head_dim], dtype of query.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    n, heads, dim = query.shape
    kv_heads = keys.shape[1]
    splits = num_splits(n, kv_heads)
    out = query.new_empty(n, heads, dim) if out is None else out
    assert out.is_contiguous()
    parts, weights = split_buffers(n, heads, splits, dim, query.device)
    block_d = max(16, power_of_two(dim))
    _attention_kernel[(n, kv_heads, splits)](
        *(query, keys, values, tables, slots, positions, out, parts, weights),
        *(*score_factors(dim, scaling, softcap), window or 0),
        *(query.stride(0), query.stride(1), tables.stride(0), block_stride(keys, values)),
        HEADS=heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_TOKENS=keys.shape[2],
        BLOCK_G=max(16, power_of_two(heads // kv_heads)),
        BLOCK_D=block_d,
        BLOCK_N=columns_per_tile(block_d, keys.element_size()),
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        num_warps=4,
    )
    if splits > 1:
        combine(parts, weights, out)
    return out


def combine(parts: Tensor, weights: Tensor, out: Tensor) -> None:
    """Combine the parts of every row's context, see `split_buffers`, in `out` [n, heads, dim]."""
    n, heads, splits, dim = parts.shape
    _combine_kernel[(n * heads,)](
        *(parts, weights, out),
        DIM=dim,
        BLOCK_D=max(16, power_of_two(dim)),
        SPLITS=splits,
        num_warps=4,
    )


def block_stride(keys: Tensor, values: Tensor) -> int:
    """Return the elements from a block to the next; they may lie far apart, as the layers of a
    block lie together. Its heads, tokens and their elements lie close, for keys as for values."""
    _, _, block_tokens, dim = keys.shape
    assert keys.shape == values.shape
    assert keys.stride() == values.stride() == (keys.stride(0), block_tokens * dim, dim, 1)
    return keys.stride(0)


def score_factors(
    head_dim: int, scaling: float | None, softcap: float | None
) -> tuple[float, float]:
    """Return (scale, cap), from which the kernels make scores in powers of two, not of e.

    They are product * scale, or cap * tanh(product * scale / 2) with a soft cap.
    """
    scaling = head_dim**-0.5 if scaling is None else scaling
    if softcap is None:
        return scaling * _LOG2_E, 0.0
    return 2 * scaling / softcap, softcap * _LOG2_E


def split_buffers(
    n: int, heads: int, splits: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return room for each split's softmax-weighted sum, [n, heads, splits, dim], and for the
    logarithm of its weight, [n, heads, splits]; float32, of no element without splits."""
    n = n if splits > 1 else 0
    parts = torch.empty(n, heads, splits, dim, dtype=torch.float32, device=device)
    return parts, torch.empty(n, heads, splits, dtype=torch.float32, device=device)


def columns_per_tile(block_d: int, element_size: int) -> int:
    """Return how many keys of block_d elements a program reads at once."""
    return max(16, min(64, _TILE_BYTES // (block_d * element_size)))


def num_splits(n: int, kv_heads: int) -> int:
    """Return how many programs share one sequence's context: enough to fill the GPU; a power of
    two."""
    wanted = max(1, _PROGRAMS // max(1, n * kv_heads))
    return min(_MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


# --- kernels ---------------------------------------------------------------------------------


def jit(kernel: Callable[..., Any]) -> Any:
    """Return `triton.jit` of it, where Triton is."""
    return triton.jit(kernel) if HAS_TRITON else kernel


@jit
def _write_kernel(
    keys,
    values,
    k,
    v,
    tables,
    slots,
    positions,
    table_stride,
    block_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    size,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write all kv heads of one token."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    position = tl.load(positions + t).to(tl.int32)
    block_at = tables + slot * table_stride + position // BLOCK_TOKENS
    block = tl.load(block_at, mask=slot >= 0, other=0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    head, d = at // DIM, at % DIM
    mask = (at < size) & (slot >= 0)
    cell = block * block_stride + (head * BLOCK_TOKENS + position % BLOCK_TOKENS) * DIM + d
    tl.store(keys + cell, tl.load(k + t * k_stride + head * k_head_stride + d, mask=mask), mask)
    tl.store(values + cell, tl.load(v + t * v_stride + head * v_head_stride + d, mask=mask), mask)


@jit
def cells(
    table, columns, seen, block_stride, kv_head, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Return where the keys of these positions of a sequence begin, by its block table."""
    block = tl.load(table + columns // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
    return block * block_stride + (kv_head * BLOCK_TOKENS + columns % BLOCK_TOKENS) * DIM


@jit
def scores_of(q, k, scale, cap, SOFTCAP: tl.constexpr):
    """Return the scores of rows and columns, see `score_factors`."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        scores = cap * (2 * tl.sigmoid(scores) - 1)  # tanh of half of it
    return scores


@jit
def add_columns(scores, v, highest, total, acc):
    """Take some columns into a running softmax: its highest score, sum and weighted values."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    zero = tl.where(higher == float("-inf"), 0.0, higher)  # of rows that have seen no column yet
    shrink = tl.exp2(highest - zero)
    p = tl.exp2(scores - zero[:, None])
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), acc


@jit
def _attention_kernel(
    query,  # [n, HEADS, DIM]
    keys,  # [num_blocks, kv_heads, BLOCK_TOKENS, DIM]
    values,
    tables,  # [max_slots, max_blocks]
    slots,  # [n]
    positions,  # [n]
    out,  # [n, HEADS, DIM]; written where SPLITS is 1
    parts,  # [n, HEADS, SPLITS, DIM]; written otherwise
    weights,  # [n, HEADS, SPLITS]
    scale,
    cap,
    window,
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    """Compute one part of one sequence's context, for the GROUP heads that share a kv head."""
    t = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    slot = tl.load(slots + t).to(tl.int64)
    stop = tl.load(positions + t).to(tl.int32) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(stop - window, 0)
    stop = tl.where(slot >= 0, stop, first)
    tiles = (stop - first + BLOCK_N - 1) // BLOCK_N
    chunk = (tiles + SPLITS - 1) // SPLITS * BLOCK_N
    first = first + split * chunk
    stop = tl.minimum(stop, first + chunk)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + g
    q_mask = (g < GROUP)[:, None] & (d < DIM)[None, :]
    q_at = query + t * query_stride + heads[:, None] * query_head_stride + d[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    table = tables + slot * table_stride
    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)

    for start in range(first, stop, BLOCK_N):  # online softmax
        columns = start + tl.arange(0, BLOCK_N)
        seen = columns < stop
        cell = cells(table, columns, seen, block_stride, kv_head, DIM, BLOCK_TOKENS)
        cell = cell[:, None] + d[None, :]
        mask = seen[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        scores = tl.where(seen[None, :], scores_of(q, k, scale, cap, SOFTCAP), float("-inf"))
        v = tl.load(values + cell, mask=mask, other=0.0)
        highest, total, acc = add_columns(scores, v, highest, total, acc)

    empty = first >= stop
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if SPLITS == 1:
        o_at = out + (t * HEADS + heads)[:, None] * DIM + d[None, :]
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        row = (t * HEADS + heads) * SPLITS + split
        tl.store(parts + row[:, None] * DIM + d[None, :], acc, mask=q_mask)
        weight = tl.where(empty, float("-inf"), highest + tl.log2(total))
        tl.store(weights + row, weight, mask=g < GROUP)


@jit
def _combine_kernel(
    parts,  # [rows, SPLITS, DIM]
    weights,  # [rows, SPLITS]
    out,  # [rows, DIM]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Combine the parts of one head of one sequence, each by its share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weights + row * SPLITS + split)
    highest = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    part_at = parts + (row * SPLITS + split)[:, None] * DIM + d[None, :]
    part = tl.load(part_at, mask=(d < DIM)[None, :], other=0.0)
    total = tl.sum(share, 0)
    mixed = tl.sum(share[:, None] * part, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * DIM + d, mixed.to(out.dtype.element_ty), mask=d < DIM)
