"""Sixteen floats at a time, for kernels that numba compiles: the vector type, loads and stores of
bf16, float16 and float32 elements, addresses, and the counter that threads draw their work from.

numba's cache notices changes of a kernel's own file only; `c_function` makes it notice this one and
the others that kernels are made of.
"""

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np.numpy_support import from_dtype

from neuroada_serve.ops.cpu_blocks import KINDS, LANES

TILE = 32  # elements of each lane that are turned at once
LINE = 64  # bytes of a cache line

BFLOAT16, FLOAT16, FLOAT32 = KINDS.values()  # kinds of elements; sums are float32 for all

I64 = ir.IntType(64)
F32X16 = ir.VectorType(ir.FloatType(), LANES)
I32X16 = ir.VectorType(ir.IntType(32), LANES)
I32X32 = ir.VectorType(ir.IntType(32), 2 * LANES)
_F16X16 = ir.VectorType(ir.HalfType(), LANES)
_I16X16 = ir.VectorType(ir.IntType(16), LANES)


def kernel_sources() -> int:
    """Digest the kernels' source to a number.

    A kernel that has it in its closure is compiled anew then: numba's own cache compares closures,
    but looks at no file except the kernel's.
    """
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("cpu_*.py")))
    return int.from_bytes(hashlib.sha256(text).digest()[:6])


def c_function(kernel: Callable[[Any], None]) -> Any:
    """Compile a C function of one pointer, kept in numba's cache where there can be one."""
    try:
        return cfunc("void(voidptr)", cache=True)(kernel)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return cfunc("void(voidptr)")(kernel)


def has_feature(name: str) -> bool:
    """Tell if this processor has the instructions of this name in LLVM."""
    return bool(binding.get_host_cpu_features().get(name))


# --- sixteen floats, in as many registers as they take ---------------------------------------


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, F32X16)


def constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * LANES)


def load(builder: Any, address: Any, vector: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, vector.as_pointer()))
    loaded.align = 2  # elements lie anywhere
    return loaded


def store(builder: Any, value: Any, address: Any) -> None:
    store = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    store.align = 2


def _float_of(builder: Any, bits: Any, kind: int) -> Any:
    """<16 x float> of 16 elements of a 16-bit kind, each in the low half of an i32."""
    if kind == FLOAT16:
        halves = builder.bitcast(builder.trunc(bits, _I16X16), _F16X16)
        return builder.fpext(halves, F32X16)
    return builder.bitcast(builder.shl(bits, constant(I32X16, 16)), F32X16)


def _bits_of(builder: Any, value: Any, kind: int) -> Any:
    """Bits of 16 floats as a 16-bit kind, rounded to nearest, ties to even, as torch does."""
    if kind == FLOAT16:
        halves = builder.fptrunc(value, _F16X16)
        return builder.zext(builder.bitcast(halves, _I16X16), I32X16)
    bits = builder.bitcast(value, I32X16)
    half = constant(I32X16, 16)
    odd = builder.and_(builder.lshr(bits, half), constant(I32X16, 1))
    bits = builder.add(builder.add(bits, odd), constant(I32X16, 0x7FFF))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, constant(I32X16, 0x7FC0), builder.lshr(bits, half))


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors to the 16 columns they make: four rounds of perfect shuffles."""
    low = [lane for i in range(8) for lane in (i, LANES + i)]
    masks = [ir.Constant(I32X16, [lane + half for lane in low]) for half in (0, 8)]
    for _ in range(4):
        rows = [
            builder.shuffle_vector(rows[i], rows[i + 8], mask) for i in range(8) for mask in masks
        ]
    return rows


def _row(builder: Any, rows: Any, lane: int, offset: Any) -> Any:
    """The address `offset` bytes into the lane's row; rows points to 16 addresses."""
    pointer = builder.inttoptr(rows, I64.as_pointer())
    return builder.add(builder.load(builder.gep(pointer, [ir.Constant(I64, lane)])), offset)


