"""The CPU kernels, compiled by numba when first used and kept in its cache.

A kernel is a C function of one pointer, to a block of int64 arguments that `cpu_bypass.py` sets.
Every thread runs the same function; the block's first field is a counter from which the threads
draw pieces of work until none is left.

Lanes: up to 16 tokens are computed side by side, one per vector lane. A neuron reads column c of
all of them as one row of the transposed activations xT [d_in, 16], so the gather that the sparse
op is made of becomes an ordinary vector load. Rows of x, y and of each lane's values are turned
into that shape 32 x 16 elements at a time, in registers.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from neuroada_serve.ops.cpu_vectors import (
    FLOAT32,
    LANES,
    TILE,
    address_of,
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

# fields of the argument block of `bypass_add`; addresses, element counts and strides in elements
(COUNTER, KIND, Y, Y_STRIDE, X, X_STRIDE, D_OUT, D_IN, INDEX, INDEX_STRIDE, K) = range(11)
(BYPASS, SLOT_STRIDE, LANES_AT) = range(11, 14)
NUM_FIELDS = 14
# fields behind LANES_AT: what many tables have in common in one forward
(LANE_POSITIONS, LANE_SLOTS, NUM_LANES, NUM_BLOCKS, MERGED_SLOT) = range(5)
NUM_LANE_FIELDS = 5


@njit
def set_lanes(
    args: Any, first: int, y: int, y_bytes: int, x: int, x_bytes: int, rows: Any, own: Any
) -> None:
    """Where the rows of lanes first..first + 15 begin; a missing lane repeats the last one.

    y, x: addresses; y_bytes, x_bytes: from one row to the next.
    rows: [3, 16] int64, addresses in y, x and the values.
    own: [16] float32, 0 for a lane on the base, which reads the merged slot's values, else 1.
    """
    lanes = longs_at(args[LANES_AT])
    positions, slots = longs_at(lanes[LANE_POSITIONS]), longs_at(lanes[LANE_SLOTS])
    for i in range(LANES):
        lane = min(first + i, lanes[NUM_LANES] - 1)
        slot = slots[lane]
        rows[0, i] = y + positions[lane] * y_bytes
        rows[1, i] = x + positions[lane] * x_bytes
        own[i] = 0.0 if slot < 0 else 1.0
        if slot < 0:
            slot = lanes[MERGED_SLOT]
        rows[2, i] = args[BYPASS] + slot * args[SLOT_STRIDE] * size_of(args[KIND])


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
def fetch_values(args: Any, row: int, stop: int) -> None:
    """Begin to fetch what all lanes have for neurons row..stop - 1, and the index."""
    lanes, k, size = longs_at(args[LANES_AT]), args[K], size_of(args[KIND])
    slots = longs_at(lanes[LANE_SLOTS])
    fetch(args[INDEX] + 4 * row * args[INDEX_STRIDE], 4 * (stop - row) * args[INDEX_STRIDE])
    offset, size_bytes = row * k * size, (stop - row) * k * size
    for lane in range(lanes[NUM_LANES]):
        if slots[lane] >= 0:
            fetch(args[BYPASS] + slots[lane] * args[SLOT_STRIDE] * size + offset, size_bytes)
    if lanes[MERGED_SLOT] >= 0:
        fetch(args[BYPASS] + lanes[MERGED_SLOT] * args[SLOT_STRIDE] * size + offset, size_bytes)


@njit
def add_side_by_side(args: Any, rows: Any, own: Any, x_t: int, tiles: Any, row: int) -> None:
    """tiles[0] [32, 16] += the bypass of neurons row..row + 31, for 16 lanes.

    tiles: [3, 512] float32; the other two are overwritten.
    """
    kind, k, index_stride = args[KIND], args[K], args[INDEX_STRIDE]
    size = size_of(kind)
    value_rows = address_of(rows[2])
    sums, values = address_of(tiles[0]), address_of(tiles[1])
    index = ints_at(args[INDEX])
    merged_slot = longs_at(args[LANES_AT])[MERGED_SLOT]
    merged = args[BYPASS] + merged_slot * args[SLOT_STRIDE] * size
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
    args: Any, y: int, values_row: int, own: float, x: int, buffer: int, row: int, stop: int
) -> None:
    """y[: stop - row] += the bypass of neurons row..stop - 1 of one lane.

    y, x: addresses of float32; x: [d_in], the lane's row.
    values_row: address of the lane's values.
    buffer: address of float32, 2 * k per neuron; overwritten.
    """
    kind, k, index_stride = args[KIND], args[K], args[INDEX_STRIDE]
    count, size = stop - row, size_of(kind)
    totals, columns, values = floats_at(y), floats_at(x), floats_at(buffer)
    index = ints_at(args[INDEX])
    merged_slot = longs_at(args[LANES_AT])[MERGED_SLOT]
    offset = row * k * size
    widen(values_row + offset, buffer, count * k, kind)
    if merged_slot >= 0:
        less_address = buffer + 4 * count * k
        less = floats_at(less_address)
        merged = args[BYPASS] + merged_slot * args[SLOT_STRIDE] * size
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
    kind, d_out, d_in = args[KIND], args[D_OUT], args[D_IN]
    lanes = longs_at(args[LANES_AT])
    num_lanes, blocks = lanes[NUM_LANES], lanes[NUM_BLOCKS]
    size = size_of(kind)
    pieces = (d_out + ROWS - 1) // ROWS  # of the neurons
    singles = max(num_lanes - blocks * LANES, 0)  # lanes that are in no block

    counter = address_of(args)
    work = draw(counter)
    if work >= (blocks + singles) * pieces:
        return
    rows, own = np.empty((3, LANES), np.int64), np.empty(LANES, np.float32)
    tiles = np.empty((3, TILE * LANES), np.float32)
    y, buffer = np.empty(ROWS, np.float32), np.empty(ROWS * 2 * args[K], np.float32)
    x = np.empty(d_in * (LANES if blocks else 1), np.float32)
    column_of = np.empty(d_in, np.float32)
    ready = -1  # the block or single lane that rows, own and x are set for
    while work < (blocks + singles) * pieces:
        part = work // pieces
        row = work % pieces * ROWS
        stop = min(row + ROWS, d_out)
        if part != ready:
            first = part * LANES if part < blocks else blocks * LANES + part - blocks
            y_bytes, x_bytes = args[Y_STRIDE] * size, args[X_STRIDE] * size
            set_lanes(args, first, args[Y], y_bytes, args[X], x_bytes, rows, own)
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
                add_side_by_side(args, rows, own, address_of(x), tiles, i)
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
            widen(target, address_of(y), stop - row, kind)
            add_one(
                args, address_of(y), rows[2, lane], own[lane], lane_x, address_of(buffer), row, stop
            )
            narrow(address_of(y), target, stop - row, kind)
        work = draw(counter)
    # numba frees an array after its last use in the code
    tiles[0, 0] = y[0] = buffer[0] = x[0] = column_of[0] = 0.0


# --- entries of a weight matrix --------------------------------------------------------------

# fields of the argument blocks of `add_entries` and `put_entries`; COUNTER and KIND as above
(WEIGHT, POSITIONS, VALUES, SAVED, NUM_ENTRIES) = range(2, 7)
NUM_ENTRY_FIELDS = 7


@njit
def _add_entries(args: Any) -> None:
    """saved = weight[positions]; weight[positions] = round(weight[positions] + values)"""
    kind, count, size = args[KIND], args[NUM_ENTRIES], size_of(args[KIND])
    positions, weight = longs_at(args[POSITIONS]), args[WEIGHT]
    shorts, saved_shorts = shorts_at(weight), shorts_at(args[SAVED])
    floats, saved_floats = floats_at(weight), floats_at(args[SAVED])
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
            widen(args[VALUES] + first * size, address_of(values), n, kind)
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
    kind, count = args[KIND], args[NUM_ENTRIES]
    positions = longs_at(args[POSITIONS])
    shorts, values = shorts_at(args[WEIGHT]), shorts_at(args[VALUES])
    floats, float_values = floats_at(args[WEIGHT]), floats_at(args[VALUES])
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

# fields of the argument block of `rms_norm`; COUNTER and KIND as above
(NORM_Y, NORM_X, NORM_WEIGHT, NORM_ROWS, NORM_WIDTH, NORM_EPS) = range(2, 8)
NUM_NORM_FIELDS = 8


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
    kind, width, size = args[KIND], args[NORM_WIDTH], size_of(args[KIND])
    eps = floats_at(args[NORM_EPS])[0]
    x, weight = np.empty(width + LANES, np.float32), np.empty(width, np.float32)
    widen(args[NORM_WEIGHT], address_of(weight), width, kind)
    counter = address_of(args)
    row = draw(counter)
    while row < args[NORM_ROWS]:
        source, target = args[NORM_X] + row * width * size, args[NORM_Y] + row * width * size
        norm_row(source, target, weight, width, eps, x, kind)
        row = draw(counter)
    x[0] = weight[0] = 0


def _c_functions(sources: int) -> tuple[Any, ...]:
    def bypass_add(block: Any) -> None:
        if sources:
            _bypass_add(carray(block, (NUM_FIELDS,), np.int64))

    def add_entries(block: Any) -> None:
        if sources:
            _add_entries(carray(block, (NUM_ENTRY_FIELDS,), np.int64))

    def put_entries(block: Any) -> None:
        if sources:
            _put_entries(carray(block, (NUM_ENTRY_FIELDS,), np.int64))

    def rms_norm(block: Any) -> None:
        if sources:
            _rms_norm(carray(block, (NUM_NORM_FIELDS,), np.int64))

    return tuple(map(c_function, (bypass_add, add_entries, put_entries, rms_norm)))


bypass_add, add_entries, put_entries, rms_norm = _c_functions(kernel_sources())
