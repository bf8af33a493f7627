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

from neuroada_serve.ops.cpu_blocks import LANES, QUERIES, AttentionBlock, WriteBlock
from neuroada_serve.ops.cpu_kernels import norm_row
from neuroada_serve.ops.cpu_vectors import (
    BFLOAT16,
    FLOAT16,
    TILE,
    add_weighted_bf16,
    add_weighted_f16,
    add_weighted_f32,
    address_of,
    block_reader,
    c_function,
    copy_bytes,
    dot_pair,
    draw,
    exp,
    fetch_ahead,
    floats_at,
    fma,
    ints_at,
    kernel_sources,
    lane_sum,
    larger,
    largest_lane,
    longs_at,
    minus,
    narrow,
    over,
    plus,
    put,
    read_pairs,
    read_tile,
    size_of,
    spread,
    times,
    vector_at,
    widen,
)

AHEAD = 64  # positions between those that are used and those that are fetched
SINGLE = 32  # in steps of more tokens, QUERIES tokens of a sequence attend together

attention_at, _write_block = block_reader(AttentionBlock), block_reader(WriteBlock)


@njit(inline="always")
def _cell(args: Any, slot: int, kv_head: int, position: int) -> Any:
    """The place where a position's keys or values begin, in elements."""
    blocks, shift = ints_at(args.tables), args.block_shift
    block = np.int64(blocks[slot * args.table_stride + (position >> shift)])
    row = (kv_head << shift) + (position & ((1 << shift) - 1))
    return block * args.block_stride + row * args.head_dim


# --- new keys and values ---------------------------------------------------------------------


@njit
def rotate(args: Any, step: Any) -> None:
    """Rotary embedding of queries and keys, in bf16; keys and values go into the cache."""
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
        row = args.query + 2 * args.query_stride * token
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
            source = row + 2 * dim * (heads + kv_heads + head)
            copy_bytes(source, args.values + 2 * _cell(args, slot, head, position), 2 * dim)
        token = draw(counter)
    cos[0] = sin[0] = x[0] = turned[0] = norms[0, 0] = 0


@njit
def _write(args: Any) -> None:
    """Store new keys and values of one layer; a slot below 0 has none."""
    kv_heads, dim, size = args.kv_heads, args.head_dim, size_of(args.kind)
    positions, slots = longs_at(args.positions), longs_at(args.slots)
    counter = address_of(args)
    token = draw(counter)
    while token < args.num_tokens:
        k, v = args.k + size * args.k_stride * token, args.v + size * args.v_stride * token
        for head in range(kv_heads if slots[token] >= 0 else 0):
            at = size * _cell(args, slots[token], head, positions[token])
            copy_bytes(k + size * args.k_head_stride * head, args.keys + at, size * dim)
            copy_bytes(v + size * args.v_head_stride * head, args.values + at, size * dim)
        token = draw(counter)


# --- attention -------------------------------------------------------------------------------


@njit
def attend(args: Any, step: Any, scratch: int) -> None:
    """Softmax attention of each token over its sequence up to its own position."""
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    positions, slots = longs_at(step.positions), longs_at(step.slots)
    num_tokens, group = step.num_tokens, heads // kv_heads
    together = QUERIES if num_tokens > SINGLE else 1
    pieces = (num_tokens + together - 1) // together * kv_heads
    counter = address_of(args)
    piece = draw(counter)
    if piece >= pieces:
        return
    queries = np.empty(together * group * dim, np.float32)
    keys = np.empty(dim * LANES, np.float32)  # of 16 positions, turned
    out = np.empty(together * group * dim, np.float32)
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
            work = address_of(queries), address_of(keys), address_of(out), address_of(rows)
            head, slot, position = piece % kv_heads, slots[token], positions[token]
            if slot >= 0:
                _attend_together(args, token, count, head, slot, position, scratch, work)
            else:
                count = 1
                out[: group * dim] = 0
            size = size_of(args.kind)
            for i in range(count):
                target = args.out + size * ((token + i) * heads + head * group) * dim
                narrow(address_of(out) + 4 * i * group * dim, target, group * dim, args.kind)
            token += count
        piece = draw(counter)
    queries[0] = keys[0] = out[0] = rows[0] = 0


