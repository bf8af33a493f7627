"""The CPU kernels, compiled by numba when first used and kept in its cache.

A kernel is a C function of one pointer, to a block of int64 arguments that `cpu_bypass.py` sets.
Every thread runs the same function; the block's first field is a counter from which the threads
draw pieces of work until none is left.

Lanes: up to 16 tokens are computed side by side, one per vector lane. A neuron reads column c of
all of them as one row of the transposed activations xT [d_in, 16], so the gather that the sparse
op is made of becomes an ordinary vector load. Rows of x, y and of each lane's values are turned
into that shape 32 x 16 elements at a time, in registers.

The vector type and its few operations are defined here rather than in a module of their own,
because numba's cache notices changes of this file only.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
TILE = 32  # elements of each lane that are turned at once
ROWS = 64  # neurons in one piece of work
ENTRIES = 4096  # weight entries in one piece of work
AHEAD = 256  # bytes of a lane's values between those that are used and those that are fetched

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # kinds of elements; sums are float32 for all

_I64 = ir.IntType(64)
_F32X16 = ir.VectorType(ir.FloatType(), LANES)
_F16X16 = ir.VectorType(ir.HalfType(), LANES)
_I32X16 = ir.VectorType(ir.IntType(32), LANES)
_I16X16 = ir.VectorType(ir.IntType(16), LANES)


# --- sixteen floats in one register ----------------------------------------------------------


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


_float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _F32X16)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _load(builder: Any, address: Any, vector: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, vector.as_pointer()))
    loaded.align = 2  # elements lie anywhere
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    store = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    store.align = 2


def _float_of(builder: Any, bits: Any, kind: int) -> Any:
    """<16 x float> of 16 elements of a 16-bit kind, each in the low half of an i32."""
    if kind == FLOAT16:
        halves = builder.bitcast(builder.trunc(bits, _I16X16), _F16X16)
        return builder.fpext(halves, _F32X16)
    return builder.bitcast(builder.shl(bits, _constant(_I32X16, 16)), _F32X16)


def _bits_of(builder: Any, value: Any, kind: int) -> Any:
    """The reverse, rounded to nearest, ties to even, as torch does."""
    if kind == FLOAT16:
        halves = builder.fptrunc(value, _F16X16)
        return builder.zext(builder.bitcast(halves, _I16X16), _I32X16)
    bits = builder.bitcast(value, _I32X16)
    half = _constant(_I32X16, 16)
    odd = builder.and_(builder.lshr(bits, half), _constant(_I32X16, 1))
    bits = builder.add(builder.add(bits, odd), _constant(_I32X16, 0x7FFF))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, _constant(_I32X16, 0x7FC0), builder.lshr(bits, half))


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors to the 16 columns they make: four rounds of perfect shuffles."""
    low = [lane for i in range(8) for lane in (i, LANES + i)]
    masks = [ir.Constant(_I32X16, [lane + half for lane in low]) for half in (0, 8)]
    for _ in range(4):
        rows = [
            builder.shuffle_vector(rows[i], rows[i + 8], mask) for i in range(8) for mask in masks
        ]
    return rows


def _row(builder: Any, rows: Any, lane: int, offset: Any) -> Any:
    """The address `offset` bytes into the lane's row; rows points to 16 addresses."""
    pointer = builder.inttoptr(rows, _I64.as_pointer())
    return builder.add(builder.load(builder.gep(pointer, [ir.Constant(_I64, lane)])), offset)


