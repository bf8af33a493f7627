"""The bypass kernels against the reference; run by test_triton_bypass.py in a process of its own.

Triton decides at its import whether it compiles or interprets. On a machine with a GPU these same
cases run on it.
"""

import math
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops.bypass import NO_SLOT, BypassTable, TokenSlots, bypass_add_reference
from neuroada_serve.ops.triton_bypass import (
    BypassTile,
    add_entries_,
    bypass_add_triton_,
    bypass_tile,
    put_entries_,
    restore_entries_,
    swap_entries_,
)
from tests.support.bypass_cases import NUM_SLOTS, assert_close, random_case, slots_of
from tests.support.triton_interpreter import DEVICE

TILES = [
    BypassTile("direct", rows=64),
    BypassTile("staged", rows=32),
    BypassTile("lanes", rows=16, lanes=16),
]
SIZES = [(1, 1), (7, 5), (33, 64), (133, 17)]  # d_out, d_in


def case(num_tokens: int, d_out: int, d_in: int, k: int, dtype: torch.dtype):
    return [part.to(DEVICE) for part in random_case(num_tokens, d_out, d_in, k, dtype)]


def expect(y: Tensor, x: Tensor, index: Tensor, bypass: Tensor, token_slots: TokenSlots) -> Tensor:
    return bypass_add_reference(y, x, BypassTable(index, bypass), token_slots)


def add_(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    bypass: Tensor,
    token_slots: TokenSlots,
    tile: BypassTile | None = None,
) -> None:
    bypass_add_triton_(y, x, index, bypass, *token_slots.on_device, tile)


POPULARITIES = ["identical", "distinct", "zipf", "prefills"]
KINDS = list(product(TILES, (1, 2, 8, 20), POPULARITIES))
if DEVICE.type == "cpu":  # slow: every tile meets every k and every popularity, but not all pairs
    KINDS = [
        (tile, k, POPULARITIES[(i + j) % 4])
        for i, tile in enumerate(TILES)
        for j, k in enumerate((1, 2, 8, 20))
    ]


@pytest.mark.parametrize(("tile", "k", "popularity"), KINDS)
def test_kernel_equals_the_reference(tile, k, popularity):
    cases = zip(SIZES, (3, 19, 5, 2), cycle([torch.float32, torch.bfloat16]), (None, 3, 3, None))
    for (d_out, d_in), num_tokens, dtype, merged_slot in cases:
        slots = TokenSlots(slots_of(popularity, num_tokens), DEVICE, merged_slot)
        y, x, index, bypass = case(num_tokens, d_out, d_in, min(k, d_in), dtype)
        expected = expect(y, x, index, bypass, slots)
        add_(y, x, index, bypass, slots, tile)
        assert_close(y, expected)


@pytest.mark.parametrize("merged_slot", [None, 3])
def test_all_on_the_base_equals_the_reference(merged_slot):
    slots = TokenSlots(slots_of("base", 9), DEVICE, merged_slot)
    y, x, index, bypass = case(9, 7, 17, 2, torch.bfloat16)
    expected = expect(y, x, index, bypass, slots)
    add_(y, x, index, bypass, slots)
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_layer_equals_the_reference(dtype):
    slots = TokenSlots(slots_of("uniform", 9), DEVICE, 2)
    y, x, index, bypass = case(9, 576, 576, 8, dtype)
    expected = expect(y, x, index, bypass, slots)
    add_(y, x, index, bypass, slots)
    assert_close(y, expected)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.way)
