"""bypass_add_ against its reference, and the reference against the sum written out."""

from itertools import product

import pytest
import torch

from neuroada_serve.errors import ShapeError
from neuroada_serve.ops.bypass import (
    NO_SLOT,
    BypassTable,
    TokenSlots,
    bypass_add_,
    bypass_add_reference,
)
from tests.support.bypass_cases import NUM_SLOTS, assert_close, random_case, slots_of

CPU = torch.device("cpu")
SIZES = [(1, 1), (7, 5), (33, 64), (133, 17)]  # d_out, d_in


def test_reference_is_the_sum_written_out():
    y, x, index, bypass = random_case(5, 4, 6, 3, torch.float32)
    slots, merged = (2, NO_SLOT, 0, 2, 8), 2
    for merged_slot in (None, merged):
        expected = y.clone()
        for t, s in enumerate(slots):
            for i in range(4):
                for j in range(3):
                    value = 0.0 if s == NO_SLOT else float(bypass[s, i, j])
                    if merged_slot is not None:
                        value -= float(bypass[merged_slot, i, j])
                    expected[t, i] += value * x[t, index[i, j]]
        slots_now = TokenSlots(slots, CPU, merged_slot)
        assert_close(bypass_add_reference(y, x, BypassTable(index, bypass), slots_now), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    "popularity", ["identical", "distinct", "uniform", "zipf", "prefills", "base"]
)
@pytest.mark.parametrize("num_tokens", [1, 3, 7, 8, 133])
def test_op_equals_the_reference(dtype, k, popularity, num_tokens):
    slots = slots_of(popularity, num_tokens)
    for (d_out, d_in), merged_slot in product(SIZES, (None, 3, 7)):
        y, x, index, bypass = random_case(num_tokens, d_out, d_in, min(k, d_in), dtype)
        token_slots = TokenSlots(slots, CPU, merged_slot)
        expected = bypass_add_reference(y, x, BypassTable(index, bypass), token_slots)
        bypass_add_(y, x, BypassTable(index, bypass), token_slots)
        assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype):
    """Within half a unit in the last place of the exact sum, whatever the dtype of the parts."""
    y, x, index, bypass = random_case(40, 33, 64, 32, dtype)
    token_slots = TokenSlots(slots_of("prefills", 40), CPU, 2)
    exact = bypass_add_reference(y.double(), x, BypassTable(index, bypass), token_slots).double()
    bypass_add_(y, x, BypassTable(index, bypass), token_slots)
    half_unit = exact.abs() * torch.finfo(dtype).eps / 2
    assert bool(((y.double() - exact).abs() <= half_unit + 2e-5).all())


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32])
def test_values_may_have_another_dtype_than_activations(values):
    y, x, index, bypass = random_case(20, 7, 5, 2, torch.bfloat16)
    token_slots = TokenSlots(slots_of("uniform", 20), CPU)
    expected = bypass_add_reference(y, x, BypassTable(index, bypass.to(values)), token_slots)
    bypass_add_(y, x, BypassTable(index, bypass.to(values)), token_slots)
    assert_close(y, expected)


@pytest.mark.parametrize("popularity", ["prefills", "uniform"])
def test_slots_and_columns_may_lie_apart(popularity):
    """A view into a pool [slots, nnz], and the first columns of a wider index table."""
    y, x, table, wide = random_case(60, 7, 64, 8, torch.float32)
    pool = torch.full((NUM_SLOTS, 500), float("nan"))
    view = pool[:, 123 : 123 + 21].view(NUM_SLOTS, 7, 3)
    view.copy_(wide[:, :, :3])
    token_slots = TokenSlots(slots_of(popularity, 60), CPU, 5)
    expected = bypass_add_reference(
        y, x, BypassTable(table[:, :3].contiguous(), wide[:, :, :3].contiguous()), token_slots
    )
    bypass_add_(y, x, BypassTable(table[:, :3], view), token_slots)
    assert_close(y, expected)


def test_base_tokens_keep_their_bits():
    y, x, index, bypass = random_case(133, 33, 64, 5, torch.bfloat16)
    slots = slots_of("uniform", 133)
    before = y.clone()
    bypass_add_(y, x, BypassTable(index, bypass), TokenSlots(slots, CPU))
    for t, slot in enumerate(slots):
        assert torch.equal(y[t], before[t]) == (slot == NO_SLOT)


def test_merged_tokens_keep_their_bits():
    y, x, index, bypass = random_case(133, 33, 64, 5, torch.float32)
    slots = slots_of("zipf", 133)
    before = y.clone()
    bypass_add_(y, x, BypassTable(index, bypass), TokenSlots(slots, CPU, merged_slot=0))
    for t, slot in enumerate(slots):
        assert torch.equal(y[t], before[t]) == (slot == 0)