def _tile_reader(kind: int) -> Any:
    @intrinsic
    def read_tile(typing: Any, rows: Any, offset: Any, tile: Any) -> Any:
        """tile[e, lane] = element e behind rows[lane] + offset, for 32 elements e."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, tile = args

            def columns(first_byte: int, vector: Any) -> list[Any]:
                start = builder.add(offset, ir.Constant(_I64, first_byte))
                lanes = range(LANES)
                loaded = [_load(builder, _row(builder, rows, i, start), vector) for i in lanes]
                return _transposed(builder, loaded)

            if kind == FLOAT32:
                floats = columns(0, _F32X16) + columns(4 * LANES, _F32X16)
            else:  # two neighbours travel as one i32
                floats = []
                for pair in columns(0, _I32X16):
                    floats.append(_float_of(builder, pair, kind))
                    second = builder.lshr(pair, _constant(_I32X16, 16))
                    floats.append(_float_of(builder, second, kind))
            for e, column in enumerate(floats):
                _store(builder, column, builder.add(tile, ir.Constant(_I64, 4 * LANES * e)))
            return context.get_dummy_value()

        return types.none(types.intp, types.intp, types.intp), generate

    return read_tile


def _tile_writer(kind: int) -> Any:
    @intrinsic
    def write_tile(typing: Any, tile: Any, rows: Any, offset: Any) -> Any:
        """Element e behind rows[lane] + offset = tile[e, lane], for 32 elements e."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tile, rows, offset = args
            floats = [
                _load(builder, builder.add(tile, ir.Constant(_I64, 4 * LANES * e)), _F32X16)
                for e in range(TILE)
            ]
            if kind == FLOAT32:
                halves = [floats[:LANES], floats[LANES:]]
            else:
                pairs = []
                for first, second in zip(floats[::2], floats[1::2], strict=True):
                    high = _bits_of(builder, second, kind)
                    high = builder.shl(high, _constant(_I32X16, 16))
                    pairs.append(builder.or_(_bits_of(builder, first, kind), high))
                halves = [pairs]
            for number, half in enumerate(halves):
                start = builder.add(offset, ir.Constant(_I64, 4 * LANES * number))
                for lane, row in enumerate(_transposed(builder, half)):
                    _store(builder, row, _row(builder, rows, lane, start))
            return context.get_dummy_value()

        return types.none(types.intp, types.intp, types.intp), generate

    return write_tile


def _converter(kind: int, to_float: bool) -> Any:
    @intrinsic
    def convert_16(typing: Any, source: Any, target: Any) -> Any:
        """16 elements of a 16-bit kind to float32, or back."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if to_float:
                bits = builder.zext(_load(builder, args[0], _I16X16), _I32X16)
                value = _float_of(builder, bits, kind)
            else:
                bits = _bits_of(builder, _load(builder, args[0], _F32X16), kind)
                value = builder.trunc(bits, _I16X16)
            _store(builder, value, args[1])
            return context.get_dummy_value()

        return types.none(types.intp, types.intp), generate

    return convert_16


_read_tile_bf16, _read_tile_f16, _read_tile_f32 = map(_tile_reader, range(3))
_write_tile_bf16, _write_tile_f16, _write_tile_f32 = map(_tile_writer, range(3))
_widen_bf16, _widen_f16 = _converter(BFLOAT16, True), _converter(FLOAT16, True)
_narrow_bf16, _narrow_f16 = _converter(BFLOAT16, False), _converter(FLOAT16, False)


@intrinsic
def _prefetch(typing: Any, rows: Any, offset: Any) -> Any:
    """Begin to fetch the cache lines `offset` bytes into 16 rows: too many for the hardware's own
    prefetcher to follow."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(word, value) for value in (0, 3, 1))
        for lane in range(LANES):
            address = builder.inttoptr(_row(builder, args[0], lane, args[1]), byte)
            builder.call(prefetch, [address, read, keep, data])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), generate


@intrinsic
def _vector(typing: Any, address: Any) -> Any:
    """The 16 floats at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, args[0], _F32X16)

    return _float32x16(types.intp), generate


@intrinsic
def _put(typing: Any, value: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.none(_float32x16, types.intp), generate


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(_F32X16, [_F32X16] * 3)
        name = f"llvm.fma.v{LANES}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return _float32x16(_float32x16, _float32x16, _float32x16), generate


@intrinsic
def _address(typing: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(made.data, _I64)

    return types.intp(array), generate


def _pointer_to(element: Any, bits: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], bits.as_pointer())

        return types.CPointer(element)(types.intp), generate

    return pointer


_bytes = _pointer_to(types.uint8, ir.IntType(8))
_shorts = _pointer_to(types.uint16, ir.IntType(16))
_ints = _pointer_to(types.int32, ir.IntType(32))
_longs = _pointer_to(types.int64, _I64)
_floats = _pointer_to(types.float32, ir.FloatType())


@intrinsic
def _draw(typing: Any, counter: Any) -> Any:
    """The number of the next piece of work; no other thread gets it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")

    return types.intp(types.intp), generate


