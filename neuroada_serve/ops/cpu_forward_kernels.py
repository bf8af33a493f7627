"""A decoder's forward over a few tokens as one kernel, for Llama-like models with packed weights.

At decode sizes a forward is bound by reading the weights; what else it does must hide behind that.
So it is one parallel region that walks through a list of operations with a barrier after each, and
an adapter's values are added where a product's tile is still in the cache.

Every operation has a block of `cpu_blocks.py`; what all of them share stands in the step's. Sums
are float32; where transformers keeps a bf16 tensor between two modules, values are rounded to bf16.

Weights lie as oneDNN packs them (`ops/matrix.py`): blocks of 64 neurons; in a block, for each pair
of inputs, the 64 pairs of weights.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from neuroada_serve.ops.cpu_attention_kernels import attend, attention_at, rotate
from neuroada_serve.ops.cpu_blocks import (
    ADD,
    GATE,
    LANES,
    LOGITS,
    NORM,
    PRODUCT,
    ROTATE,
    STORE,
    NormBlock,
    ProductBlock,
    ProgramBlock,
    StepBlock,
)
from neuroada_serve.ops.cpu_kernels import add_one, fetch_values, lanes_at, norm_row, table_at
from neuroada_serve.ops.cpu_vectors import (
    BFLOAT16,
    F32X16,
    I32X16,
    I64,
    TILE,
    add_to_rows,
    address_of,
    block_reader,
    c_function,
    concealed,
    constant,
    dot_first,
    dot_rows,
    dot_second,
    draw,
    exp,
    floats_at,
    fma,
    has_feature,
    ints_at,
    kernel_sources,
    load,
    longs_at,
    minus,
    narrow,
    over,
    pair_steps,
    plus,
    prefetch,
    put,
    read_pairs,
    read_twice,
    same_in_all,
    shorts_at,
    spread,
    store,
    times,
    vector_at,
    widen,
)

BLOCK_NEURONS = 64  # of a packed weight
# (tokens, vectors of 16 neurons) whose sums stay in registers, which AVX2 has half as many of as
# AVX-512, and half as wide.
SHAPES = ((1, 2), (4, 2), (8, 2), (12, 2))
if not has_feature("avx512f"):
    SHAPES = ((1, 2), (2, 2), (4, 1), (6, 1))
CHUNK = SHAPES[-1][0]  # tokens that are multiplied at once
AHEAD = 16384  # bytes of weights between those that are used and those that are fetched

_norm_block, _product_block = block_reader(NormBlock), block_reader(ProductBlock)
_step_block, _program_block = block_reader(StepBlock), block_reader(ProgramBlock)


# --- products --------------------------------------------------------------------------------


def _tile_product(num_tokens: int, vectors: int) -> Any:
    """vectors: of 16 neurons."""

    @intrinsic
    def tile_product(typing: Any, weight: Any, x: Any, x_bytes: Any, pairs: Any, y: Any) -> Any:
        """y [num_tokens, 32] float32 = x [num_tokens, 2 * pairs] bf16 times packed neurons."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weight, x, x_bytes, pairs, y = args
            rows = [
                builder.add(x, builder.mul(x_bytes, ir.Constant(I64, t))) for t in range(num_tokens)
            ]
            before = builder.block
            loop = builder.append_basic_block("pairs")
            done = builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            pair = builder.phi(I64)
            totals = [[builder.phi(F32X16) for _ in range(vectors)] for _ in range(num_tokens)]
            sums = [list(row) for row in totals]
            offset = builder.mul(pair, ir.Constant(I64, 4))
            start = builder.add(weight, builder.mul(offset, ir.Constant(I64, BLOCK_NEURONS)))
            for number, step in enumerate(pair_steps()):
                if number and num_tokens > 2:  # pairs kept in registers would drive sums out
                    start, offset = concealed(builder, start), concealed(builder, offset)
                weights = []
                for part in range(vectors):
                    address = builder.add(start, ir.Constant(I64, 4 * LANES * part))
                    weights.append(step.take(builder, load(builder, address, I32X16)))
                    if number == 0:
                        prefetch(builder, builder.add(address, ir.Constant(I64, AHEAD)), level=2)
                for t in range(num_tokens):
                    address = builder.add(rows[t], offset)
                    both = same_in_all(builder, load(builder, address, ir.IntType(32)))
                    inputs = step.take(builder, both)
                    for part in range(vectors):
                        sums[t][part] = step.add(builder, sums[t][part], weights[part], inputs)
            following = builder.add(pair, ir.Constant(I64, 1))
            pair.add_incoming(ir.Constant(I64, 0), before)
            pair.add_incoming(following, loop)
            for t in range(num_tokens):
                for total, added in zip(totals[t], sums[t], strict=True):
                    total.add_incoming(constant(F32X16, 0.0), before)
                    total.add_incoming(added, loop)
            builder.cbranch(builder.icmp_signed("<", following, pairs), loop, done)

            builder.position_at_end(done)
            for t in range(num_tokens):
                for part in range(vectors):
                    offset = ir.Constant(I64, 4 * (TILE * t + LANES * part))
                    store(builder, sums[t][part], builder.add(y, offset))
            return context.get_dummy_value()

        return types.none(*[types.intp] * 5), generate

    return tile_product


