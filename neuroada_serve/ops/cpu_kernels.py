"""The CPU kernels, compiled by numba when first used and kept in its cache.

A kernel is a C function of one pointer, to a block of `cpu_blocks.py`. Every thread runs the same
function; the block's first field is a counter from which the threads draw pieces of work until none
is left.

Lanes: up to 16 tokens are computed side by side, one per vector lane. A neuron reads column c of
all of them as one row of the transposed activations xT [d_in, 16], so the gather that the sparse
op is made of becomes an ordinary vector load. Rows of x, y and of each lane's values are turned
into that shape 32 x 16 elements at a time, in registers.
"""

from typing import Any

import numpy as np
from numba import njit

from neuroada_serve.ops.cpu_blocks import (
    LANES,
    BypassBlock,
    EntriesBlock,
    LanesBlock,
    RmsNormBlock,
    TableBlock,
)
from neuroada_serve.ops.cpu_vectors import (
    FLOAT32,
    TILE,
    address_of,
    block_reader,
    c_function,
    draw,
    fetch,
    floats_at,
    fma,
    ints_at,
    kernel_sources,
    lane_sum,
    longs_at,
    narrow,
    plus,
    prefetch_rows,
    put,
    read_tile,
    shorts_at,
    size_of,
    spread,
    times,
    vector_at,
    widen,
    write_tile,
)

ROWS = 64  # neurons in one piece of work
ENTRIES = 4096  # weight entries in one piece of work
AHEAD = 256  # bytes of a lane's values between those that are used and those that are fetched


# --- bypass_add_ -----------------------------------------------------------------------------

table_at, lanes_at = block_reader(TableBlock), block_reader(LanesBlock)
_bypass_block, _entries_block = block_reader(BypassBlock), block_reader(EntriesBlock)
_rms_norm_block = block_reader(RmsNormBlock)


@njit
def _set_lanes(args: Any, table: Any, lanes: Any, first: int, rows: Any, own: Any) -> None:
    """Find where the rows of lanes first..first + 15 begin; a missing lane repeats the last one.

    rows: [3, 16] int64, addresses in y, x and the values.
    own: [16] float32, 0 for a lane on the base, which reads the merged slot's values, else 1.
    """
    positions, slots, size = longs_at(lanes.positions), longs_at(lanes.slots), size_of(table.kind)
    for i in range(LANES):
        lane = min(first + i, lanes.num_lanes - 1)
        slot = slots[lane]
        rows[0, i] = args.y + positions[lane] * args.y_stride * size
        rows[1, i] = args.x + positions[lane] * args.x_stride * size
        own[i] = 0.0 if slot < 0 else 1.0
        if slot < 0:
            slot = lanes.merged_slot
        rows[2, i] = table.bypass + slot * table.slot_stride * size


@njit
def transpose_x(rows: Any, d_in: int, kind: int, x_t: int) -> None:
    """x_t, address of [d_in, 16] float32 = x of the lanes."""
    whole = d_in // TILE * TILE
    for column in range(0, whole, TILE):
        read_tile(address_of(rows[1]), column, x_t + 4 * LANES * column, kind)
    if whole < d_in:
        turned, row = floats_at(x_t), np.empty(TILE, np.float32)
        for lane in range(LANES):
            widen(rows[1, lane] + whole * size_of(kind), address_of(row), d_in - whole, kind)
            for i in range(d_in - whole):
                turned[(whole + i) * LANES + lane] = row[i]


@njit
def fetch_values(table: Any, lanes: Any, row: int, stop: int) -> None:
    """Begin to fetch all lanes' values for neurons row..stop - 1, and the index."""
    k, size, slots = table.k, size_of(table.kind), longs_at(lanes.slots)
    fetch(table.index + 4 * row * table.index_stride, 4 * (stop - row) * table.index_stride)
    offset, size_bytes = row * k * size, (stop - row) * k * size
    for lane in range(lanes.num_lanes):
        if slots[lane] >= 0:
            fetch(table.bypass + slots[lane] * table.slot_stride * size + offset, size_bytes)
    if lanes.merged_slot >= 0:
        fetch(table.bypass + lanes.merged_slot * table.slot_stride * size + offset, size_bytes)