# --- elements of any kind --------------------------------------------------------------------


@njit(inline="always")
def _size(kind: int) -> int:
    return 4 if kind == FLOAT32 else 2


@njit
def _read_tile(rows: int, offset: int, tile: int, kind: int) -> None:
    if kind == BFLOAT16:
        _read_tile_bf16(rows, offset * 2, tile)
    elif kind == FLOAT16:
        _read_tile_f16(rows, offset * 2, tile)
    else:
        _read_tile_f32(rows, offset * 4, tile)


@njit
def _write_tile(tile: int, rows: int, offset: int, kind: int) -> None:
    if kind == BFLOAT16:
        _write_tile_bf16(tile, rows, offset * 2)
    elif kind == FLOAT16:
        _write_tile_f16(tile, rows, offset * 2)
    else:
        _write_tile_f32(tile, rows, offset * 4)


@njit
def _copy_bytes(source: int, target: int, count: int) -> None:
    a, b = _bytes(source), _bytes(target)
    for i in range(count):
        b[i] = a[i]


@njit
def _widen(source: int, target: int, count: int, kind: int) -> None:
    """count elements of a kind at `source` to float32 at `target`."""
    if kind == FLOAT32:
        _copy_bytes(source, target, 4 * count)
        return
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        if kind == BFLOAT16:
            _widen_bf16(source + 2 * i, target + 4 * i)
        else:
            _widen_f16(source + 2 * i, target + 4 * i)
    if whole < count:
        raw, floats = np.zeros(16, np.uint16), np.empty(16, np.float32)
        _copy_bytes(source + 2 * whole, _address(raw), 2 * (count - whole))
        if kind == BFLOAT16:
            _widen_bf16(_address(raw), _address(floats))
        else:
            _widen_f16(_address(raw), _address(floats))
        _copy_bytes(_address(floats), target + 4 * whole, 4 * (count - whole))
        raw[0] = floats[0] = 0  # numba frees an array after its last use: keep both until here


@njit
def _narrow(source: int, target: int, count: int, kind: int) -> None:
    """count float32 at `source`, rounded, to elements of a kind at `target`."""
    if kind == FLOAT32:
        _copy_bytes(source, target, 4 * count)
        return
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        if kind == BFLOAT16:
            _narrow_bf16(source + 4 * i, target + 2 * i)
        else:
            _narrow_f16(source + 4 * i, target + 2 * i)
    if whole < count:
        raw, floats = np.empty(16, np.uint16), np.zeros(16, np.float32)
        _copy_bytes(source + 4 * whole, _address(floats), 4 * (count - whole))
        if kind == BFLOAT16:
            _narrow_bf16(_address(floats), _address(raw))
        else:
            _narrow_f16(_address(floats), _address(raw))
        _copy_bytes(_address(raw), target + 2 * whole, 2 * (count - whole))
        raw[0] = floats[0] = 0


# --- bypass_add_ -----------------------------------------------------------------------------

# fields of the argument block of `bypass_add`; addresses, element counts and strides in elements
(COUNTER, KIND, Y, Y_STRIDE, X, X_STRIDE, D_OUT, D_IN, INDEX, INDEX_STRIDE, K) = range(11)
(BYPASS, SLOT_STRIDE, LANE_POSITIONS, LANE_SLOTS, NUM_LANES, MERGED_SLOT) = range(11, 17)
NUM_FIELDS = 17