def _whole_tile(num_tokens: int, vectors: int) -> Any:
    """Like `_tile_product` for all 32 neurons."""
    product = _tile_product(num_tokens, vectors)
    if vectors == TILE // LANES:
        return product

    @njit
    def parts(weight: int, x: int, x_bytes: int, pairs: int, y: int) -> None:
        for part in range(0, 4 * TILE, 4 * LANES * vectors):
            product(weight + part, x, x_bytes, pairs, y + part)

    return parts


_MOST_ALONE, _MOST_FEW, _MOST_SOME, _ = (shape[0] for shape in SHAPES)
_product_alone, _product_of_few, _product_of_some, _product_of_chunk = (
    _whole_tile(*shape) for shape in SHAPES
)


@njit
def _multiply(weight: int, d_in: int, x: int, num_tokens: int, y: int) -> None:
    """y [num_tokens, 32] float32 = x times 32 neurons; x and y have CHUNK more rows than that."""
    x_bytes, pairs, first = 2 * d_in, d_in // 2, 0
    while first < num_tokens:
        count = num_tokens - first
        rows, target = x + first * x_bytes, y + 4 * TILE * first
        if count <= _MOST_ALONE:
            _product_alone(weight, rows, x_bytes, pairs, target)
        elif count <= _MOST_FEW:
            _product_of_few(weight, rows, x_bytes, pairs, target)
        elif count <= _MOST_SOME:
            _product_of_some(weight, rows, x_bytes, pairs, target)
        else:
            _product_of_chunk(weight, rows, x_bytes, pairs, target)
        first += CHUNK


@njit(inline="always")
def _has(table: Any, row: int) -> Any:
    """True for a row of the site that is one of the table's."""
    return table.first_row <= row < table.first_row + table.d_out


@njit
def _add_to_weight(table: Any, slot: int, sign: int, row: int, weight: int, log: int) -> Any:
    """Add a slot's values for neurons row..row + 31 to their 32 packed neurons at `weight`.

    log: gets the addresses of all entries, and behind them what was there.

    Returns:
        The end of the log.
    """
    k, stride, index = table.k, table.index_stride, ints_at(table.index)
    count, entry = TILE * k, 0
    places, before = longs_at(log), shorts_at(log + 8 * count)
    for r in range(TILE):
        for j in range(k):
            column = np.int64(index[(row + r) * stride + j])
            place = weight + 4 * (BLOCK_NEURONS * (column >> 1) + r) + 2 * (column & 1)
            places[entry], before[entry] = place, shorts_at(place)[0]
            entry += 1
    end = log + 10 * count
    sums, values, factor = end, end + 4 * count, spread(np.float32(sign))
    widen(log + 8 * count, sums, count, BFLOAT16)
    widen(table.bypass + 2 * (slot * table.slot_stride + row * k), values, count, BFLOAT16)
    for i in range(0, 4 * count, 4 * LANES):
        put(fma(vector_at(values + i), factor, vector_at(sums + i)), sums + i)
    narrow(sums, values, count, BFLOAT16)
    after = shorts_at(values)
    for i in range(count):
        target = shorts_at(places[i])
        target[0] = after[i]
    return end


@njit
def _put_back(log: int, count: int) -> None:
    """Undo one `_add_to_weight` of `count` entries, whose log begins here."""
    places, before = longs_at(log), shorts_at(log + 8 * count)
    for i in range(count):
        target = shorts_at(places[i])
        target[0] = before[i]