@njit(inline="always")
def _set_rows(rows: Any, start: int, row_bytes: int, low: int, high: int) -> None:
    """The addresses of 16 rows; those before row `low` repeat it, those behind `high` that one."""
    for i in range(LANES):
        rows[i] = start + row_bytes * min(max(i, low), high)


@njit
def _turn_16(rows_at: int, keys: int, kind: int) -> None:
    """As `_turn`, of rows of 16 elements, which are too short to be read as a tile."""
    rows = longs_at(rows_at)
    if kind == BFLOAT16:
        pairs = ints_at(keys)
        for lane in range(LANES):
            row = ints_at(rows[lane])
            for p in range(LANES // 2):
                pairs[p * LANES + lane] = row[p]
        return
    floats, row = floats_at(keys), np.empty(LANES, np.float32)
    for lane in range(LANES):
        widen(rows[lane], address_of(row), LANES, kind)
        for e in range(LANES):
            floats[e * LANES + lane] = row[e]


@njit
def _turn(rows_at: int, keys: int, dim: int, kind: int) -> None:
    """Turn 16 rows of keys into columns: of pairs of bf16, or of float32."""
    if dim < TILE:
        _turn_16(rows_at, keys, kind)
        return
    for start in range(0, dim, TILE):
        column = min(start, dim - TILE)  # the last two may overlap
        if kind == BFLOAT16:
            read_pairs(rows_at, 2 * column, keys + 2 * LANES * column)
        else:
            read_tile(rows_at, column, keys + 4 * LANES * column, kind)


@njit(inline="always")
def _dot_pairs(keys: int, query: int, dim: int) -> Any:
    """A query of bf16 times 16 keys of pairs."""
    a = spread(np.float32(0))
    b, c, d = a, a, a
    for i in range(0, dim, 8):
        at = keys + 2 * LANES * i
        a = dot_pair(a, at, query + 2 * i)
        b = dot_pair(b, at + 4 * LANES, query + 2 * i + 4)
        c = dot_pair(c, at + 8 * LANES, query + 2 * i + 8)
        d = dot_pair(d, at + 12 * LANES, query + 2 * i + 12)
    return plus(plus(a, b), plus(c, d))


@njit(inline="always")
def _dot_floats(keys: int, query: int, dim: int) -> Any:
    """A query of float32 times 16 keys of float32."""
    a, factors = spread(np.float32(0)), floats_at(query)
    b, c, d = a, a, a
    for i in range(0, dim, 4):
        at = keys + 4 * LANES * i
        a = fma(spread(factors[i]), vector_at(at), a)
        b = fma(spread(factors[i + 1]), vector_at(at + 4 * LANES), b)
        c = fma(spread(factors[i + 2]), vector_at(at + 8 * LANES), c)
        d = fma(spread(factors[i + 3]), vector_at(at + 12 * LANES), d)
    return plus(plus(a, b), plus(c, d))


@njit(inline="always")
def _capped(score: Any, cap: Any) -> Any:
    """cap * tanh(score / cap), for 16 scores."""
    one = spread(np.float32(1))
    ratio = over(score, cap)
    below = plus(exp(plus(ratio, ratio)), one)
    return times(cap, minus(one, over(plus(one, one), below)))


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
    work: addresses of room for queries, for 16 keys, for what all tokens get, and for 16 addresses.
    """
    heads, kv_heads, dim, window = args.heads, args.kv_heads, args.head_dim, args.window
    kind, group, scale = args.kind, heads // kv_heads, spread(args.scale)
    size, softcap = size_of(kind), args.softcap
    queries, keys, out, rows_at = work
    rows, row_bytes, num_rows = longs_at(rows_at), size * dim, num_tokens * group
    # What the first token sees begins at `seen`; scores begin at a multiple of 16.
    seen, first, last = 0, 0, position + num_tokens - 1
    if window:
        seen = max(0, position - window + 1)
        first = seen // LANES * LANES
    padded = (last - first) // LANES * LANES + LANES
    first_query = args.query + size * (
        args.query_stride * token + args.head_stride * kv_head * group
    )
    token_bytes, head_bytes = size * args.query_stride, size * args.head_stride
    if kind != BFLOAT16:
        for row in range(num_rows):
            query = first_query + row // group * token_bytes + row % group * head_bytes
            widen(query, queries + 4 * dim * row, dim, kind)

    # 1. Scores, 16 positions side by side.
    for start in range(0, padded, LANES):
        at = args.keys + size * _cell(args, slot, kv_head, first + start)
        ahead = start + AHEAD
        if ahead < padded:
            coming = args.keys + size * _cell(args, slot, kv_head, first + ahead)
            fetch_ahead(coming, row_bytes * LANES)
        elif ahead < 2 * padded:
            coming = args.values + size * _cell(args, slot, kv_head, first + ahead - padded)
            fetch_ahead(coming, row_bytes * LANES)
        low, high = max(0, seen - first - start), min(LANES - 1, last - first - start)
        _set_rows(rows, at, row_bytes, low, high)
        _turn(rows_at, keys, dim, kind)
        for row in range(num_rows):
            if kind == BFLOAT16:
                query = first_query + row // group * token_bytes + row % group * head_bytes
                score = times(_dot_pairs(keys, query, dim), scale)
            else:
                score = times(_dot_floats(keys, queries + 4 * dim * row, dim), scale)
            if softcap:
                score = _capped(score, spread(softcap))
            put(score, scratch + 4 * (row * padded + start))

    # 2. Their softmax; what a token may not see gets no weight.
    for row in range(num_rows):
        own_stop = position + row // group + 1
        own_first = max(0, own_stop - window) if window else 0
        _softmax(scratch + 4 * row * padded, own_first - first, own_stop - first, padded)

    # 3. The values' weighted sum.
    for i in range(0, num_rows * dim, LANES):
        put(spread(np.float32(0)), out + 4 * i)
    for start in range(0, padded, LANES):
        at = args.values + size * _cell(args, slot, kv_head, first + start)
        if start + AHEAD < padded:
            coming = args.values + size * _cell(args, slot, kv_head, first + start + AHEAD)
            fetch_ahead(coming, row_bytes * LANES)
        low, high = max(0, seen - first - start), min(LANES - 1, last - first - start)
        _set_rows(rows, at, row_bytes, low, high)
        weights = scratch + 4 * start
        for column in range(0, dim, LANES):
            offset, target = size * column, out + 4 * column
            if kind == BFLOAT16:
                add_weighted_bf16(rows_at, offset, weights, 4 * padded, target, 4 * dim, num_rows)
            elif kind == FLOAT16:
                add_weighted_f16(rows_at, offset, weights, 4 * padded, target, 4 * dim, num_rows)
            else:
                add_weighted_f32(rows_at, offset, weights, 4 * padded, target, 4 * dim, num_rows)


@njit
def _softmax(scores: int, first: int, stop: int, padded: int) -> None:
    """Turn scores first..stop - 1 of `padded` into weights; the others get none."""
    weights = floats_at(scores)
    for i in range(first):
        weights[i] = weights[first]
    for i in range(stop, padded):
        weights[i] = weights[first]
    most = vector_at(scores)
    for start in range(LANES, padded, LANES):
        most = larger(most, vector_at(scores + 4 * start))
    largest = spread(largest_lane(most))
    for start in range(0, padded, LANES):
        put(exp(minus(vector_at(scores + 4 * start), largest)), scores + 4 * start)
    for i in range(first):
        weights[i] = 0
    for i in range(stop, padded):
        weights[i] = 0
    total = spread(np.float32(0))
    for start in range(0, padded, LANES):
        total = plus(total, vector_at(scores + 4 * start))
    share = spread(np.float32(1) / lane_sum(total))
    for start in range(0, padded, LANES):
        at = scores + 4 * start
        put(times(vector_at(at), share), at)


def _c_functions(sources: int) -> Any:
    def write(block: Any) -> None:
        if sources:
            _write(_write_block(block))

    return c_function(write)


write = _c_functions(kernel_sources())