_FEW = 4  # so many lanes and fewer are computed one by one


@njit
def _set_rows(args: Any, first: int, rows: Any, own: Any) -> None:
    """Where the rows of lanes first..first + 15 begin; a missing lane repeats the last one.

    rows: [3, 16] int64, addresses in y, x and the values.
    own: [16] float32, 0 for a lane on the base, which reads the merged slot's values, else 1.
    """
    size = _size(args[KIND])
    positions, slots = _longs(args[LANE_POSITIONS]), _longs(args[LANE_SLOTS])
    for i in range(LANES):
        lane = min(first + i, args[NUM_LANES] - 1)
        slot = slots[lane]
        rows[0, i] = args[Y] + positions[lane] * args[Y_STRIDE] * size
        rows[1, i] = args[X] + positions[lane] * args[X_STRIDE] * size
        own[i] = 0.0 if slot < 0 else 1.0
        if slot < 0:
            slot = args[MERGED_SLOT]
        rows[2, i] = args[BYPASS] + slot * args[SLOT_STRIDE] * size


@njit
def _transpose_x(args: Any, rows: Any, x_t: Any) -> None:
    """x_t [d_in, 16] float32 = x of the lanes."""
    kind, d_in = args[KIND], args[D_IN]
    whole = d_in // TILE * TILE
    for column in range(0, whole, TILE):
        _read_tile(_address(rows[1]), column, _address(x_t) + 4 * LANES * column, kind)
    if whole < d_in:
        row = np.empty(TILE, np.float32)
        for lane in range(LANES):
            _widen(rows[1, lane] + whole * _size(kind), _address(row), d_in - whole, kind)
            for i in range(d_in - whole):
                x_t[(whole + i) * LANES + lane] = row[i]


@njit
def _add_side_by_side(
    args: Any, rows: Any, own: Any, x_t: Any, tiles: Any, row: int, stop: int
) -> None:
    """Neurons row..stop - 1, a multiple of 32 of them, of 16 lanes."""
    kind, k, index_stride = args[KIND], args[K], args[INDEX_STRIDE]
    size = _size(kind)
    y_rows, value_rows, x_address = _address(rows[0]), _address(rows[2]), _address(x_t)
    sums, values = _address(tiles[0]), _address(tiles[1])
    index = _ints(args[INDEX])
    merged = args[BYPASS] + args[MERGED_SLOT] * args[SLOT_STRIDE] * _size(kind)
    for i in range(row, stop, TILE):
        _read_tile(y_rows, i, sums, kind)
        entry, e = i * k, TILE
        for r in range(TILE):
            total = _vector(sums + 4 * LANES * r)
            for j in range(k):
                if e == TILE:
                    _prefetch(value_rows, entry * size + AHEAD)
                    _read_tile(value_rows, entry, values, kind)
                    if args[MERGED_SLOT] >= 0:
                        less = tiles[2]
                        _widen(merged + entry * _size(kind), _address(less), TILE, kind)
                        for a in range(TILE):
                            for lane in range(LANES):
                                at = a * LANES + lane
                                tiles[1, at] = tiles[1, at] * own[lane] - less[a]
                    entry += TILE
                    e = 0
                column = np.int64(index[(i + r) * index_stride + j])
                x = _vector(x_address + 4 * LANES * column)
                total = _fma(_vector(values + 4 * LANES * e), x, total)
                e += 1
            _put(total, sums + 4 * LANES * r)
        _write_tile(sums, y_rows, i, kind)