@njit
def _multiply_runs(args: Any, row: int, weight: int, num_tokens: int, y: int, work: int) -> None:
    """As `_multiply`, every run by the weight with its adapter's values in it, for the moment.

    No other thread reads these 32 neurons in this operation.
    """
    d_in, done = args.d_in, 0
    runs = longs_at(args.runs)
    for run in range(args.num_runs + 1):
        start, stop, log = num_tokens, num_tokens, work
        if run < args.num_runs:
            start, stop = runs[4 * run], runs[4 * run + 1]
        if start > done:
            _multiply(weight, d_in, args.x + 2 * d_in * done, start - done, y + 4 * TILE * done)
        if run < args.num_runs:
            adds, num_adds = longs_at(runs[4 * run + 2]), runs[4 * run + 3]
            for a in range(num_adds):
                table, slot, sign = table_at(adds[3 * a]), adds[3 * a + 1], adds[3 * a + 2]
                if _has(table, row):
                    log = _add_to_weight(table, slot, sign, row - table.first_row, weight, log)
            at = args.x + 2 * d_in * start
            _multiply(weight, d_in, at, stop - start, y + 4 * TILE * start)
            for a in range(num_adds - 1, -1, -1):
                table = table_at(adds[3 * a])
                if _has(table, row):
                    log -= 10 * TILE * table.k
                    _put_back(log, TILE * table.k)
        done = stop


# What a thread keeps for a block of 16 lanes of one call while it works on a product: their rows of
# y, where their values begin, 1 or (on the base) 0, and behind that their inputs.
Y_ROWS, VALUE_ROWS, OWN, LANES_X = 0, 128, 256, 320


@njit
def _lay_out_lanes(args: Any, y: int, spare: int, at: int) -> None:
    """Set up the blocks of lanes of all calls; a missing lane repeats the last one, into `spare`.

    What is left of a call's lanes is computed one by one, from rows of float32.
    """
    d_in, calls = args.d_in, longs_at(args.calls)
    for c in range(args.num_calls):
        table, lanes = table_at(calls[2 * c]), lanes_at(calls[2 * c + 1])
        positions, slots = longs_at(lanes.positions), longs_at(lanes.slots)
        num_lanes, blocks = lanes.num_lanes, lanes.num_blocks
        for b in range(blocks):
            y_rows, values, own = longs_at(at), longs_at(at + VALUE_ROWS), floats_at(at + OWN)
            for i in range(LANES):
                lane = min(b * LANES + i, num_lanes - 1)
                y_rows[i] = args.x + 2 * d_in * positions[lane]
            for column in range(0, d_in, TILE):
                read_twice(at, 2 * column, at + LANES_X + 4 * LANES * column)
            for i in range(LANES):
                lane = min(b * LANES + i, num_lanes - 1)
                is_lane, slot = b * LANES + i < num_lanes, slots[lane]
                y_rows[i] = y + 4 * TILE * positions[lane] if is_lane else spare
                own[i] = 1.0 if slot >= 0 else 0.0
                if slot < 0:
                    slot = lanes.merged_slot
                values[i] = table.bypass + 2 * slot * table.slot_stride
            at += LANES_X + 4 * LANES * d_in
        for lane in range(blocks * LANES, num_lanes):
            widen(args.x + 2 * d_in * positions[lane], at, d_in, BFLOAT16)
            at += 4 * d_in


@njit
def _dot(k: int, r: int, pairs: int, index: Any, columns: int, x: int) -> Any:
    """Neuron r's values times its inputs, for 16 lanes; pairs: what `read_pairs` made of them."""
    total = spread(np.float32(0))
    e, j = r * k, 0
    if e % 2:
        row = x + 4 * LANES * np.int64(index[columns])
        total = dot_second(total, pairs + 2 * LANES * (e - 1), row)
        j = 1
    while j + 1 < k:
        first = x + 4 * LANES * np.int64(index[columns + j])
        second = x + 4 * LANES * np.int64(index[columns + j + 1])
        total = dot_rows(total, pairs + 2 * LANES * (e + j), first, second)
        j += 2
    if j < k:
        row = x + 4 * LANES * np.int64(index[columns + j])
        total = dot_first(total, pairs + 2 * LANES * (e + j), row)
    return total


