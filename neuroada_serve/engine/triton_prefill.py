"""Attention of prompts' chunks on CUDA, over keys and values in blocks: one launch for all of them.

The chunks of a step, each with any number of tokens before it in the cache, are cut into tiles of a
few tokens. A program takes a tile and the heads that share a kv head, and reads the keys and values
before it through the sequence's block table with a running softmax (as FlashAttention): nothing is
gathered, and there is no mask. Where a step has few tiles on long contexts, several programs share
a tile's context, as in `decode_attention`.

Importing this file needs no Triton; calling `prefill_attention` does.
"""

# Triton reads the annotations of a kernel: its pointers and numbers cannot have any.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # kernels are defined, not run, where Triton is absent

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuroada_serve.engine.triton_attention import (
    add_columns,
    block_stride,
    cells,
    columns_per_tile,
    combine,
    jit,
    power_of_two,
    score_factors,
    scores_of,
    split_buffers,
)

try:
    import triton.language as tl
except ImportError:  # an installation for CPU
    tl = None

_TILE_ROWS = 128  # a row is one token's head
_TILE_BYTES = 32768  # of a tile's queries
_PROGRAMS = 264  # two for each multiprocessor of an H200
_MAX_SPLITS = 8
_SPLIT_COLUMNS = 1024  # a shorter part of a context is not worth a program of its own


class Span(Protocol):
    """Tokens start..stop - 1 of a step: the next of the sequence in `slot`, which has num_past in
    the cache."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def num_past(self) -> int: ...


@dataclass(frozen=True)
class Tiles:
    """The chunks of a step, cut for `prefill_attention`.

    rows: [num_tiles, 4] int32, on the device: the first token, counted from the first chunk's; the
        number of tokens; the slot; the first token's position.
    num_tokens: of all chunks.
    tile_tokens: most of a tile.
    longest: positions of the longest context, its chunk included.
    """

    rows: Tensor
    num_tokens: int
    tile_tokens: int
    longest: int


def tile_tokens(heads: int, kv_heads: int, head_dim: int, element_size: int) -> int:
    """Return how many tokens a tile has at most; for sizes that `fits_decode` supports."""
    return _tile_rows(heads // kv_heads, head_dim, element_size) // (heads // kv_heads)


def cut(spans: Sequence[Span], tokens: int, device: torch.device) -> Tiles:
    """Cut chunks into tiles, once for all layers with the same `tile_tokens`.

    Args:
        spans: at least one, each beginning where the one before it stops.
        tokens: most of a tile, see `tile_tokens`.
    """
    rows: list[tuple[int, int, int, int]] = []
    for i, span in enumerate(spans):
        assert span.start < span.stop
        assert i == 0 or span.start == spans[i - 1].stop
        for start in range(span.start, span.stop, tokens):
            count = min(tokens, span.stop - start)
            position = span.num_past + start - span.start
            rows.append((start - spans[0].start, count, span.slot, position))
    # The longest contexts first, so that no program begins a long one when the others end.
    rows.sort(key=lambda row: -row[3])
    host = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Tiles(
        host.to(device, non_blocking=True),
        num_tokens=spans[-1].stop - spans[0].start,
        tile_tokens=tokens,
        longest=max(span.num_past + span.stop - span.start for span in spans),
    )


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tiles: Tiles,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks of prompts over their sequences' contexts.

    Semantics: every token attends as in `decode_attention`, at its own slot and position. The
    chunks' own keys and values are in the cache already.

    Args:
        query: [T, heads, head_dim] of the chunks' tokens, last stride 1.
        keys, values: [num_blocks, kv_heads, block_tokens, head_dim], see `block_stride`.
        tables: [max_slots, max_blocks] int32.
        tiles: of T tokens, by `cut` with `tile_tokens` of these sizes.
        scaling: None is head_dim ** -0.5.
        out: [T, heads, head_dim], contiguous, of query's dtype; filled and returned if given.

    Returns:
        [T, heads, head_dim], dtype of query.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    num_tokens, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group, size, block_d = heads // kv_heads, keys.element_size(), max(16, power_of_two(dim))
    assert num_tokens == tiles.num_tokens
    assert tiles.tile_tokens == tile_tokens(heads, kv_heads, dim, size)
    out = query.new_empty(num_tokens, heads, dim) if out is None else out
    assert out.is_contiguous()
    splits = num_splits(len(tiles.rows) * kv_heads, tiles.longest)
    parts, weights = split_buffers(num_tokens, heads, splits, dim, query.device)
    block_m = _tile_rows(group, dim, size)
    _prefill_kernel[(kv_heads, len(tiles.rows), splits)](
        *(query, keys, values, tables, tiles.rows, out, parts, weights),
        *(*score_factors(dim, scaling, softcap), window or 0),
        *(query.stride(0), query.stride(1), tables.stride(0), block_stride(keys, values)),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_TOKENS=keys.shape[2],
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        BLOCK_N=columns_per_tile(block_d, size),
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        num_warps=num_warps(block_m, size),
        num_stages=3,
    )
    if splits > 1:
        combine(parts, weights, out)
    return out


def warm_up(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Compile the kernel for every number of splits that a step may use; changes nothing.

    Args:
        query: [1, heads, head_dim], of any values, as those of a step lie in memory.
        keys, values, tables, scaling, window, softcap: as in `prefill_attention`.
    """
    _, heads, dim = query.shape
    tokens = tile_tokens(heads, keys.shape[1], dim, keys.element_size())
    rows = torch.tensor([[0, 1, 0, 0]], dtype=torch.int32, device=query.device)
    for longest in (_SPLIT_COLUMNS << i for i in range(_MAX_SPLITS.bit_length())):
        tiles = Tiles(rows, num_tokens=1, tile_tokens=tokens, longest=longest)
        prefill_attention(query, keys, values, tables, tiles, scaling, window, softcap)