@njit
def _add_one(
    args: Any, rows: Any, own: Any, x: Any, buffer: Any, lane: int, row: int, stop: int
) -> None:
    """Neurons row..stop - 1, at most ROWS of them, of one lane; x: [d_in] float32, its row."""
    kind, k, index_stride = args[KIND], args[K], args[INDEX_STRIDE]
    count, size = stop - row, _size(kind)
    y = _floats(_address(buffer))
    values = _floats(_address(buffer) + 4 * ROWS)
    index = _ints(args[INDEX])
    _widen(rows[0, lane] + row * size, _address(buffer), count, kind)
    offset, values_address = row * k * size, _address(buffer) + 4 * ROWS
    _widen(rows[2, lane] + offset, values_address, count * k, kind)
    if args[MERGED_SLOT] >= 0:
        less = _floats(values_address + 4 * ROWS * k)
        merged = args[BYPASS] + args[MERGED_SLOT] * args[SLOT_STRIDE] * size
        _widen(merged + offset, values_address + 4 * ROWS * k, count * k, kind)
        for e in range(count * k):
            values[e] = values[e] * own[lane] - less[e]
    if k == 1:  # without an inner loop the compiler does better
        for r in range(count):
            y[r] += values[r] * x[index[(row + r) * index_stride]]
    else:
        for r in range(count):
            total = y[r]
            for j in range(k):
                total += values[r * k + j] * x[index[(row + r) * index_stride + j]]
            y[r] = total
    _narrow(_address(buffer), rows[0, lane] + row * size, count, kind)


@njit
def _bypass_add(args: Any) -> None:
    d_out, d_in, k, num_lanes = args[D_OUT], args[D_IN], args[K], args[NUM_LANES]
    pieces = (d_out + ROWS - 1) // ROWS  # of the neurons
    blocks = num_lanes // LANES
    if num_lanes % LANES > _FEW:
        blocks += 1
    singles = max(num_lanes - blocks * LANES, 0)  # lanes that are in no block

    counter = _address(args)
    work = _draw(counter)
    if work >= (blocks + singles) * pieces:
        return
    rows, own = np.empty((3, LANES), np.int64), np.empty(LANES, np.float32)
    tiles = np.empty((3, TILE * LANES), np.float32)
    buffer = np.empty(ROWS * (1 + 2 * k), np.float32)
    x = np.empty(d_in * (LANES if blocks else 1), np.float32)
    ready = -1  # the block or single lane that rows, own and x are set for
    while work < (blocks + singles) * pieces:
        part = work // pieces
        row = work % pieces * ROWS
        stop = min(row + ROWS, d_out)
        if part < blocks:
            if part != ready:
                _set_rows(args, part * LANES, rows, own)
                _transpose_x(args, rows, x)
            whole = row + (stop - row) // TILE * TILE
            _add_side_by_side(args, rows, own, x, tiles, row, whole)
            for lane in range(min(LANES, num_lanes - part * LANES) if whole < stop else 0):
                column_of = np.empty(d_in, np.float32)
                for i in range(d_in):
                    column_of[i] = x[i * LANES + lane]
                _add_one(args, rows, own, column_of, buffer, lane, whole, stop)
        else:
            if part != ready:
                _set_rows(args, blocks * LANES + part - blocks, rows, own)
                _widen(rows[1, 0], _address(x), d_in, args[KIND])
            _add_one(args, rows, own, x, buffer, 0, row, stop)
        ready = part
        work = _draw(counter)
    tiles[0, 0] = buffer[0] = x[0] = 0.0  # numba frees an array after its last use in the code


# --- entries of a weight matrix --------------------------------------------------------------

# fields of the argument blocks of `add_entries` and `put_entries`; COUNTER and KIND as above
(WEIGHT, POSITIONS, VALUES, SAVED, NUM_ENTRIES) = range(2, 7)
NUM_ENTRY_FIELDS = 7


@njit
def _add_entries(args: Any) -> None:
    """saved = weight[positions]; weight[positions] = round(weight[positions] + values)"""
    kind, count, size = args[KIND], args[NUM_ENTRIES], _size(args[KIND])
    positions, weight = _longs(args[POSITIONS]), args[WEIGHT]
    shorts, saved_shorts = _shorts(weight), _shorts(args[SAVED])
    floats, saved_floats = _floats(weight), _floats(args[SAVED])
    counter = _address(args)
    own, values = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    raw = np.empty(2 * LANES, np.uint16)
    short, single = _shorts(_address(raw)), _floats(_address(raw))
    work = _draw(counter)
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
            _widen(_address(raw), _address(own), n, kind)
            _widen(args[VALUES] + first * size, _address(values), n, kind)
            for e in range(n):
                own[e] += values[e]
            _narrow(_address(own), _address(raw), n, kind)
            for e in range(n):
                position = positions[first + e]
                if kind == FLOAT32:
                    floats[position] = single[e]
                else:
                    shorts[position] = short[e]
        work = _draw(counter)
    own[0] = values[0] = raw[0] = 0