def _tile_reader(kind: int) -> Any:
    @intrinsic
    def read_tile(typing: Any, rows: Any, offset: Any, tile: Any) -> Any:
        """tile[e, lane] = element e behind rows[lane] + offset, for 32 elements e."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, tile = args

            def columns(first_byte: int, vector: Any) -> list[Any]:
                start = builder.add(offset, ir.Constant(I64, first_byte))
                lanes = range(LANES)
                loaded = [load(builder, _row(builder, rows, i, start), vector) for i in lanes]
                return _transposed(builder, loaded)

            if kind == FLOAT32:
                floats = columns(0, F32X16) + columns(4 * LANES, F32X16)
            else:  # two neighbours travel as one i32
                floats = []
                for pair in columns(0, I32X16):
                    floats.append(_float_of(builder, pair, kind))
                    second = builder.lshr(pair, constant(I32X16, 16))
                    floats.append(_float_of(builder, second, kind))
            for e, column in enumerate(floats):
                store(builder, column, builder.add(tile, ir.Constant(I64, 4 * LANES * e)))
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
                load(builder, builder.add(tile, ir.Constant(I64, 4 * LANES * e)), F32X16)
                for e in range(TILE)
            ]
            if kind == FLOAT32:
                halves = [floats[:LANES], floats[LANES:]]
            else:
                pairs = []
                for first, second in zip(floats[::2], floats[1::2], strict=True):
                    high = _bits_of(builder, second, kind)
                    high = builder.shl(high, constant(I32X16, 16))
                    pairs.append(builder.or_(_bits_of(builder, first, kind), high))
                halves = [pairs]
            for number, half in enumerate(halves):
                start = builder.add(offset, ir.Constant(I64, 4 * LANES * number))
                for lane, row in enumerate(_transposed(builder, half)):
                    store(builder, row, _row(builder, rows, lane, start))
            return context.get_dummy_value()

        return types.none(types.intp, types.intp, types.intp), generate

    return write_tile


def _multiply_add(builder: Any, args: Any) -> Any:
    function = ir.FunctionType(F32X16, [F32X16] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


@intrinsic
def read_pairs(typing: Any, rows: Any, offset: Any, pairs: Any) -> Any:
    """pairs[p, lane] = elements 2p and 2p + 1 behind rows[lane] + offset, for 16 pairs of 16-bit
    elements."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, offset, pairs = args
        loaded = [_load_row(builder, rows, lane, offset) for lane in range(LANES)]
        for p, pair in enumerate(_transposed(builder, loaded)):
            store(builder, pair, builder.add(pairs, ir.Constant(I64, 4 * LANES * p)))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), generate


@intrinsic
def read_twice(typing: Any, rows: Any, offset: Any, doubled: Any) -> Any:
    """doubled[e, lane] = element e behind rows[lane] + offset and the same again, for 32 16-bit
    elements e: what `dot_rows` multiplies pairs by."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, offset, doubled = args
        half, low = constant(I32X16, 16), constant(I32X16, 0xFFFF)
        loaded = [_load_row(builder, rows, lane, offset) for lane in range(LANES)]
        for p, pair in enumerate(_transposed(builder, loaded)):
            first = builder.or_(builder.shl(pair, half), builder.and_(pair, low))
            second = builder.or_(
                builder.and_(pair, constant(I32X16, 0xFFFF0000)), builder.lshr(pair, half)
            )
            for e, both in ((2 * p, first), (2 * p + 1, second)):
                store(builder, both, builder.add(doubled, ir.Constant(I64, 4 * LANES * e)))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), generate


def _load_row(builder: Any, rows: Any, lane: int, offset: Any) -> Any:
    return load(builder, _row(builder, rows, lane, offset), I32X16)


@intrinsic
def add_to_rows(typing: Any, tile: Any, rows: Any, offset: Any) -> Any:
    """Element e behind rows[lane] + offset += tile[e, lane], for 32 float32 elements e."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, rows, offset = args
        for first in (0, LANES):
            places = [ir.Constant(I64, 4 * LANES * (first + e)) for e in range(LANES)]
            columns = [load(builder, builder.add(tile, place), F32X16) for place in places]
            start = builder.add(offset, ir.Constant(I64, 4 * first))
            for lane, added in enumerate(_transposed(builder, columns)):
                address = _row(builder, rows, lane, start)
                store(builder, builder.fadd(load(builder, address, F32X16), added), address)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), generate