def num_splits(num_programs: int, longest: int) -> int:
    """Return how many programs share a tile's context: enough to fill the GPU, where the longest
    context is worth it; a power of two."""
    wanted = max(1, min(_MAX_SPLITS, _PROGRAMS // num_programs, longest // _SPLIT_COLUMNS))
    return 1 << (wanted.bit_length() - 1)


def num_warps(block_m: int, element_size: int) -> int:
    """Return the warps of a program: float32, which has no tensor cores, needs registers."""
    return 8 if block_m >= 128 or element_size == 4 else 4


def _tile_rows(group: int, head_dim: int, element_size: int) -> int:
    """Return the rows of a tile, a power of two: no fewer than the heads of a group."""
    fitting = _TILE_BYTES // (max(16, power_of_two(head_dim)) * element_size)
    return max(16, power_of_two(group), min(_TILE_ROWS, fitting))


@jit
def _scan(
    q,  # [BLOCK_M, BLOCK_D]
    keys,
    values,
    table,
    first,
    stop,
    own,  # [BLOCK_M] positions
    scale,
    cap,
    window,
    block_stride,
    kv_head,
    highest,
    total,
    acc,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HIDES: tl.constexpr,
):
    """Take columns first..stop - 1 into the running softmax of all rows; HIDES: some rows do not
    see all of them."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        written = columns < stop
        cell = cells(table, columns, written, block_stride, kv_head, DIM, BLOCK_TOKENS)
        cell = cell[:, None] + d[None, :]
        mask = (d < DIM)[None, :]
        if HIDES:
            mask = mask & written[:, None]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        scores = scores_of(q, k, scale, cap, SOFTCAP)
        if HIDES:
            seen = written[None, :] & (columns[None, :] <= own[:, None])
            if WINDOW:
                seen = seen & (columns[None, :] > own[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(values + cell, mask=mask, other=0.0)
        highest, total, acc = add_columns(scores, v, highest, total, acc)
    return highest, total, acc


@jit
def _prefill_kernel(
    query,  # [T, HEADS, DIM]
    keys,  # [num_blocks, kv_heads, BLOCK_TOKENS, DIM]
    values,
    tables,  # [max_slots, max_blocks]
    tiles,  # [num_tiles, 4]
    out,  # [T, HEADS, DIM]; written where SPLITS is 1
    parts,  # [T, HEADS, SPLITS, DIM]; written otherwise
    weights,  # [T, HEADS, SPLITS]
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    """Compute one part of the context of one tile, for the GROUP heads that share a kv head."""
    kv_head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    split = tl.program_id(2)
    start = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    slot = tl.load(tile + 2).to(tl.int64)
    position = tl.load(tile + 3)

    first = 0
    if WINDOW:
        first = tl.maximum(position + 1 - window, 0)
    stop = position + count
    chunk = ((stop - first + BLOCK_N - 1) // BLOCK_N + SPLITS - 1) // SPLITS * BLOCK_N
    first = first + split * chunk
    stop = tl.minimum(stop, first + chunk)
    clear = first  # all rows see all columns before it
    if not WINDOW:
        clear += tl.maximum(tl.minimum(stop, position + 1) - first, 0) // BLOCK_N * BLOCK_N

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token, heads = r // GROUP, kv_head * GROUP + r % GROUP
    own = position + token
    row = start + token
    q_mask = (token < count)[:, None] & (d < DIM)[None, :]
    q_at = query + row[:, None] * query_stride + heads[:, None] * query_head_stride + d[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    table = tables + slot * table_stride
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # fmt: off
    highest, total, acc = _scan(
        q, keys, values, table, first, clear, own, scale, cap, window, block_stride, kv_head,
        highest, total, acc, DIM, BLOCK_TOKENS, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, HIDES=False,
    )
    highest, total, acc = _scan(
        q, keys, values, table, clear, stop, own, scale, cap, window, block_stride, kv_head,
        highest, total, acc, DIM, BLOCK_TOKENS, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, HIDES=True,
    )
    # fmt: on

    empty = total == 0.0  # a part of which this row sees nothing
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if SPLITS == 1:
        o_at = out + (row * HEADS + heads)[:, None] * DIM + d[None, :]
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        part = (row * HEADS + heads) * SPLITS + split
        tl.store(parts + part[:, None] * DIM + d[None, :], acc, mask=q_mask)
        weight = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(weights + part, weight, mask=token < count)
