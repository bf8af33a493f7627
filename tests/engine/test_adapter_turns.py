"""Turns of adapters on the device: who is parked, who comes in, and who never starves."""

import random

import pytest

from neuroada_serve.engine.adapter_turns import MOST_PARKED, TURN_STEPS
from neuroada_serve.engine.fairness import AFFINITY, OUTPUT_COST
from neuroada_serve.engine.scheduler import (
    _MOST_OVERTAKEN,
    Schedule,
)
from tests.support.scheduling import Clients, FakeAdapters, FakeEngine, Version, new_sequence


def test_adapter_keeps_its_place_for_its_turn_and_goes_on_later():
    a, b = Version("a"), Version("b")
    engine = FakeEngine(2, adapters=FakeAdapters(room=1, load_steps=1))
    one, two = new_sequence("a", 2, 40, a), new_sequence("b", 2, 40, b)
    engine.add(one)
    engine.run(2)  # on its way, then there
    engine.add(two)
    assert computed(engine.run(TURN_STEPS - 1)) == ["a"] * (TURN_STEPS - 1)
    place = one.slot, one.num_computed
    assert computed(engine.run(TURN_STEPS + 1)) == [""] + ["b"] * TURN_STEPS
    assert (one.slot, one.num_computed) == place
    engine.drain()
    assert engine.finished == [one, two]


def computed(schedules: list[Schedule]) -> list[str]:
    """Names of those that each step computes."""
    return [
        " ".join(s.request_id for s in (*x.decodes, *(chunk.sequence for chunk in x.prefills)))
        for x in schedules
    ]


def test_sequence_parked_within_its_prompt_goes_on_within_it():
    engine = FakeEngine(2, budget=2, adapters=FakeAdapters(room=1))
    one, two = [new_sequence(name, 40, 1, Version(name)) for name in "ab"]
    engine.add(one, two)
    engine.scheduler.waiting.charge(one, 1)
    engine.run_until(lambda: engine.scheduler.num_parked > 0)
    assert one.num_computed == 2 * TURN_STEPS
    engine.drain()  # checks that nothing is computed twice
    assert engine.finished == [two, one]


def test_nobody_leaves_for_a_later_claim():
    a, b = Version("a"), Version("b")
    engine = FakeEngine(2, adapters=FakeAdapters(room=1, load_steps=0))
    one, two = new_sequence("a", 2, 40, a), new_sequence("b", 2, 40, b)
    engine.add(one)
    engine.run(2)
    engine.add(two)
    engine.run_until(lambda: bool(two.output_token_ids))
    rank = engine.scheduler.waiting.rank
    lead = OUTPUT_COST * (TURN_STEPS + 1)
    engine.scheduler.waiting.charge(one, rank(two)[1] - rank(one)[1] + lead)
    engine.run(TURN_STEPS)
    assert two.has_adapter
    engine.run_until(lambda: not two.has_adapter)
    assert 0 < rank(two)[1] - rank(one)[1] <= OUTPUT_COST


def test_who_has_no_token_yet_goes_before_those_who_have_had_less():
    a, b = Version("a"), Version("b")
    engine = FakeEngine(2, adapters=FakeAdapters(room=1, load_steps=0))
    one, two = new_sequence("a", 2, 90, a), new_sequence("b", 16, 90, b)
    engine.add(one)
    engine.run(TURN_STEPS)
    engine.add(two)
    engine.scheduler.waiting.charge(two, 1000)
    engine.run(2)
    assert two.output_token_ids
    engine.run_until(lambda: one.has_adapter)
    assert len(two.output_token_ids) == TURN_STEPS
    engine.run(5 * TURN_STEPS)
    assert len(two.output_token_ids) <= 3 * TURN_STEPS  # its share, once it has a token


def test_nobody_is_parked_for_long_by_those_who_keep_coming():
    """A long answer among endless requests of one token each, of twelve other adapters: one of them
    always has no token yet."""
    engine = FakeEngine(16, adapters=FakeAdapters(room=2, load_steps=1))
    long = new_sequence("long", 2, 200, Version("long"))
    engine.add(long)
    clients = Clients(engine, [Version(f"a{i}") for i in range(12)], num_each=1, most_output=1)
    gap = longest = 0
    while long.slot is not None or not long.output_token_ids:
        before = len(long.output_token_ids)
        clients.run(1)
        gap = 0 if len(long.output_token_ids) > before else gap + 1
        longest = max(longest, gap)
        assert engine.steps < 3000
    assert longest <= MOST_PARKED + 2 * TURN_STEPS


@pytest.mark.parametrize("prompt", [4, 100])
@pytest.mark.parametrize("seed", range(3))
def test_first_tokens_seldom_wait_for_turns(prompt, seed):
    """Six adapters at random times, with room for three."""
    draw = random.Random(seed)
    versions = [Version(f"a{i}") for i in range(6)]
    engine = FakeEngine(64, budget=512, adapters=FakeAdapters(3, load_steps=1))
    for i in range(600):
        engine.add(new_sequence(f"r{i}", prompt, 32, draw.choice(versions)))
        engine.run(round(draw.expovariate(1 / 7)))
    engine.drain()
    waits = sorted(engine.waits())
    assert engine.scheduler.num_parked > 300
    assert waits[int(0.99 * len(waits))] <= TURN_STEPS + 2