@njit
def _add_side_by_side(
    table: Any, merged_slot: int, rows: Any, own: Any, x_t: int, tiles: Any, row: int
) -> None:
    """tiles[0] [32, 16] += the bypass of neurons row..row + 31, for 16 lanes.

    tiles: [3, 512] float32; the other two are overwritten.
    """
    kind, k, index_stride = table.kind, table.k, table.index_stride
    size = size_of(kind)
    value_rows = address_of(rows[2])
    sums, values = address_of(tiles[0]), address_of(tiles[1])
    index = ints_at(table.index)
    merged = table.bypass + merged_slot * table.slot_stride * size
    entry, e = row * k, TILE
    for r in range(TILE):
        total = vector_at(sums + 4 * LANES * r)
        for j in range(k):
            if e == TILE:
                prefetch_rows(value_rows, entry * size + AHEAD)
                read_tile(value_rows, entry, values, kind)
                if merged_slot >= 0:
                    less = tiles[2]
                    widen(merged + entry * size, address_of(less), TILE, kind)
                    for a in range(TILE):
                        for lane in range(LANES):
                            at = a * LANES + lane
                            tiles[1, at] = tiles[1, at] * own[lane] - less[a]
                entry += TILE
                e = 0
            column = np.int64(index[(row + r) * index_stride + j])
            x = vector_at(x_t + 4 * LANES * column)
            # Rounded twice, as in `add_one`: a lane gets the same bits in either.
            total = plus(times(vector_at(values + 4 * LANES * e), x), total)
            e += 1
        put(total, sums + 4 * LANES * r)


@njit
def add_one(
    table: Any,
    merged_slot: int,
    y: int,
    values_row: int,
    own: float,
    x: int,
    buffer: int,
    row: int,
    stop: int,
) -> None:
    """y[: stop - row] += the bypass of neurons row..stop - 1 of one lane.

    y, x: addresses of float32; x: [d_in], the lane's row.
    values_row: address of the lane's values.
    buffer: address of float32, 2 * k per neuron; overwritten.
    """
    kind, k, index_stride = table.kind, table.k, table.index_stride
    count, size = stop - row, size_of(kind)
    totals, columns, values = floats_at(y), floats_at(x), floats_at(buffer)
    index = ints_at(table.index)
    offset = row * k * size
    widen(values_row + offset, buffer, count * k, kind)
    if merged_slot >= 0:
        less_address = buffer + 4 * count * k
        less = floats_at(less_address)
        merged = table.bypass + merged_slot * table.slot_stride * size
        widen(merged + offset, less_address, count * k, kind)
        for e in range(count * k):
            values[e] = values[e] * own - less[e]
    if k == 1:  # without an inner loop the compiler does better
        for r in range(count):
            totals[r] += values[r] * columns[index[(row + r) * index_stride]]
    else:
        for r in range(count):
            total = totals[r]
            for j in range(k):
                total += values[r * k + j] * columns[index[(row + r) * index_stride + j]]
            totals[r] = total


@njit
def _bypass_add(args: Any) -> None:
    table, lanes = table_at(args.table), lanes_at(args.lanes)
    kind, d_out, d_in = table.kind, table.d_out, args.d_in
    num_lanes, blocks, merged_slot = lanes.num_lanes, lanes.num_blocks, lanes.merged_slot
    size = size_of(kind)
    pieces = (d_out + ROWS - 1) // ROWS  # of the neurons
    singles = max(num_lanes - blocks * LANES, 0)  # lanes that are in no block

    counter = address_of(args)
    work = draw(counter)
    if work >= (blocks + singles) * pieces:
        return
    rows, own = np.empty((3, LANES), np.int64), np.empty(LANES, np.float32)
    tiles = np.empty((3, TILE * LANES), np.float32)
    y, buffer = np.empty(ROWS, np.float32), np.empty(ROWS * 2 * table.k, np.float32)
    x = np.empty(d_in * (LANES if blocks else 1), np.float32)
    column_of = np.empty(d_in, np.float32)
    ready = -1  # the block or single lane that rows, own and x are set for
    while work < (blocks + singles) * pieces:
        part = work // pieces
        row = work % pieces * ROWS
        stop = min(row + ROWS, d_out)
        if part != ready:
            first = part * LANES if part < blocks else blocks * LANES + part - blocks
            _set_lanes(args, table, lanes, first, rows, own)
            if part < blocks:
                transpose_x(rows, d_in, kind, address_of(x))
            else:
                widen(rows[1, 0], address_of(x), d_in, kind)
            ready = part
        num_alone = 1  # lanes whose neurons row..stop - 1 are computed alone
        if part < blocks:
            whole = row + (stop - row) // TILE * TILE
            for i in range(row, whole, TILE):
                read_tile(address_of(rows[0]), i, address_of(tiles), kind)
                _add_side_by_side(table, merged_slot, rows, own, address_of(x), tiles, i)
                write_tile(address_of(tiles), address_of(rows[0]), i, kind)
            row = whole
            num_alone = min(LANES, num_lanes - part * LANES) if row < stop else 0
        for lane in range(num_alone):
            lane_x = address_of(x)
            if part < blocks:
                for i in range(d_in):
                    column_of[i] = x[i * LANES + lane]
                lane_x = address_of(column_of)
            target = rows[0, lane] + row * size
            sums, work_at = address_of(y), address_of(buffer)
            widen(target, sums, stop - row, kind)
            values = rows[2, lane]
            add_one(table, merged_slot, sums, values, own[lane], lane_x, work_at, row, stop)
            narrow(sums, target, stop - row, kind)
        work = draw(counter)
    # numba frees an array after its last use in the code
    tiles[0, 0] = y[0] = buffer[0] = x[0] = column_of[0] = 0.0