@njit
def _add_block(table: Any, merged_slot: int, row: int, at: int, y_offset: int, work: int) -> None:
    """The bypass of a table's neurons row..row + 31 to the rows of y of a block of lanes.

    work: room for 32 sums and for 32 * k values, each of 16 lanes.
    """
    k, stride = table.k, table.index_stride
    index, x, pairs = ints_at(table.index), at + LANES_X, work + 4 * LANES * TILE
    for part in range(k):
        offset = 2 * row * k + 2 * TILE * part
        read_pairs(at + VALUE_ROWS, offset, pairs + 2 * LANES * TILE * part)
    if k == 1:
        for r in range(0, TILE, 2):
            total = spread(np.float32(0))
            column = (row + r) * stride
            at_pair = pairs + 2 * LANES * r
            first = dot_first(total, at_pair, x + 4 * LANES * np.int64(index[column]))
            put(first, work + 4 * LANES * r)
            second = dot_second(total, at_pair, x + 4 * LANES * np.int64(index[column + stride]))
            put(second, work + 4 * LANES * (r + 1))
    else:
        for r in range(TILE):
            put(_dot(k, r, pairs, index, (row + r) * stride, x), work + 4 * LANES * r)
    if merged_slot >= 0:
        rows_at = work + 4 * LANES * TILE * (1 + k)
        rows = longs_at(rows_at)
        for i in range(LANES):
            rows[i] = table.bypass + 2 * merged_slot * table.slot_stride
        for part in range(k):
            offset = 2 * row * k + 2 * TILE * part
            read_pairs(rows_at, offset, pairs + 2 * LANES * TILE * part)
        own = vector_at(at + OWN)
        for r in range(TILE):
            less = _dot(k, r, pairs, index, (row + r) * stride, x)
            mine = times(own, vector_at(work + 4 * LANES * r))
            put(minus(mine, less), work + 4 * LANES * r)
    add_to_rows(work, at + Y_ROWS, y_offset)


@njit
def _tile_of_product(
    args: Any, row: int, num_tokens: int, y: int, y_offset: int, work: int, at: int
) -> None:
    """y + y_offset: [num_tokens, 32] float32 = neurons row..row + 31 of a product, with adapters
    and bias.

    at: what `_lay_out_lanes` set up.
    """
    d_in, target = args.d_in, y + y_offset
    block, within = row // BLOCK_NEURONS, row % BLOCK_NEURONS
    weight = args.weight + 2 * (block * BLOCK_NEURONS * d_in + 2 * within)
    calls = longs_at(args.calls)
    for c in range(args.num_calls):  # to arrive while the weights are multiplied
        table = table_at(calls[2 * c])
        if _has(table, row):
            i = row - table.first_row
            fetch_values(table, lanes_at(calls[2 * c + 1]), i, i + TILE)
    _multiply_runs(args, row, weight, num_tokens, target, work)
    if args.bias:
        widen(args.bias + 2 * row, work, min(TILE, args.num_rows - row), BFLOAT16)
        for t in range(num_tokens):
            for half in range(2):
                place, offset = target + 4 * TILE * t, 4 * LANES * half
                put(plus(vector_at(place + offset), vector_at(work + offset)), place + offset)
    for c in range(args.num_calls):
        table, lanes = table_at(calls[2 * c]), lanes_at(calls[2 * c + 1])
        blocks, merged_slot = lanes.num_blocks, lanes.merged_slot
        inside, i = _has(table, row), row - table.first_row
        for _ in range(blocks):
            if inside:
                _add_block(table, merged_slot, i, at, y_offset, work)
            at += LANES_X + 4 * LANES * d_in
        positions, slots = longs_at(lanes.positions), longs_at(lanes.slots)
        for lane in range(blocks * LANES, lanes.num_lanes):
            if inside:
                slot = slots[lane]
                own = np.float32(1 if slot >= 0 else 0)
                if slot < 0:
                    slot = merged_slot
                values = table.bypass + 2 * slot * table.slot_stride
                place = target + 4 * TILE * positions[lane]
                add_one(table, merged_slot, place, values, own, at, work, i, i + TILE)
            at += 4 * d_in


@njit
def _rounded(source: int, raw: int, count: int) -> None:
    """count float32 at `source` become what they are as bf16."""
    narrow(source, raw, count, BFLOAT16)
    widen(raw, source, count, BFLOAT16)


def scratch_bytes(num_tokens: int, num_lanes: int, d_in: int, largest_k: int) -> int:
    """Bytes that a thread needs for a product; num_lanes with every call's rounded up to 16."""
    tiles = 2 * 4 * TILE * (num_tokens + CHUNK + 1)
    work = 10 * TILE + 4 * LANES * TILE * (1 + largest_k) + 8 * LANES  # or the logs of two adds
    return tiles + work + num_lanes * (4 * d_in + LANES_X)


