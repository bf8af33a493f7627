"""Attention over the blocks of a KV cache: operations of the program of `cpu_forward_kernels.py`.

A sequence's positions lie in blocks that a block table lists. Keys and values are read where they
lie, 16 positions at a time: these are aligned, so they are neighbours in one block and cost one
look at the table. Cells that a token may not see, or that nobody has written, are not read at all:
a cell that it sees stands in for them and gets no weight.

Sums are float32 and go by position, so what else is in a step changes no bit of them.
"""

from typing import Any

import numpy as np
from numba import njit

from neuroada_serve.ops.cpu_blocks import LANES, QUERIES, AttentionBlock
from neuroada_serve.ops.cpu_kernels import norm_row
from neuroada_serve.ops.cpu_vectors import (
    BFLOAT16,
    TILE,
    address_of,
    block_reader,
    dot_pair,
    draw,
    exp,
    floats_at,
    fma,
    ints_at,
    lane_sum,
    larger,
    largest_lane,
    longs_at,
    minus,
    narrow,
    plus,
    put,
    read_pairs,
    spread,
    times,
    vector_at,
    widen,
)

GROUP = 8  # values that are weighted at once
SINGLE = 32  # in steps of more tokens, QUERIES tokens of a sequence attend together

attention_at = block_reader(AttentionBlock)


@njit(inline="always")
def _cell(args: Any, slot: int, kv_head: int, position: int) -> Any:
    """Where a position's keys or values begin, in elements."""
    blocks, shift = ints_at(args.tables), args.block_shift
    block = np.int64(blocks[slot * args.table_stride + (position >> shift)])
    row = (kv_head << shift) + (position & ((1 << shift) - 1))
    return block * args.block_stride + row * args.head_dim


@njit
def rotate(args: Any, step: Any) -> None:
    """Rotary embedding of queries and keys; keys and values go into the cache."""
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    half = dim // 2
    positions, slots = longs_at(step.positions), longs_at(step.slots)
    counter = address_of(args)
    token = draw(counter)
    if token >= step.num_tokens:
        return
    cos, sin = np.empty(dim, np.float32), np.empty(dim, np.float32)
    x, turned = np.empty(dim + LANES, np.float32), np.empty(dim, np.float32)
    norms = np.empty((2, dim), np.float32)
    if args.q_norm:
        widen(args.q_norm, address_of(norms[0]), dim, BFLOAT16)
        widen(args.k_norm, address_of(norms[1]), dim, BFLOAT16)
    while token < step.num_tokens:
        widen(step.cos + 2 * dim * token, address_of(cos), dim, BFLOAT16)
        widen(step.sin + 2 * dim * token, address_of(sin), dim, BFLOAT16)
        row = args.qkv + 2 * args.qkv_stride * token
        slot, position = slots[token], positions[token]
        for head in range(heads + kv_heads):
            at, is_key = row + 2 * dim * head, head >= heads
            if args.q_norm:
                eps = args.head_eps
                norm_row(at, at, norms[1 if is_key else 0], dim, eps, x, BFLOAT16)
            widen(at, address_of(x), dim, BFLOAT16)
            for i in range(half):
                turned[i] = x[i] * cos[i] - x[half + i] * sin[i]
                turned[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]
            if is_key:
                at = args.keys + 2 * _cell(args, slot, head - heads, position)
            narrow(address_of(turned), at, dim, BFLOAT16)
        for head in range(kv_heads):
            at = row + 2 * dim * (heads + kv_heads + head)
            widen(at, address_of(x), dim, BFLOAT16)
            target = args.values + 2 * _cell(args, slot, head, position)
            narrow(address_of(x), target, dim, BFLOAT16)
        token = draw(counter)
    cos[0] = sin[0] = x[0] = turned[0] = norms[0, 0] = 0