def test_adapter_with_most_leaves_first():
    most, less, new = Version("most"), Version("less"), Version("new")
    engine = FakeEngine(4, adapters=FakeAdapters(room=2, load_steps=0))
    engine.add(*(new_sequence(f"m{i}", 2, 90, most) for i in range(2)))
    engine.add(new_sequence("l", 2, 90, less))
    engine.run(TURN_STEPS)
    engine.add(new_sequence("n", 2, 90, new))
    engine.run(2)
    assert engine.adapters.holders.keys() == {less, new}
    assert all(not s.has_adapter for s in engine.scheduler.find("m0") + engine.scheduler.find("m1"))


def test_of_those_without_room_the_first_claim_comes_in():
    engine = FakeEngine(3, adapters=FakeAdapters(room=1, load_steps=0))
    a, b, c = [new_sequence(name, 2, 90, Version(name)) for name in "abc"]
    engine.add(a)
    engine.step()
    engine.add(b, c)
    engine.step()
    engine.scheduler.waiting.charge(b, 5)
    engine.run(TURN_STEPS)
    assert engine.adapters.holders.keys() == {c.version}


def test_pinned_adapters_never_leave():
    pinned, other = Version("pinned", is_pinned=True), [Version(name) for name in "abc"]
    engine = FakeEngine(4, adapters=FakeAdapters(room=2, load_steps=2))
    clients = Clients(engine, [pinned, *other], num_each=1, most_output=30)
    clients.run(300)
    assert all(engine.served[version.name] > 60 for version in [pinned, *other])
    assert engine.scheduler.num_parked > 5  # checked in every step: none of them was pinned


def test_what_never_has_room_is_told_of():
    """It waits in a slot; that it is hopeless is for the engine to find."""
    adapters = FakeAdapters(room=1)
    pinned, other = Version("pinned", is_pinned=True), Version("other")
    adapters.idle[pinned] = None
    engine = FakeEngine(2, adapters=adapters)
    one = new_sequence("a", version=other)
    engine.add(one)
    assert all(schedule.starved == (one,) for schedule in engine.run(5))


@pytest.mark.parametrize("fresh_steps", [0, 3])
@pytest.mark.parametrize("load_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_six_adapters_with_room_for_three_all_get_on(load_steps, fresh_steps, seed):
    """Endless traffic of two clients each. A first token comes within twelve turns with their
    loads: every second is the adapter's own, and one request of another client is before it."""
    engine = FakeEngine(8, adapters=FakeAdapters(3, load_steps, fresh_steps))
    Clients(engine, [Version(f"a{i}") for i in range(6)], 2, seed).run(1000)
    assert max(engine.waits()) <= 12 * (TURN_STEPS + load_steps)
    assert len(engine.served) == 6
    assert max(engine.served.values()) <= 1.2 * min(engine.served.values())
    assert engine.scheduler.num_parked > 20


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_no_adapter_starves_where_slots_are_few(max_num_seqs):
    """Before a client's request go at most: one of each other client; what the adapters that are
    there may have ahead; and those that overtake while its own is on its way."""
    engine = FakeEngine(max_num_seqs, adapters=FakeAdapters(room=3, load_steps=3))
    Clients(engine, [Version(f"a{i}") for i in range(6)], most_prompt=4, most_output=6).run(2000)
    most_steps = 1 + 3 + 6  # of one request
    ahead = 5 * AFFINITY / OUTPUT_COST
    assert max(engine.waits()) <= (12 + _MOST_OVERTAKEN) * most_steps + ahead
    assert max(engine.served.values()) <= 1.2 * min(engine.served.values())


@pytest.mark.parametrize("fresh_steps", [0, 3])
@pytest.mark.parametrize(("room", "num_small", "large"), [(4, 5, 4), (4, 5, 3), (8, 12, 8)])
def test_large_adapter_gets_its_turns_among_small_ones(room, num_small, large, fresh_steps):
    """For it to come in, many others must have left at once."""
    versions = [Version("large", large), *(Version(f"a{i}") for i in range(num_small))]
    engine = FakeEngine(12, adapters=FakeAdapters(room, 3, fresh_steps))
    Clients(engine, versions, most_output=30).run(1500)
    assert min(engine.served.values()) >= 0.8 * max(engine.served.values())
    assert max(engine.waits()) <= 400


def test_large_adapter_comes_in_among_many_short_requests():
    """Small ones that are on their way would be in its way for ever, one after the other."""
    versions = [Version("large", 4), *(Version(f"a{i}") for i in range(3))]
    engine = FakeEngine(12, adapters=FakeAdapters(4, load_steps=9, fresh_steps=1))
    Clients(engine, versions, most_output=1).run(1000)
    assert max(engine.waits()) <= 100


def test_adapter_that_never_fits_does_not_stop_the_others():
    pinned, huge = Version("pinned", 2, is_pinned=True), Version("huge", 3)
    small = [Version(f"a{i}") for i in range(4)]
    adapters = FakeAdapters(room=4, load_steps=3)
    adapters.idle[pinned] = None
    engine = FakeEngine(8, adapters=adapters)
    Clients(engine, [None, pinned, huge, *small], num_each=1).run(1000)
    assert all(engine.served[version.name] > 200 for version in small)