@njit
def _put_entries(args: Any) -> None:
    """weight[positions] = values"""
    kind, count = args[KIND], args[NUM_ENTRIES]
    positions = _longs(args[POSITIONS])
    shorts, values = _shorts(args[WEIGHT]), _shorts(args[VALUES])
    floats, float_values = _floats(args[WEIGHT]), _floats(args[VALUES])
    counter = _address(args)
    work = _draw(counter)
    while work * ENTRIES < count:
        for e in range(work * ENTRIES, min((work + 1) * ENTRIES, count)):
            if kind == FLOAT32:
                floats[positions[e]] = float_values[e]
            else:
                shorts[positions[e]] = values[e]
        work = _draw(counter)


# --- rms_norm --------------------------------------------------------------------------------

# fields of the argument block of `rms_norm`; COUNTER and KIND as above
(NORM_Y, NORM_X, NORM_WEIGHT, NORM_ROWS, NORM_WIDTH, NORM_EPS) = range(2, 8)
NUM_NORM_FIELDS = 8


@njit
def _rms_norm(args: Any) -> None:
    """y = weight * round(x / sqrt(mean(x * x) + eps)), row by row, both products rounded."""
    kind, width, size = args[KIND], args[NORM_WIDTH], _size(args[KIND])
    eps = _floats(args[NORM_EPS])[0]
    x, weight = np.zeros(width + LANES, np.float32), np.empty(width, np.float32)
    sums = np.empty(LANES, np.float32)
    _widen(args[NORM_WEIGHT], _address(weight), width, kind)
    counter = _address(args)
    row = _draw(counter)
    while row < args[NORM_ROWS]:
        source, target = args[NORM_X] + row * width * size, args[NORM_Y] + row * width * size
        _widen(source, _address(x), width, kind)
        sums[:] = 0
        total = _vector(_address(sums))
        for i in range(0, width, LANES):  # x has zeros behind its end
            part = _vector(_address(x) + 4 * i)
            total = _fma(part, part, total)
        _put(total, _address(sums))
        scale = np.float32(1) / np.sqrt(sums.sum() / np.float32(width) + eps)
        for i in range(width):
            x[i] *= scale
        _narrow(_address(x), target, width, kind)
        _widen(target, _address(x), width, kind)
        for i in range(width):
            x[i] *= weight[i]
        _narrow(_address(x), target, width, kind)
        row = _draw(counter)
    x[0] = weight[0] = sums[0] = 0


def _compiled(kernel: Any) -> Any:
    """A C function of a kernel's body, from numba's cache where one can be kept."""
    try:
        return cfunc("void(voidptr)", cache=True)(kernel)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return cfunc("void(voidptr)")(kernel)


def _bypass_add_block(block: Any) -> None:
    _bypass_add(carray(block, (NUM_FIELDS,), np.int64))


def _add_entries_block(block: Any) -> None:
    _add_entries(carray(block, (NUM_ENTRY_FIELDS,), np.int64))


def _put_entries_block(block: Any) -> None:
    _put_entries(carray(block, (NUM_ENTRY_FIELDS,), np.int64))


def _rms_norm_block(block: Any) -> None:
    _rms_norm(carray(block, (NUM_NORM_FIELDS,), np.int64))


bypass_add = _compiled(_bypass_add_block)
add_entries = _compiled(_add_entries_block)
put_entries = _compiled(_put_entries_block)
rms_norm = _compiled(_rms_norm_block)