# --- entries of a weight matrix --------------------------------------------------------------


@njit
def _add_entries(args: Any) -> None:
    """saved = weight[positions]; weight[positions] = round(weight[positions] + values)"""
    kind, count, size = args.kind, args.num_entries, size_of(args.kind)
    positions, weight = longs_at(args.positions), args.weight
    shorts, saved_shorts = shorts_at(weight), shorts_at(args.saved)
    floats, saved_floats = floats_at(weight), floats_at(args.saved)
    counter = address_of(args)
    own, values = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    raw = np.empty(2 * LANES, np.uint16)
    short, single = shorts_at(address_of(raw)), floats_at(address_of(raw))
    work = draw(counter)
    while work * ENTRIES < count:
        stop = min((work + 1) * ENTRIES, count)
        for first in range(work * ENTRIES, stop, LANES):
            n = min(LANES, stop - first)
            for e in range(n):
                position = positions[first + e]
                if kind == FLOAT32:
                    single[e] = saved_floats[first + e] = floats[position]
                else:
                    short[e] = saved_shorts[first + e] = shorts[position]
            widen(address_of(raw), address_of(own), n, kind)
            widen(args.values + first * size, address_of(values), n, kind)
            for e in range(n):
                own[e] += values[e]
            narrow(address_of(own), address_of(raw), n, kind)
            for e in range(n):
                position = positions[first + e]
                if kind == FLOAT32:
                    floats[position] = single[e]
                else:
                    shorts[position] = short[e]
        work = draw(counter)
    own[0] = values[0] = raw[0] = 0


@njit
def _put_entries(args: Any) -> None:
    """weight[positions] = values"""
    kind, count = args.kind, args.num_entries
    positions = longs_at(args.positions)
    shorts, values = shorts_at(args.weight), shorts_at(args.values)
    floats, float_values = floats_at(args.weight), floats_at(args.values)
    counter = address_of(args)
    work = draw(counter)
    while work * ENTRIES < count:
        for e in range(work * ENTRIES, min((work + 1) * ENTRIES, count)):
            if kind == FLOAT32:
                floats[positions[e]] = float_values[e]
            else:
                shorts[positions[e]] = values[e]
        work = draw(counter)


# --- rms_norm --------------------------------------------------------------------------------


@njit
def norm_row(
    source: int, target: int, weight: Any, width: int, eps: float, x: Any, kind: int
) -> None:
    """target = weight * round(row / sqrt(mean(row * row) + eps)), rounded.

    source, target: addresses of elements of the kind, may be the same.
    weight: [width] float32.
    x: [at least width + 16] float32, overwritten.
    """
    widen(source, address_of(x), width, kind)
    x[width : width + LANES] = 0
    total = spread(np.float32(0))
    for i in range(0, width, LANES):
        part = vector_at(address_of(x) + 4 * i)
        total = fma(part, part, total)
    scale = np.float32(1) / np.sqrt(lane_sum(total) / np.float32(width) + eps)
    for i in range(width):
        x[i] *= scale
    narrow(address_of(x), target, width, kind)
    widen(target, address_of(x), width, kind)
    for i in range(width):
        x[i] *= weight[i]
    narrow(address_of(x), target, width, kind)


@njit
def _rms_norm(args: Any) -> None:
    """y = weight * round(x / sqrt(mean(x * x) + eps)), row by row, both products rounded."""
    kind, width, size = args.kind, args.width, size_of(args.kind)
    eps = args.eps
    x, weight = np.empty(width + LANES, np.float32), np.empty(width, np.float32)
    widen(args.weight, address_of(weight), width, kind)
    counter = address_of(args)
    row = draw(counter)
    while row < args.rows:
        source, target = args.x + row * width * size, args.y + row * width * size
        norm_row(source, target, weight, width, eps, x, kind)
        row = draw(counter)
    x[0] = weight[0] = 0


def _c_functions(sources: int) -> tuple[Any, ...]:
    def bypass_add(block: Any) -> None:
        if sources:
            _bypass_add(_bypass_block(block))

    def add_entries(block: Any) -> None:
        if sources:
            _add_entries(_entries_block(block))

    def put_entries(block: Any) -> None:
        if sources:
            _put_entries(_entries_block(block))

    def rms_norm(block: Any) -> None:
        if sources:
            _rms_norm(_rms_norm_block(block))

    return tuple(map(c_function, (bypass_add, add_entries, put_entries, rms_norm)))


bypass_add, add_entries, put_entries, rms_norm = _c_functions(kernel_sources())