@njit
def _product(args: Any, step: Any, scratch: int) -> None:
    """scratch: as `scratch_bytes` says."""
    epilogue, num_rows = args.epilogue, args.num_rows
    num_tokens = step.num_kept if epilogue == LOGITS else step.num_tokens
    num_out = num_rows // 2 if epilogue == GATE else num_rows
    pieces = (num_out + TILE - 1) // TILE
    y, spare = scratch, scratch + 4 * TILE * (num_tokens + CHUNK)
    tile_bytes = spare + 4 * TILE - y  # the spare row is part of a tile
    up, raw = y + tile_bytes, y + 2 * tile_bytes
    before = raw + 2 * TILE
    work = before + 4 * TILE
    lanes_at = work + 4 * LANES * TILE * (1 + step.largest_k) + 8 * LANES
    counter = address_of(args)
    piece = draw(counter)
    if piece < pieces:
        _lay_out_lanes(args, y, spare, lanes_at)
    while piece < pieces:
        row = piece * TILE
        count = min(TILE, num_out - row)
        for half in range(2 if epilogue == GATE else 1):
            place, offset = half * num_out + row, half * tile_bytes
            _tile_of_product(args, place, num_tokens, y, offset, work, lanes_at)
        for t in range(num_tokens):
            tile = y + 4 * TILE * t
            target = args.y + 2 * (t * args.y_stride + row)
            if epilogue == STORE:
                narrow(tile, target, count, BFLOAT16)
            elif epilogue == LOGITS:
                _rounded(tile, raw, TILE)
                totals, logits = (
                    floats_at(tile),
                    floats_at(args.y + 4 * (t * args.y_stride + row)),
                )
                for i in range(count):
                    logits[i] = totals[i]
            elif epilogue == ADD:
                _rounded(tile, raw, TILE)
                widen(target, before, count, BFLOAT16)
                for half in range(2):
                    at = 4 * LANES * half
                    put(plus(vector_at(tile + at), vector_at(before + at)), tile + at)
                narrow(tile, target, count, BFLOAT16)
            else:
                gated = up + 4 * TILE * t
                _rounded(tile, raw, TILE)
                _rounded(gated, raw, TILE)
                for half in range(2):
                    at = 4 * LANES * half
                    gate, one = vector_at(tile + at), spread(np.float32(1))
                    below = plus(one, exp(minus(spread(np.float32(0)), gate)))
                    put(over(gate, below), tile + at)
                _rounded(tile, raw, TILE)
                for half in range(2):
                    at = 4 * LANES * half
                    put(times(vector_at(tile + at), vector_at(gated + at)), tile + at)
                narrow(tile, target, count, BFLOAT16)
        piece = draw(counter)


# --- norms -----------------------------------------------------------------------------------


@njit
def _norm(args: Any, step: Any) -> None:
    """Norms of all tokens; of the last layer's, those whose logits are kept."""
    width = args.width
    eps = args.eps
    is_last, kept = args.is_last, longs_at(step.kept)
    count = step.num_kept if is_last else step.num_tokens
    counter = address_of(args)
    row = draw(counter)
    if row >= count:
        return
    x, weight = np.empty(width + LANES, np.float32), np.empty(width, np.float32)
    widen(args.weight, address_of(weight), width, BFLOAT16)
    while row < count:
        source = kept[row] if is_last else row
        at, target = args.x + 2 * width * source, args.y + 2 * width * row
        norm_row(at, target, weight, width, eps, x, BFLOAT16)
        row = draw(counter)
    x[0] = weight[0] = 0


# --- the program -----------------------------------------------------------------------------


@intrinsic
def _call(typing: Any, function: Any) -> Any:
    """Call the C function without arguments at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [])
        return context.get_dummy_value()

    return types.none(types.intp), generate


@njit
def _run(program: Any) -> None:
    """Every thread of the team runs this, with a barrier after each operation."""
    thread = draw(address_of(program))
    scratch = program.scratch + thread * program.scratch_bytes
    ops = longs_at(program.ops)
    step = _step_block(program.step)
    for i in range(program.num_ops):
        kind, block = ops[2 * i], ops[2 * i + 1]
        if kind == NORM:
            _norm(_norm_block(block), step)
        elif kind == PRODUCT:
            _product(_product_block(block), step, scratch)
        elif kind == ROTATE:
            rotate(attention_at(block), step)
        else:
            attend(attention_at(block), step, scratch)
        if program.barrier:
            _call(program.barrier)
        if thread == 0:  # all are past it, and none draws from it before the next run
            counter = longs_at(block)
            counter[0] = 0


def _c_functions(sources: int) -> Any:
    def run(block: Any) -> None:
        if sources:
            _run(_program_block(block))

    return c_function(run)


run = _c_functions(kernel_sources())
