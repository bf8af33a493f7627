"""The merge policy: what is worth having in the weights, reckoned by hand."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.engine import merge_policy
from neuroada_serve.engine.merge_policy import (
    _HYSTERESIS,
    BASE_CORRECTION,
    HORIZON,
    LANE_NS,
    OTHER_INDEX_CORRECTION,
    SAME_INDEX_CORRECTION,
    WRITE_NS,
    Load,
    MergePolicy,
    lanes_computed,
)
from neuroada_serve.ops import cpu_blocks, cpu_vectors

DEVICES = ["cpu", "cuda"]


@dataclass(eq=False)
class Version:
    nnz: int = 1000


def loads(*tokens: tuple[Version | None, int]) -> list[Load]:
    """Return the loads of requests that each have HORIZON tokens to come, and the rest."""
    return [
        Load(version, min(HORIZON, count - start))
        for version, count in tokens
        for start in range(0, count, HORIZON)
    ]


def linear() -> MergePolicy:
    """Return the policy of a device where every token costs what it adds."""
    return MergePolicy("cuda")


def enough(device: str = "cuda") -> int:
    """Tokens of one adapter, all alone, that repay its merge."""
    return int(_HYSTERESIS * WRITE_NS[device] / LANE_NS[device]) + 1


def test_nothing_to_come_keeps_what_is_merged():
    a = Version()
    assert linear().choose([], None) is None
    assert linear().choose([], a) is a


@pytest.mark.parametrize("device", DEVICES)
def test_single_adapter_is_merged_once_its_tokens_repay_it(device):
    a, policy = Version(), MergePolicy(device)
    assert policy.choose(loads((a, enough(device) - 2)), None) is None
    assert policy.choose(loads((a, enough(device))), None) is a


def test_size_of_a_lone_adapter_does_not_matter():
    """Its tokens cost as much to add as it costs to write."""
    for nnz in (1, 1000, 10**9):
        a = Version(nnz)
        assert linear().choose(loads((a, enough())), None) is a
        assert linear().choose(loads((a, enough() - 2)), None) is None


@pytest.mark.parametrize("num_tokens", [100, 10_000, 1_000_000])
def test_nothing_pays_for_a_minority(num_tokens):
    parties = [Version() for _ in range(5)]
    load = loads(*((version, num_tokens) for version in parties))
    assert linear().choose(load, None) is None


def test_majority_is_merged():
    a, b, c = Version(), Version(), Version()
    load = loads((a, 2000), (b, 200), (c, 200), (None, 200))
    assert linear().choose(load, None) is a


def test_base_alone_has_nothing_merged():
    assert linear().choose(loads((None, 10_000)), None) is None


def test_base_tokens_count_against_merging():
    """They pay for nothing now, and would for taking it out again."""
    a = Version()
    assert linear().choose(loads((a, 1000)), None) is a
    assert linear().choose(loads((a, 1000), (None, 500)), None) is a
    assert linear().choose(loads((a, 1000), (None, 2000)), None) is None


def test_base_tokens_have_it_taken_out():
    a = Version()
    assert linear().choose(loads((a, 100), (None, 1000)), a) is None
    assert linear().choose(loads((None, 1000)), a) is None
    assert linear().choose(loads((None, enough() - 2)), a) is a


def test_others_alone_have_it_taken_out():
    a, *others = [Version() for _ in range(9)]
    assert linear().choose(loads(*((other, 500) for other in others)), a) is None


def test_merged_adapter_stays_while_no_other_gains_enough():
    a, b = Version(), Version()
    assert linear().choose(loads((a, 1000), (b, 1000)), a) is a
    assert linear().choose(loads((a, 1000), (b, 1000)), b) is b
    assert linear().choose(loads((a, 1000), (b, 1050)), a) is a


def test_gain_must_exceed_the_switch_by_hysteresis():
    """a is in the weights, and only b is wanted: each token saves its own entries and the taking
    out of a's, and both are written."""
    a, b = Version(1000), Version(1000)
    tokens = (
        _HYSTERESIS
        * WRITE_NS["cuda"]
        * 2000
        / (LANE_NS["cuda"] * 1000 * (1 + SAME_INDEX_CORRECTION))
    )
    assert linear().choose(loads((b, int(tokens))), a) is a
    assert linear().choose(loads((b, int(tokens) + 1)), a) is b


def test_smaller_switch_that_pays_is_not_given_up_for_a_larger_that_does_not():
    """Merging b would save most, but not enough for two writes; taking a out is enough for one."""
    a, b = Version(), Version()
    assert linear().choose(loads((None, 80), (b, 85)), a) is None


def test_entries_count_and_not_tokens_alone():
    large, small = Version(8000), Version(1000)
    assert linear().choose(loads((large, 640), (small, 640)), None) is large
    assert linear().choose(loads((large, 512), (None, 1024)), None) is None
    assert linear().choose(loads((large, 64), (small, 640)), None) is small


def test_shifting_load_switches_once():
    a, b, policy = Version(), Version(), linear()
    merged, seen = a, []
    for share in range(0, 101, 2):
        merged = policy.choose(loads((a, 1000 - 10 * share), (b, 10 * share)), merged)
        if not seen or seen[-1] is not merged:
            seen.append(merged)
    assert seen == [a, b]


def test_load_that_swings_a_little_switches_nothing():
    a, b, policy = Version(), Version(), linear()
    merged = policy.choose(loads((a, 1000)), None)
    for swing in [0, 30, -30] * 10:
        merged = policy.choose(loads((a, 500 + swing), (b, 500 - swing)), merged)
        assert merged is a