@dataclass(frozen=True)
class PairStep:
    """One step of the product of pairs of bf16, each pair in an i32.

    take: (builder, <16 x i32> of pairs) -> the factor it multiplies.
    add: (builder, total, factor, factor) -> <16 x float>.
    """

    take: Callable[[Any, Any], Any]
    add: Callable[[Any, Any, Any, Any], Any]


def pair_steps() -> list[PairStep]:
    """Steps that add both products of pairs, one after the other: one where the processor has an
    instruction for it, else one for the first and one for the second of a pair."""

    def dot(builder: Any, total: Any, a: Any, b: Any) -> Any:
        function = ir.FunctionType(F32X16, [F32X16, I32X16, I32X16])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, function, name), [total, a, b]
        )

    def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
        return _multiply_add(builder, [a, b, total])

    def first(builder: Any, pairs: Any) -> Any:
        return builder.bitcast(builder.shl(pairs, constant(I32X16, 16)), F32X16)

    def second(builder: Any, pairs: Any) -> Any:
        return builder.bitcast(builder.and_(pairs, constant(I32X16, 0xFFFF0000)), F32X16)

    if has_feature("avx512bf16"):
        return [PairStep(lambda builder, pairs: pairs, dot)]
    return [PairStep(first, multiply_add), PairStep(second, multiply_add)]


def add_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + both products of 16 pairs of bf16, each pair in an i32."""
    for step in pair_steps():
        total = step.add(builder, total, step.take(builder, a), step.take(builder, b))
    return total


def concealed(builder: Any, number: Any) -> Any:
    """Conceal a number from the compiler, which then loads again what lies at that address."""
    return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [number], False)


@intrinsic
def dot_rows(typing: Any, total: Any, pairs: Any, first: Any, second: Any) -> Any:
    """total[lane] + the products of a pair at `pairs` with the doubled elements at `first` and at
    `second`; all bf16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, pairs, first, second = args
        kind = ir.VectorType(ir.IntType(16), 2 * LANES)
        rows = [load(builder, address, kind) for address in (first, second)]
        mask = ir.Constant(I32X32, [e if e % 2 == 0 else 2 * LANES + e for e in range(2 * LANES)])
        both = builder.bitcast(builder.shuffle_vector(*rows, mask), I32X16)
        return add_products(builder, total, load(builder, pairs, I32X16), both)

    return float32x16(float32x16, types.intp, types.intp, types.intp), generate


@intrinsic
def dot_pair(typing: Any, total: Any, pairs: Any, pair: Any) -> Any:
    """total[lane] + both products of a pair per lane at `pairs` with the one pair at `pair`; all
    bf16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, pairs, pair = args
        same = same_in_all(builder, load(builder, pair, ir.IntType(32)))
        return add_products(builder, total, load(builder, pairs, I32X16), same)

    return float32x16(float32x16, types.intp, types.intp), generate


def same_in_all(builder: Any, bits: Any) -> Any:
    """<16 x i32> of one i32."""
    undefined = ir.Constant(I32X16, ir.Undefined)
    alone = builder.insert_element(undefined, bits, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(alone, undefined, constant(I32X16, 0))


def _dot_one(keep: int) -> Any:
    @intrinsic
    def dot_one(typing: Any, total: Any, pairs: Any, row: Any) -> Any:
        """total[lane] + the product of one of a pair with the doubled element at `row`."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            total, pairs, row = args
            one = builder.and_(load(builder, pairs, I32X16), constant(I32X16, keep))
            return add_products(builder, total, one, load(builder, row, I32X16))

        return float32x16(float32x16, types.intp, types.intp), generate

    return dot_one