def test_rows_columns_and_slots_may_lie_apart(tile):
    """Views of wider activations, of a pool [slots, nnz] and of a wider index table."""
    wide_y, wide_x, table, wide = case(19, 7, 64, 8, torch.float32)
    wide_y = torch.full((19, 40), float("nan"), device=DEVICE)
    y = wide_y[:, 5:12].copy_(torch.randn(19, 7, device=DEVICE))
    x = torch.full((19, 99), float("nan"), device=DEVICE)[:, 3:67].copy_(wide_x)
    pool = torch.full((NUM_SLOTS, 500), float("nan"), device=DEVICE)
    view = pool[:, 123 : 123 + 21].view(NUM_SLOTS, 7, 3).copy_(wide[:, :, :3])
    slots = TokenSlots(slots_of("zipf", 19), DEVICE, 5)
    expected = expect(y, x, table[:, :3], view, slots)
    add_(y, x, table[:, :3], view, slots, tile)
    assert_close(y, expected)
    assert bool(wide_y[:, :5].isnan().all())
    assert bool(wide_y[:, 12:].isnan().all())


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.way)
@pytest.mark.parametrize("merged_slot", [None, 0])
def test_tokens_with_nothing_to_add_keep_their_bits(tile, merged_slot):
    y, x, index, bypass = case(33, 7, 17, 3, torch.bfloat16)
    slots = TokenSlots(slots_of("uniform", 33), DEVICE, merged_slot)
    before = y.clone()
    y[0, 0] = before[0, 0] = float("nan")
    add_(y, x, index, bypass, slots, tile)
    idle = NO_SLOT if merged_slot is None else merged_slot
    for t, slot in enumerate(slots.slots):
        same = torch.equal(y[t].view(torch.int16), before[t].view(torch.int16))
        assert same == (slot == idle)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.way)
@pytest.mark.parametrize("column", [-1, -(2**31), 17, 18, 2**31 - 1])
def test_bad_column_adds_nothing_and_reads_no_other_row(tile, column):
    """The rows around each token's are poisoned, so that any read of them would show."""
    y, x, index, bypass = case(9, 7, 17, 3, torch.float32)
    guarded = torch.full((9, 3, 17), float("nan"), device=DEVICE)
    guarded[:, 1] = x
    slots = TokenSlots(slots_of("distinct", 9), DEVICE, 4)
    clean = bypass.clone()
    clean[:, 2, 1] = 0
    expected = expect(y, x, index, clean, slots)
    index[2, 1] = column
    add_(y, guarded[:, 1], index, bypass, slots, tile)
    assert_close(y, expected)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.way)
@pytest.mark.parametrize("slot", [-2, -(2**31), NUM_SLOTS, 2**31 - 1])
def test_bad_slot_counts_as_the_base(tile, slot):
    y, x, index, bypass = case(9, 7, 17, 3, torch.float32)
    good = TokenSlots((1, NO_SLOT, 5, 1, 1, NO_SLOT, 3, 3, 0), DEVICE, 5)
    expected = expect(y, x, index, bypass, good)
    token_slot, merged_slot = (part.clone() for part in good.on_device)
    token_slot[1] = slot
    result = y.clone()
    bypass_add_triton_(result, x, index, bypass, token_slot, merged_slot, tile)
    assert_close(result, expected)

    unmerged = TokenSlots(good.slots, DEVICE)
    expected = expect(y, x, index, bypass, unmerged)
    merged_slot.fill_(slot)
    bypass_add_triton_(y, x, index, bypass, token_slot, merged_slot, tile)
    assert_close(y, expected)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.way)
def test_poison_reaches_no_other_token(tile):
    y, x, index, bypass = case(19, 7, 17, 3, torch.float32)
    slots = TokenSlots(slots_of("zipf", 19), DEVICE, 2)
    clean = y.clone()
    add_(clean, x, index, bypass, slots, tile)
    x[4] = float("nan")
    bypass[0] = float("inf")
    add_(y, x, index, bypass, slots, tile)
    others = [t for t, slot in enumerate(slots.slots) if slot != 0 and t != 4]
    assert torch.equal(y[others], clean[others])


def test_no_tokens_are_fine():
    y, x, index, bypass = case(0, 7, 17, 3, torch.float32)
    add_(y, x, index, bypass, TokenSlots((), DEVICE))


def test_wrong_shapes_are_named():
    y, x, index, bypass = case(4, 7, 17, 3, torch.float32)
    slots = TokenSlots((0,) * 4, DEVICE)
    for wrong, message in (
        ((y[:3], x, index, bypass), "num_tokens"),
        ((y, x, index[:6], bypass), "rows of index"),
        ((y, x, index, bypass[:, :, :2]), "num_slots"),
        ((y, x, index[:, :2], bypass[:, :, :2]), "contiguous"),
        ((y.t().contiguous().t(), x, index, bypass), "last strides"),
    ):
        with pytest.raises(ShapeError, match=message):
            add_(*wrong, slots)