@pytest.mark.parametrize("popularity", ["distinct", "identical", "zipf", "prefills"])
@pytest.mark.parametrize("merged_slot", [None, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_token_never_reaches_another(popularity, merged_slot, poison):
    y, x, index, bypass = random_case(50, 7, 17, 3, torch.float32)
    token_slots = TokenSlots(slots_of(popularity, 50), CPU, merged_slot)
    clean = y.clone()
    bypass_add_(clean, x, BypassTable(index, bypass), token_slots)
    for bad in (0, 20, 49):
        poisoned, result = x.clone(), y.clone()
        poisoned[bad] = poison
        bypass_add_(result, poisoned, BypassTable(index, bypass), token_slots)
        others = [t for t in range(50) if t != bad]
        assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("merged_slot", [None, 4])
def test_poisoned_slot_never_reaches_tokens_of_another(merged_slot):
    y, x, index, bypass = random_case(133, 7, 17, 3, torch.float32)
    slots = slots_of("prefills", 100) + slots_of("uniform", 33)
    token_slots = TokenSlots(slots, CPU, merged_slot)
    clean = y.clone()
    bypass_add_(clean, x, BypassTable(index, bypass), token_slots)
    bypass[0] = float("nan")
    bypass_add_(y, x, BypassTable(index, bypass), token_slots)
    others = [t for t, slot in enumerate(slots) if slot != 0]
    assert torch.equal(y[others], clean[others])
    assert 0 in slots


def test_token_alone_equals_token_in_any_batch():
    y, x, index, bypass = random_case(64, 33, 64, 5, torch.float32)
    slots = slots_of("uniform", 32) + slots_of("identical", 32)
    together = y.clone()
    bypass_add_(together, x, BypassTable(index, bypass), TokenSlots(slots, CPU))
    for t in range(64):
        alone = y[t : t + 1].clone()
        bypass_add_(
            alone, x[t : t + 1], BypassTable(index, bypass), TokenSlots(slots[t : t + 1], CPU)
        )
        assert_close(together[t : t + 1], alone)


def test_no_tokens_are_fine():
    y, x, index, bypass = random_case(0, 7, 17, 3, torch.float32)
    bypass_add_(y, x, BypassTable(index, bypass), TokenSlots((), CPU))
    assert y.shape == (0, 7)


def test_reference_is_differentiable():
    y, x, index, bypass = random_case(6, 4, 9, 2, torch.float32)
    bypass.requires_grad_()
    token_slots = TokenSlots((1, NO_SLOT, 1, 0, 5, 5), CPU)
    bypass_add_reference(y, x, BypassTable(index, bypass), token_slots).sum().backward()
    expected = torch.zeros_like(bypass)
    for t, slot in enumerate(token_slots.slots):
        if slot != NO_SLOT:
            expected[slot] += x[t, index.long()]
    assert bypass.grad is not None
    assert_close(bypass.grad, expected)


# --- token slots -----------------------------------------------------------------------------


@pytest.mark.parametrize("merged_slot", [None, 0, 3])
@pytest.mark.parametrize("popularity", ["base", "identical", "uniform", "zipf", "prefills"])
def test_every_token_with_work_is_in_one_lane(popularity, merged_slot):
    slots = slots_of(popularity, 133)
    token_slots = TokenSlots(slots, CPU, merged_slot)
    idle = NO_SLOT if merged_slot is None else merged_slot
    lanes = list(zip(*(part.tolist() for part in token_slots.lanes), strict=True))
    assert lanes == [(t, s) for t, s in enumerate(slots) if s != idle]
    assert token_slots.idle == (not lanes)


def test_batch_without_work_is_idle():
    assert TokenSlots((NO_SLOT, NO_SLOT), CPU).idle
    assert TokenSlots((2, 2, 2), CPU, merged_slot=2).idle
    assert not TokenSlots((NO_SLOT,), CPU, merged_slot=2).idle
    assert not TokenSlots((2,), CPU).idle


# --- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "x", "index", "bypass", "num_slots", "named"),
    [
        ((3, 4), (2, 5), (4, 2), (9, 4, 2), 3, (r"\(3, 4\)", r"\(2, 5\)")),
        ((3, 4, 1), (3, 5), (4, 2), (9, 4, 2), 3, (r"\(3, 4, 1\)", r"\(3, 5\)")),
        ((3, 4), (3, 5), (4, 2), (9, 4, 3), 3, (r"\(9, 4, 3\)", r"\(4, 2\)")),
        ((3, 4), (3, 5), (4, 2), (4, 2), 3, (r"bypass \(4, 2\)", r"index \(4, 2\)")),
        ((3, 4), (3, 5), (6, 2), (9, 6, 2), 3, (r"\(3, 4\)", r"\(6, 2\)")),
        ((3, 4), (3, 5), (4, 2), (9, 4, 2), 2, (r"\(3, 4\)", r"2 token slots")),
    ],
)
def test_shapes_that_disagree_are_both_named(y, x, index, bypass, num_slots, named):
    with pytest.raises(ShapeError, match=".*".join(named)):
        bypass_add_(
            torch.zeros(y),
            torch.zeros(x),
            BypassTable(torch.zeros(index).int(), torch.zeros(bypass)),
            TokenSlots((1,) * num_slots, CPU),
        )