dot_first, dot_second = _dot_one(0x0000FFFF), _dot_one(0xFFFF0000)


def _converter(kind: int, to_float: bool) -> Any:
    @intrinsic
    def convert_16(typing: Any, source: Any, target: Any) -> Any:
        """16 elements of a 16-bit kind to float32, or back."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if to_float:
                bits = builder.zext(load(builder, args[0], _I16X16), I32X16)
                value = _float_of(builder, bits, kind)
            else:
                bits = _bits_of(builder, load(builder, args[0], F32X16), kind)
                value = builder.trunc(bits, _I16X16)
            store(builder, value, args[1])
            return context.get_dummy_value()

        return types.none(types.intp, types.intp), generate

    return convert_16


def _weighted_adder(kind: int) -> Any:
    @intrinsic
    def add_weighted(
        typing: Any,
        rows: Any,
        offset: Any,
        weights: Any,
        weight_stride: Any,
        sums: Any,
        sum_stride: Any,
        num_sums: Any,
    ) -> Any:
        """sums[s] += weights[s, r] * the 16 elements behind rows[r] + offset, for 16 rows r.

        Strides are in bytes. num_sums: at least 1.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, weights, weight_stride, sums, sum_stride, num_sums = args
            values = []
            for lane in range(LANES):
                address = _row(builder, rows, lane, offset)
                if kind == FLOAT32:
                    values.append(load(builder, address, F32X16))
                else:
                    bits = builder.zext(load(builder, address, _I16X16), I32X16)
                    values.append(_float_of(builder, bits, kind))
            before = builder.block
            loop = builder.append_basic_block("sums")
            done = builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            number = builder.phi(I64)
            own = builder.add(weights, builder.mul(number, weight_stride))
            target = builder.add(sums, builder.mul(number, sum_stride))
            total = load(builder, target, F32X16)
            for lane, value in enumerate(values):
                address = builder.add(own, ir.Constant(I64, 4 * lane))
                weight = same_in_all(builder, load(builder, address, ir.IntType(32)))
                weight = builder.bitcast(weight, F32X16)
                total = _multiply_add(builder, [weight, value, total])
            store(builder, total, target)
            following = builder.add(number, ir.Constant(I64, 1))
            number.add_incoming(ir.Constant(I64, 0), before)
            number.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, num_sums), loop, done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.none(*[types.intp] * 7), generate

    return add_weighted


add_weighted_bf16, add_weighted_f16, add_weighted_f32 = map(_weighted_adder, range(3))


_read_tile_bf16, _read_tile_f16, _read_tile_f32 = map(_tile_reader, range(3))
_write_tile_bf16, _write_tile_f16, _write_tile_f32 = map(_tile_writer, range(3))
_widen_bf16, _widen_f16 = _converter(BFLOAT16, True), _converter(FLOAT16, True)
_narrow_bf16, _narrow_f16 = _converter(BFLOAT16, False), _converter(FLOAT16, False)


def prefetch(builder: Any, address: Any, level: int = 1) -> None:
    """Begin to fetch the cache line at an address, to this level of the cache."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    begin = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(word, value) for value in (0, 4 - level, 1))
    builder.call(begin, [builder.inttoptr(address, byte), read, keep, data])


@intrinsic
def prefetch_rows(typing: Any, rows: Any, offset: Any) -> Any:
    """Begin to fetch the cache lines `offset` bytes into 16 rows: too many for the hardware's own
    prefetcher to follow."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for lane in range(LANES):
            prefetch(builder, _row(builder, args[0], lane, args[1]))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), generate


