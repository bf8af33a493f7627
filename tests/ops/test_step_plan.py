"""The plan of a step: which tables a site and a run get, in which order."""

import torch

from neuroada_serve.ops.bypass import NO_SLOT, BypassTable, TokenSlots
from neuroada_serve.ops.step_plan import StepPlan, TokenRun

CPU = torch.device("cpu")


def table(rows: int, k: int, first_row: int = 0) -> BypassTable:
    return BypassTable(torch.zeros(rows, k).int(), torch.zeros(4, rows, k), first_row)


def bias(rows: int) -> BypassTable:
    return BypassTable(None, torch.zeros(4, rows, 1))


def test_a_site_gets_its_tables_in_the_order_of_the_groups():
    q, v, o, of_bias = table(4, 1), table(4, 1, first_row=8), table(6, 3), bias(4)
    one, other = TokenSlots((1, NO_SLOT), CPU), TokenSlots((NO_SLOT, 2), CPU)
    groups = [({"qkv": [q, v]}, one), ({"qkv": [o], "o": [o]}, other), ({"qkv": [of_bias]}, one)]
    plan = StepPlan((0, 5, 6), groups)
    assert plan.calls("qkv") == [(q, one), (v, one), (o, other), (of_bias, one)]
    assert plan.calls("o") == [(o, other)]
    assert plan.calls("down") == []
    assert plan.token_slots == [one, other, one]
    assert [v.rows.start, v.rows.stop] == [8, 12]


def test_a_run_takes_the_merged_adapter_out_first():
    merged, own = table(4, 2), table(4, 8)
    run = TokenRun(3, 9, [({"qkv": [merged]}, 7, -1), ({"qkv": [own]}, 2, 1)])
    assert run.added("qkv") == [(merged, 7, -1), (own, 2, 1)]
    assert run.added("o") == []


def test_largest_k_is_that_of_any_call_or_run():
    slots = TokenSlots((1,), CPU)
    groups = [({"o": [table(4, 3)]}, slots), ({}, slots), ({"o": [bias(4)]}, slots)]
    run = TokenRun(0, 1, [({"o": [table(4, 8)]}, 0, 1)])
    assert StepPlan((0,), []).largest_k == 0
    assert StepPlan((0,), groups).largest_k == 3
    assert StepPlan((0,), groups, [run]).largest_k == 8


def test_static_slots_are_read_in_place_of_copies():
    groups = [({"o": [table(4, 3)]}, TokenSlots((1, 2), CPU, merged_slot=2))]
    pair = torch.tensor([1, 2]).int(), torch.tensor([2]).int()
    static = StepPlan((0, 1), groups).with_static([pair])
    assert static.token_slots[0].on_device is pair
    assert static.calls("o")[0][0] is groups[0][0]["o"][0]