@njit
def attend(args: Any, step: Any, scratch: int) -> None:
    """Softmax attention of each token over its sequence up to its own position."""
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    positions, slots = longs_at(step.positions), longs_at(step.slots)
    num_tokens = step.num_tokens
    together = QUERIES if num_tokens > SINGLE else 1
    pieces = (num_tokens + together - 1) // together * kv_heads
    counter = address_of(args)
    piece = draw(counter)
    if piece >= pieces:
        return
    keys = np.empty(dim * LANES // 2, np.int32)  # pairs of 16 positions, turned
    values = np.empty(GROUP * dim, np.float32)
    out = np.empty(together * heads // kv_heads * dim, np.float32)
    rows = np.empty(LANES, np.int64)
    while piece < pieces:
        token = piece // kv_heads * together
        stop = min(token + together, num_tokens)
        while token < stop:
            count = 1
            while (
                token + count < stop
                and slots[token + count] == slots[token]
                and positions[token + count] == positions[token] + count
            ):
                count += 1
            work = address_of(keys), address_of(values), address_of(out), address_of(rows)
            head, slot, position = piece % kv_heads, slots[token], positions[token]
            _attend_together(args, token, count, head, slot, position, scratch, work)
            token += count
        piece = draw(counter)
    keys[0] = values[0] = out[0] = rows[0] = 0


@njit(inline="always")
def _rows(rows: Any, start: int, stride: int, low: int, high: int) -> None:
    """The addresses of 16 rows; those before row `low` repeat it, those behind `high` that one."""
    for i in range(LANES):
        rows[i] = start + stride * min(max(i, low), high)


@njit
def _attend_together(
    args: Any,
    token: int,
    num_tokens: int,
    kv_head: int,
    slot: int,
    position: int,
    scratch: int,
    work: tuple[int, int, int, int],
) -> None:
    """Attention of one head of keys for tokens of one sequence at position and on.

    scratch: num_tokens * group rows of scores.
    work: addresses of room for 16 keys, for GROUP values, for what all tokens get, and for 16
        addresses.
    """
    heads, kv_heads, dim, window = args.heads, args.kv_heads, args.head_dim, args.window
    group, scale = heads // kv_heads, spread(args.scale)
    keys, values, out, rows_at = work
    rows, row_bytes = longs_at(rows_at), 2 * dim
    # What the first token sees begins here; scores and weights begin at a multiple of 16.
    seen, first, last = 0, 0, position + num_tokens - 1
    if window:
        seen = max(0, position - window + 1)
        first = seen // LANES * LANES
    padded = (last - first) // LANES * LANES + LANES
    queries = args.qkv + 2 * (args.qkv_stride * token + kv_head * group * dim)

    # 1. Scores, 16 positions side by side.
    for start in range(0, padded, LANES):
        at = args.keys + 2 * _cell(args, slot, kv_head, first + start)
        low, high = max(0, seen - first - start), min(LANES - 1, last - first - start)
        _rows(rows, at, row_bytes, low, high)
        for column in range(0, dim, TILE):
            read_pairs(rows_at, 2 * column, keys + 2 * LANES * column)
        for row in range(num_tokens * group):
            query = queries + 2 * (row // group * args.qkv_stride + row % group * dim)
            a = spread(np.float32(0))
            b, c, d = a, a, a
            for i in range(0, dim, 8):
                at = keys + 2 * LANES * i
                a = dot_pair(a, at, query + 2 * i)
                b = dot_pair(b, at + 4 * LANES, query + 2 * i + 4)
                c = dot_pair(c, at + 8 * LANES, query + 2 * i + 8)
                d = dot_pair(d, at + 12 * LANES, query + 2 * i + 12)
            total = times(plus(plus(a, b), plus(c, d)), scale)
            put(total, scratch + 4 * (row * padded + start))

    # 2. Their softmax; what a token may not see gets no weight.
    for row in range(num_tokens * group):
        weights_at = scratch + 4 * row * padded
        weights = floats_at(weights_at)
        own_stop, own_first = position + row // group + 1 - first, 0
        if window:
            own_first = max(0, position + row // group + 1 - window) - first
        for i in range(own_first):
            weights[i] = weights[own_first]
        for i in range(own_stop, padded):
            weights[i] = weights[own_first]
        most = vector_at(weights_at)
        for start in range(LANES, padded, LANES):
            most = larger(most, vector_at(weights_at + 4 * start))
        largest = spread(largest_lane(most))
        for start in range(0, padded, LANES):
            put(exp(minus(vector_at(weights_at + 4 * start), largest)), weights_at + 4 * start)
        for i in range(own_first):
            weights[i] = 0
        for i in range(own_stop, padded):
            weights[i] = 0
        total = spread(np.float32(0))
        for start in range(0, padded, LANES):
            total = plus(total, vector_at(weights_at + 4 * start))
        share = spread(np.float32(1) / lane_sum(total))
        for start in range(0, padded, LANES):
            at = weights_at + 4 * start
            put(times(vector_at(at), share), at)

    # 3. The values' weighted sum.
    for i in range(0, num_tokens * group * dim, LANES):
        put(spread(np.float32(0)), out + 4 * i)
    for start in range(0, padded, LANES):
        at = args.values + 2 * _cell(args, slot, kv_head, first + start)
        low, high = max(0, seen - first - start), min(LANES - 1, last - first - start)
        _rows(rows, at, row_bytes, low, high)
        for half in range(0, LANES, GROUP):
            for i in range(GROUP):
                widen(rows[half + i], values + 4 * dim * i, dim, BFLOAT16)
            for row in range(num_tokens * group):
                weights = floats_at(scratch + 4 * (row * padded + start + half))
                for column in range(0, dim, LANES):
                    at = out + 4 * (row * dim + column)
                    total = vector_at(at)
                    for i in range(GROUP):
                        value = vector_at(values + 4 * (i * dim + column))
                        total = fma(spread(weights[i]), value, total)
                    put(total, at)
    for i in range(num_tokens):
        target = args.out + 2 * ((token + i) * heads + kv_head * group) * dim
        narrow(out + 4 * i * group * dim, target, group * dim, BFLOAT16)