def _fetcher(level: int) -> Any:
    @intrinsic
    def prefetch_line(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            prefetch(builder, args[0], level)
            return context.get_dummy_value()

        return types.none(types.intp), generate

    @njit
    def fetch(address: int, size_bytes: int) -> None:
        """Begin to fetch the cache lines of a stretch of memory."""
        for line in range(address // LINE * LINE, address + size_bytes, LINE):
            prefetch_line(line)

    return fetch


# What is needed at once, and what is needed later: it would drive the first out of a small cache.
fetch, fetch_ahead = _fetcher(1), _fetcher(2)


@intrinsic
def vector_at(typing: Any, address: Any) -> Any:
    """The 16 floats at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], F32X16)

    return float32x16(types.intp), generate


@intrinsic
def put(typing: Any, value: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.none(float32x16, types.intp), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _multiply_add(builder, args)

    return float32x16(float32x16, float32x16, float32x16), generate


def _arithmetic(operation: str) -> Any:
    @intrinsic
    def arithmetic(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(*args)

        return float32x16(float32x16, float32x16), generate

    return arithmetic


plus, minus, times, over = map(_arithmetic, ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two, element by element; b where one is not a number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return float32x16(float32x16, float32x16), generate


@intrinsic
def spread(typing: Any, value: Any) -> Any:
    """One float32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = ir.Constant(ir.IntType(32), 0)
        undefined = ir.Constant(F32X16, ir.Undefined)
        alone = builder.insert_element(undefined, args[0], first)
        return builder.shuffle_vector(alone, undefined, constant(I32X16, 0))

    return float32x16(types.float32), generate


@intrinsic
def _lane(typing: Any, vector: Any, lane: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(*args)

    return types.float32(float32x16, types.intp), generate


@njit
def lane_sum(vector: Any) -> Any:
    """The sum of all lanes, a float32."""
    even, odd = np.float32(0), np.float32(0)
    for lane in range(0, LANES, 2):
        even += _lane(vector, lane)
        odd += _lane(vector, lane + 1)
    return even + odd


@intrinsic
def reduced(typing: Any, vector: Any) -> Any:
    """The sum of all lanes, a float32, in an order that the processor likes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, lanes = args[0], LANES
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(places))
                )
                for places in (range(lanes), range(lanes, 2 * lanes))
            ]
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(float32x16), generate


@njit
def largest_lane(vector: Any) -> Any:
    """The largest of all lanes, a float32."""
    most = _lane(vector, 0)
    for lane in range(1, LANES):
        most = max(most, _lane(vector, lane))
    return most


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e to the x, to two units in the last place; beyond the range of float32 its ends.

    Source: Cephes, expf: x = n ln 2 + r, a polynomial for e to the r, n as the exponent.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def number(value: float) -> Any:
            return constant(F32X16, value)

        def multiply_add(a: Any, b: Any, c: Any) -> Any:
            return _multiply_add(builder, [a, b, c])

        x = args[0]  # comparisons are false for what is not a number, which so stays what it is
        for relation, end in (("<", number(-87.3)), (">", number(88.3))):
            x = builder.select(builder.fcmp_ordered(relation, x, end), end, x)
        shift = 12582912.0  # 1.5 * 2**23: adding it rounds to a whole number, in the low bits
        shifted = multiply_add(x, number(1.44269504088896341), number(shift))
        n = builder.fsub(shifted, number(shift))
        r = multiply_add(n, number(-0.693359375), x)
        r = multiply_add(n, number(2.12194440e-4), r)
        total = number(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
            1.0,
            1.0,
        ):
            total = multiply_add(total, r, number(coefficient))
        bits = builder.bitcast(shifted, I32X16)
        exponent = builder.sub(bits, constant(I32X16, 0x4B400000 - 127))
        power = builder.bitcast(builder.shl(exponent, constant(I32X16, 23)), F32X16)
        return builder.fmul(total, power)

    return float32x16(float32x16), generate


def block_reader(structure: type[ctypes.Structure]) -> Any:
    """A function that takes an address for that of a C structure, whose fields are attributes."""
    record = from_dtype(np.dtype(structure))

    @intrinsic
    def block_at(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = context.get_value_type(record)
            if isinstance(address, types.RawPointer):
                return builder.bitcast(args[0], pointer)
            return builder.inttoptr(args[0], pointer)

        return record(address if isinstance(address, types.RawPointer) else types.intp), generate

    return block_at


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """The address of an array's first element, or of a block."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(array, types.Record):
            return builder.ptrtoint(args[0], I64)
        made = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(made.data, I64)

    return types.intp(array), generate


def _pointer_to(element: Any, bits: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], bits.as_pointer())

        return types.CPointer(element)(types.intp), generate

    return pointer


bytes_at = _pointer_to(types.uint8, ir.IntType(8))
shorts_at = _pointer_to(types.uint16, ir.IntType(16))
ints_at = _pointer_to(types.int32, ir.IntType(32))
longs_at = _pointer_to(types.int64, I64)
floats_at = _pointer_to(types.float32, ir.FloatType())


@intrinsic
def draw(typing: Any, counter: Any) -> Any:
    """The number of the next piece of work; no other thread gets it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.intp(types.intp), generate


# --- elements of any kind --------------------------------------------------------------------


@njit(inline="always")
def size_of(kind: int) -> int:
    return 4 if kind == FLOAT32 else 2


@njit
def read_tile(rows: int, offset: int, tile: int, kind: int) -> None:
    if kind == BFLOAT16:
        _read_tile_bf16(rows, offset * 2, tile)
    elif kind == FLOAT16:
        _read_tile_f16(rows, offset * 2, tile)
    else:
        _read_tile_f32(rows, offset * 4, tile)


@njit
def write_tile(tile: int, rows: int, offset: int, kind: int) -> None:
    if kind == BFLOAT16:
        _write_tile_bf16(tile, rows, offset * 2)
    elif kind == FLOAT16:
        _write_tile_f16(tile, rows, offset * 2)
    else:
        _write_tile_f32(tile, rows, offset * 4)


@njit
def copy_bytes(source: int, target: int, count: int) -> None:
    a, b = bytes_at(source), bytes_at(target)
    for i in range(count):
        b[i] = a[i]


@njit
def widen(source: int, target: int, count: int, kind: int) -> None:
    """count elements of a kind at `source` to float32 at `target`."""
    if kind == FLOAT32:
        copy_bytes(source, target, 4 * count)
        return
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        if kind == BFLOAT16:
            _widen_bf16(source + 2 * i, target + 4 * i)
        else:
            _widen_f16(source + 2 * i, target + 4 * i)
    if whole < count:
        raw, floats = np.zeros(16, np.uint16), np.empty(16, np.float32)
        copy_bytes(source + 2 * whole, address_of(raw), 2 * (count - whole))
        if kind == BFLOAT16:
            _widen_bf16(address_of(raw), address_of(floats))
        else:
            _widen_f16(address_of(raw), address_of(floats))
        copy_bytes(address_of(floats), target + 4 * whole, 4 * (count - whole))
        raw[0] = floats[0] = 0  # numba frees an array after its last use: keep both until here


@njit
def narrow(source: int, target: int, count: int, kind: int) -> None:
    """count float32 at `source`, rounded, to elements of a kind at `target`."""
    if kind == FLOAT32:
        copy_bytes(source, target, 4 * count)
        return
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        if kind == BFLOAT16:
            _narrow_bf16(source + 4 * i, target + 2 * i)
        else:
            _narrow_f16(source + 4 * i, target + 2 * i)
    if whole < count:
        raw, floats = np.empty(16, np.uint16), np.zeros(16, np.float32)
        copy_bytes(source + 4 * whole, address_of(floats), 4 * (count - whole))
        if kind == BFLOAT16:
            _narrow_bf16(address_of(floats), address_of(raw))
        else:
            _narrow_f16(address_of(floats), address_of(raw))
        copy_bytes(address_of(raw), target + 2 * whole, 2 * (count - whole))
        raw[0] = floats[0] = 0