def test_tokens_beyond_the_horizon_are_not_counted_on():
    a = Version()
    assert linear().choose([Load(a, 10**6)], None) is None
    assert linear().choose([Load(a, 10**6)] * 2, None) is a


def test_requests_of_one_adapter_are_added_up():
    a = Version()
    assert linear().choose([Load(a, 1)] * enough(), None) is a


def test_few_that_wait_are_not_taken_for_the_many_that_will_run():
    """If all running requests are about to end, most known tokens belong to waiting ones."""
    parties = [Version() for _ in range(4)]
    ending = [Load(version, 1) for version in parties * 4]
    waiting = [Load(parties[0], 1000, is_running=False)] * 4
    assert linear().choose([*ending, *waiting], None) is None
    assert linear().choose(waiting, None) is parties[0]


def test_those_who_wait_prolong_what_runs():
    a = Version()
    running = [Load(a, enough() // 20)] * 10
    assert linear().choose(running, None) is None
    assert linear().choose([*running, *[Load(a, 64, is_running=False)] * 10], None) is a


def test_slow_switches_are_taken_in():
    a, policy = Version(), linear()
    load = loads((a, 3 * enough()))
    assert policy.choose(load, None) is a
    for _ in range(10):
        policy.observe_switch(1000, 1000 * 4 * WRITE_NS["cuda"] * 1e-9)
    assert policy.choose(load, None) is None
    assert policy.choose(loads((a, 5 * enough())), None) is a


def test_quick_switches_are_taken_in():
    a, policy = Version(), linear()
    load = loads((a, enough() // 2))
    assert policy.choose(load, None) is None
    for _ in range(10):
        policy.observe_switch(2000, 2000 * WRITE_NS["cuda"] / 4 * 1e-9)
    assert policy.choose(load, None) is a


@pytest.mark.parametrize("num_entries", [0, 10, 1000])
def test_one_slow_switch_does_not_end_all_merging(num_entries):
    """If merging never paid any more, nothing would correct the expectation."""
    a, policy = Version(), linear()
    policy.observe_switch(num_entries, 1.0)
    assert policy.choose(loads((a, 2 * enough())), None) is a


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_choice_is_the_cheapest_with_its_switch(data):
    versions = [Version(data.draw(st.integers(1, 8)) * 100) for _ in range(4)]
    load = data.draw(
        st.lists(
            st.builds(Load, st.sampled_from([None, *versions]), st.integers(0, 200), st.booleans())
        )
    )
    merged = data.draw(st.sampled_from([None, *versions]))
    chosen = linear().choose(load, merged)
    wanted = {each.version for each in load if each.is_running}
    wanted = wanted or {each.version for each in load}
    assert chosen in (wanted | {None, merged})
    if any(each.num_tokens for each in load):
        costs = {c: total_ns(load, merged, c) for c in [merged, None, *wanted]}
        assert costs[chosen] == pytest.approx(min(costs.values()))
        assert chosen is merged or costs[chosen] < costs[merged]


def total_ns(load: list[Load], merged: Version | None, candidate: Version | None) -> float:
    """Return the time to add all tokens with this adapter merged, and to switch to it, if later
    requests are like those that run."""
    total = 0.0
    out = 0 if candidate is None else candidate.nnz
    running = [each for each in load if each.is_running] or load
    num_tokens = sum(min(each.num_tokens, HORIZON) for each in load) / len(running)
    for each in running:
        if each.version is candidate:
            continue
        if each.version is None:
            entries = BASE_CORRECTION * out
        else:
            own = each.version.nnz
            share = SAME_INDEX_CORRECTION if own == out else OTHER_INDEX_CORRECTION
            entries = own + share * out
        total += LANE_NS["cuda"] * num_tokens * entries
    if candidate is not merged:
        written = sum(version.nnz for version in (merged, candidate) if version is not None)
        total += _HYSTERESIS * WRITE_NS["cuda"] * written
    return total


# --- the CPU, which computes 16 tokens side by side --------------------------------------------


def test_constants_are_the_kernels():
    assert merge_policy.LANES == cpu_vectors.LANES
    assert merge_policy.FEW_LANES == cpu_blocks.FEW_LANES


@pytest.mark.parametrize(
    ("lanes", "computed"),
    [(0, 0), (1, 1), (2, 2), (4, 16), (12.8, 16), (16, 16), (17, 17), (30, 32)],
)
def test_few_tokens_are_computed_alone_and_more_of_them_side_by_side(lanes, computed):
    assert lanes_computed(lanes) == computed


@pytest.mark.parametrize(("num_others", "pays"), [(1, True), (2, True), (5, False), (8, False)])
def test_merging_pays_where_few_others_are_left(num_others, pays):
    """With more than three others a whole block is computed, whoever is merged."""
    a, b = Version(), Version()
    load = loads((a, HORIZON * (16 - num_others)), (b, HORIZON * num_others))
    assert MergePolicy("cpu", 16).choose(load, None) is (a if pays else None)


def test_waiting_requests_make_no_wider_steps():
    a, b = Version(), Version()
    load = loads((a, HORIZON * 90), (b, HORIZON * 10))
    assert MergePolicy("cpu", 16).choose(load, None) is a
    mixed = loads((a, HORIZON * 40), (b, HORIZON * 60))
    assert MergePolicy("cpu", 16).choose(mixed, None) is None