def test_table_knows_every_size():
    for num_tokens, k, d_in in product((1, 8, 64, 4096), (1, 2, 8, 20), (64, 4096, 14336, 10**6)):
        tile = bypass_tile(num_tokens, k, d_in, 2)
        assert math.log2(tile.rows).is_integer()
        assert tile.way != "staged" or d_in < 10**6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_entries_are_added_and_restored_exactly(transposed, dtype, k):
    for d_out, d_in in ((1, 20), (7, 33), (133, 64)):
        _, _, index, bypass = case(1, d_out, d_in, k, dtype)
        weight = torch.randn(d_out, d_in, device=DEVICE).to(dtype)
        weight = weight.t().contiguous().t() if transposed else weight
        before, columns = weight.clone(), index.long()
        originals = before.gather(1, columns)
        merged = (originals.float() + bypass[3].float()).to(dtype)

        saved = add_entries_(weight, index, bypass[3])
        assert torch.equal(saved, originals)
        expected = before.scatter(1, columns, merged)
        if DEVICE.type == "cpu":  # the interpreter cuts where a GPU rounds to bfloat16
            assert_close(weight, expected)
        else:
            assert torch.equal(weight, expected)
        for slot in (2, 3):  # others take their place, as often as one likes
            swap_entries_(weight, index, bypass[slot], saved)
            other = before.clone()
            add_entries_(other, index, bypass[slot])
            assert torch.equal(weight, other)
            assert torch.equal(saved, originals)
        restore_entries_(weight, index, saved)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("column", [-1, 17, -(2**31), 2**31 - 1])
def test_bad_column_writes_nothing(column):
    _, _, index, bypass = case(1, 7, 17, 3, torch.float32)
    guarded = torch.randn(9, 17, device=DEVICE)
    before = guarded.clone()
    weight, columns = guarded[1:8], index.long()
    expected = before[1:8].clone()
    expected.scatter_(1, columns, expected.gather(1, columns) + bypass[0])
    expected[2, columns[2, 1]] = before[3, columns[2, 1]]
    index[2, 1] = column

    saved = add_entries_(weight, index, bypass[0])
    assert torch.equal(weight, expected)
    swap_entries_(weight, index, bypass[0], saved)
    assert torch.equal(weight, expected)
    restore_entries_(weight, index, saved)
    assert torch.equal(guarded, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_of_many_weights_are_put_in_one_launch(dtype):
    """As `WeightEntries` has them: places counted from the weight that lies lowest in memory."""
    memory = torch.randn(4096, device=DEVICE).to(dtype)
    weights = [memory[100:200], memory[1000:2500], memory[3000:]]
    before, origin = memory.clone(), weights[1]
    places = torch.tensor([-900, -801, 0, 7, 1499, 2000, 3095], device=DEVICE)
    values = torch.randn(len(places), device=DEVICE).to(dtype)
    put_entries_(origin, places, values)
    expected = before.clone()
    expected[places + 1000] = values
    assert torch.equal(memory, expected)
    with pytest.raises(ShapeError):
        put_entries_(origin, places, values[1:])
    with pytest.raises(ShapeError):
        put_entries_(origin, places, values.double())


@pytest.mark.parametrize("tile", TILES)
def test_slots_may_begin_within_each_other(tile):
    """As the bank has them: a slot is where an adapter's values begin, in units of a few values."""
    y, x, index, _ = case(7, 24, 17, 3, torch.float32)
    memory = torch.randn(2000, device=DEVICE)
    bypass = memory.as_strided((28, 24, 3), (64, 3, 1), 32)
    token_slots = TokenSlots((3, NO_SLOT, 27, 3, 0, 11, 4), DEVICE, 4)
    expected = expect(y, x, index, bypass, token_slots)
    add_(y, x, index, bypass, token_slots, tile)
    assert_close(y, expected)


def test_entries_of_wrong_shape_are_named():
    _, _, index, bypass = case(1, 7, 17, 3, torch.float32)
    weight = torch.randn(7, 17, device=DEVICE)
    for wrong in ((weight[:6], index, bypass[0]), (weight, index, bypass[0, :, :2])):
        with pytest.raises(ShapeError):
            add_entries_(*wrong)
    with pytest.raises(ShapeError):
        swap_entries_(weight, index, bypass[0], bypass[0, :, :2])
    with pytest.raises(ShapeError, match="contiguous"):
        restore_entries_(weight, index, bypass[0].t().contiguous().t())
