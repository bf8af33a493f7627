"""The scheduler on fake sequences, adapters and KV cache: slots, budget, shares and turns."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.engine.adapter_turns import TURN_STEPS
from neuroada_serve.engine.fairness import AFFINITY, OUTPUT_COST, PROMPT_COST, FairQueue
from neuroada_serve.engine.scheduler import _MOST_OVERTAKEN, Scheduler
from neuroada_serve.engine.sequence import LEAST_PROGRESS, Sequence
from tests.support.blocks import new_tables
from tests.support.scheduling import Clients, FakeAdapters, FakeEngine, Version, new_sequence


class AdaptersSaid:
    """Every adapter is where it is said to be, for ever; on the device where nothing is said."""

    def __init__(self, said: dict[Version, Readiness]) -> None:
        self._said = said

    def is_ready(self, version: Version) -> bool:
        return self.request(version) is Readiness.READY

    def request(self, version: Version) -> Readiness:
        return self._said.get(version, Readiness.READY)

    def hold(self, version: Version) -> bool:
        return self.is_ready(version)

    def release(self, version: Version) -> None:
        assert self.is_ready(version)


# --- any traffic ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_traffic_keeps_slots_budget_cache_and_holds(data):
    engine, versions = draw_engine(data)
    scheduler, expected = engine.scheduler, set()
    for i in range(data.draw(st.integers(5, 40), "actions")):
        action = data.draw(st.sampled_from(["add", "add", "step", "steps", "abort"]))
        if action == "add":
            for sequence in draw_request(data, f"r{i}", versions):
                engine.add(sequence)
                expected.add(sequence)
        elif action != "abort":
            engine.run(1 if action == "step" else TURN_STEPS)
        elif sequences := [*scheduler.running.values(), *scheduler.waiting]:
            aborted = data.draw(st.sampled_from(sequences))
            scheduler.remove(aborted)
            expected.discard(aborted)
            assert aborted.slot is None
            engine.check_state()
    engine.drain()
    ended = [*engine.finished, *engine.failed]
    assert expected <= set(ended)
    assert len(ended) == len(set(ended))
    assert all(sequence.version is not None for sequence in engine.failed)


def draw_engine(data) -> tuple[FakeEngine, list[Version | None]]:
    """Its adapters differ in size, may be pinned, or fail; each has room beside the pinned."""
    max_num_seqs = data.draw(st.integers(1, 6), "max_num_seqs")
    room = data.draw(st.integers(1, 3), "room")
    sizes = data.draw(st.lists(st.integers(1, min(room, 2)), min_size=1, max_size=5), "sizes")
    versions = [Version(f"a{i}", size) for i, size in enumerate(sizes)]
    versions[0].is_pinned = sizes[0] + max(sizes) <= room and data.draw(st.booleans(), "pinned")
    versions[-1].num_faults = data.draw(st.sampled_from([0, 0, 1, 99]), "faults")
    engine = FakeEngine(
        max_num_seqs,
        data.draw(st.integers(max_num_seqs, 20), "budget"),
        FakeAdapters(room, *data.draw(st.tuples(st.integers(0, 4), st.integers(0, 2)), "steps")),
        FairQueue({"gold": 3.0}, {"a1": 0.5}),
        data.draw(st.sampled_from([None, new_tables(30, 2), new_tables(1000, 3)]), "tables"),
    )
    return engine, [None, *versions]


def draw_request(data, request_id: str, versions: list[Version | None]) -> Iterator[Sequence]:
    lengths = data.draw(st.tuples(st.integers(1, 25), st.integers(1, 30)))
    version, tenant = data.draw(st.tuples(st.sampled_from(versions), st.sampled_from(["", "gold"])))
    for index in range(data.draw(st.sampled_from([1, 1, 1, 3]), "n")):
        yield new_sequence(request_id, *lengths, version, tenant, index)


# --- the base alone: slots and budget -------------------------------------------------------------


def test_sequences_start_in_the_order_they_came():
    scheduler = Scheduler(2, 100)
    for i in range(4):
        scheduler.add(new_sequence(f"r{i}"))
    assert [s.request_id for s in scheduler.schedule().running] == ["r0", "r1"]
    scheduler.remove(scheduler.running[0])
    assert [s.request_id for s in scheduler.schedule().running] == ["r1", "r2"]


def test_lowest_free_slot_is_used_first():
    engine = FakeEngine(4)
    engine.add(*(new_sequence(name, 1, 9) for name in "abcd"))
    engine.step()
    for name in "ca":
        engine.scheduler.remove(engine.scheduler.find(name)[0])
    engine.add(new_sequence("e"), new_sequence("f"))
    engine.step()
    assert [engine.scheduler.find(name)[0].slot for name in "efbd"] == [0, 2, 1, 3]


def test_decodes_are_in_the_order_of_their_slots():
    engine = FakeEngine(3)
    engine.add(*(new_sequence(name, 1, 9) for name in "abc"))
    engine.step()
    engine.scheduler.remove(engine.scheduler.find("a")[0])
    engine.add(new_sequence("d", 1, 9))
    engine.step()
    assert [s.request_id for s in engine.step().decodes] == ["d", "b", "c"]


def test_long_prompt_is_prefilled_in_chunks_beside_decodes():
    engine = FakeEngine(4, budget=5)
    engine.add(new_sequence("short", 2, max_tokens=9), new_sequence("long", 12, max_tokens=9))
    chunks = [[chunk.num_tokens for chunk in s.prefills] for s in engine.run(4)]
    assert chunks == [[2, 3], [4], [4], [1]]


def test_decodes_run_in_every_step():
    engine = FakeEngine(3, budget=3)
    engine.add(new_sequence("a", 1, max_tokens=20))
    engine.step()
    engine.add(new_sequence("b", 30, max_tokens=1))
    for num_tokens in range(2, 20):
        engine.step()
        assert len(engine.scheduler.find("a")[0].output_token_ids) == num_tokens


def test_prompt_tokens_at_hand_are_neither_computed_nor_charged():
    engine = FakeEngine(1, tables=new_tables(20, 2))
    engine.add(new_sequence("before", 6, max_tokens=1))
    engine.drain()
    sequence = new_sequence("a", 10, max_tokens=2)
    engine.add(sequence)
    before = engine.scheduler.waiting.rank(sequence)[0]
    (chunk,) = engine.step().prefills
    assert chunk.num_tokens == 4
    assert engine.scheduler.waiting.rank(sequence)[0] - before == 4 * PROMPT_COST + OUTPUT_COST


def test_prompt_tokens_that_another_computes_meanwhile_are_not_charged():
    engine = FakeEngine(2, budget=20, tables=new_tables(40, 2))
    one, other = (new_sequence(name, 10, max_tokens=20) for name in "ab")
    engine.add(one, other)
    rank = engine.scheduler.waiting.rank
    before = rank(other)[0]
    while not other.output_token_ids:
        engine.step()
    assert other.num_cached >= 8
    computed = 20 - other.num_cached  # of both
    num_answered = len(one.output_token_ids) + len(other.output_token_ids)
    assert rank(other)[0] - before == computed * PROMPT_COST + num_answered * OUTPUT_COST


def test_adapter_is_brought_while_its_sequence_waits_for_blocks():
    holding, coming = Version("holding"), Version("coming")
    adapters = FakeAdapters(room=2, load_steps=3)
    engine = FakeEngine(2, budget=64, adapters=adapters, tables=new_tables(10, 2))
    engine.add(new_sequence("h", 10, 9, holding))
    engine.run(4)
    late = new_sequence("late", 10, 1, coming)
    engine.add(late)
    engine.run(4)
    assert late.slot is None, "there are no blocks for it"
    assert adapters.is_ready(coming)
    engine.drain()


def test_nothing_to_do_is_an_empty_schedule():
    scheduler = Scheduler(2, 4)
    assert scheduler.schedule().is_empty
    assert not scheduler.has_unfinished


def test_sequence_removed_while_waiting_never_runs():
    scheduler = Scheduler(1, 4)
    for name in ("a", "b", "c"):
        scheduler.add(new_sequence(name))
    scheduler.schedule()
    scheduler.remove(scheduler.find("b")[0])
    scheduler.remove(scheduler.find("a")[0])
    assert [s.request_id for s in scheduler.schedule().running] == ["c"]


def test_find_gives_all_choices_of_a_request():
    engine = FakeEngine(2)
    engine.add(*(new_sequence("a", index=index) for index in range(3)), new_sequence("b"))
    engine.step()
    assert [s.index for s in engine.scheduler.find("a")] == [0, 1, 2]
    assert engine.scheduler.find("x") == []
    for sequence in engine.scheduler.find("a"):
        engine.scheduler.remove(sequence)
    assert engine.scheduler.find("a") == []
    engine.drain()
    assert [s.request_id for s in engine.finished] == ["b"]


def test_sequence_gives_its_next_tokens():
    sequence = new_sequence("a", 5)
    assert sequence.next_tokens(3) == [0, 1, 2]
    sequence.num_computed = 3
    assert sequence.next_tokens(2) == [3, 4]
    sequence.num_computed = 5
    sequence.output_token_ids.append(9)
    assert sequence.next_tokens(1) == [9]
    assert sequence.num_tokens == 6
    with pytest.raises(AssertionError):
        sequence.next_tokens(2)


# --- shares ---------------------------------------------------------------------------------------


def test_flood_of_one_tenant_does_not_delay_another():
    engine = FakeEngine(2)
    engine.add(*(new_sequence(f"r{i}", 2, 4, tenant="flood") for i in range(50)))
    engine.run(3)
    single = new_sequence("single", tenant="other")
    engine.add(single)
    engine.run(4)  # as long as a request takes
    assert single in engine.first_token


def test_base_and_adapters_share_alike():
    versions = [Version("a"), Version("b"), None]
    engine = FakeEngine(4, adapters=FakeAdapters(room=2))
    clients = Clients(engine, versions, num_each=3)
    clients.run(1000)
    assert max(engine.served.values()) <= 1.05 * min(engine.served.values())


def test_answered_tokens_count_against_a_claim():
    a, b = Version("a"), Version("b")
    engine = FakeEngine(1)
    engine.add(*(new_sequence(f"a{i}", 1, 40, a) for i in range(2)), new_sequence("b", 2, 1, b))
    engine.drain()
    assert [s.request_id for s in engine.finished] == ["a0", "b", "a1"]


# --- adapters on their way ------------------------------------------------------------------------


def test_adapter_on_its_way_holds_up_only_its_own_requests():
    slow, quick = Version("slow"), Version("quick")
    adapters = FakeAdapters(room=2, load_steps=6)
    adapters.idle[quick] = None
    engine = FakeEngine(3, adapters=adapters)
    late = new_sequence("late", version=slow)
    engine.add(late, new_sequence("a", version=quick), new_sequence("b"))
    engine.step()
    assert sorted(s.request_id for s in engine.first_token) == ["a", "b"]
    assert late.slot is None
    engine.drain()
    assert engine.first_token[late] == 1 + adapters.load_steps


def test_adapter_that_comes_at_once_is_used_at_once():
    engine = FakeEngine(1, adapters=FakeAdapters(room=1, load_steps=0))
    engine.add(new_sequence("a", version=Version("a")))
    assert not engine.step().is_empty


def test_slow_adapter_takes_one_slot_however_many_want_it():
    slow = Version("slow")
    engine = FakeEngine(3, adapters=FakeAdapters(room=1, load_steps=400))
    engine.add(*(new_sequence(f"s{i}", version=slow) for i in range(20)))
    clients = Clients(engine, [None], num_each=6, most_prompt=1, most_output=1)
    clients.run(300)
    assert [s.version for s in engine.scheduler.running.values()] == [slow]
    assert engine.served[None] >= 2 * 280


@pytest.mark.parametrize("others", [Readiness.READY, Readiness.NO_ROOM])
def test_later_claims_overtake_only_so_often(others):
    """One whose adapter is still on its way takes a slot then, to hold it as soon as it comes."""
    slow, other = Version("slow"), Version("other")
    scheduler = Scheduler(1, 16, adapters=AdaptersSaid({slow: Readiness.COMING, other: others}))
    first, *later = [new_sequence(f"r{i}", 1, 1, other if i else slow) for i in range(30)]
    for sequence in (first, *later):
        scheduler.add(sequence)
    scheduler.waiting.charge(later[0], AFFINITY + 1)
    for _ in range(_MOST_OVERTAKEN):
        (overtakes,) = scheduler.schedule().running
        assert overtakes is not first
        scheduler.remove(overtakes)
    assert scheduler.schedule().running == (first,)


def test_adapter_that_is_evicted_before_it_is_held_is_asked_for_again():
    """A loader thread may take its room at any moment for another one."""

    class Evicted(AdaptersSaid):
        is_there = False

        def hold(self, version: Version) -> bool:
            return self.is_there

    adapters = Evicted({})
    scheduler = Scheduler(1, 16, adapters=adapters)
    sequence = new_sequence("r", version=Version("a"))
    scheduler.add(sequence)
    assert scheduler.schedule().is_empty
    assert not sequence.has_adapter
    adapters.is_there = True
    assert scheduler.schedule().scheduled == (sequence,)


# --- affinity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lead", "goes_first"), [(0, "here"), (AFFINITY, "here"), (AFFINITY + 1, "there")]
)
def test_adapter_on_the_device_goes_first_among_level_claims_only(lead, goes_first):
    here, there = Version("here"), Version("there")
    scheduler = Scheduler(1, 16, adapters=AdaptersSaid({there: Readiness.NO_ROOM}))
    scheduler.add(new_sequence("there", version=there))
    one = new_sequence("here", version=here)
    scheduler.add(one)
    scheduler.waiting.charge(one, lead)
    assert [s.request_id for s in scheduler.schedule().running] == [goes_first]


def test_affinity_does_not_reach_across_tenants():
    here, there = Version("here"), Version("there")
    scheduler = Scheduler(1, 16, adapters=AdaptersSaid({there: Readiness.NO_ROOM}))
    scheduler.add(new_sequence("there", version=there, tenant="first"))
    one = new_sequence("here", version=here, tenant="second")
    scheduler.add(one)
    scheduler.waiting.charge(one, 1)
    assert [s.request_id for s in scheduler.schedule().running] == ["there"]


# --- failures -------------------------------------------------------------------------------------


def test_failed_adapter_fails_only_its_own_sequences():
    broken, good = Version("broken", num_faults=99), Version("good")
    engine = FakeEngine(3, adapters=FakeAdapters(room=2))
    bad = [new_sequence(f"bad{i}", version=broken) for i in range(3)]
    others = [new_sequence("a", version=good), new_sequence("b")]
    engine.add(bad[0], others[0], bad[1], others[1], bad[2])
    engine.drain()
    assert set(engine.failed) == set(bad)
    assert set(engine.finished) == set(others)


def test_failure_of_an_adapter_is_told_to_those_who_wait_in_slots():
    broken, other = Version("broken", num_faults=1), Version("other")
    engine = FakeEngine(2, adapters=FakeAdapters(room=1, load_steps=3))
    engine.add(new_sequence("a", 2, 30, other))
    engine.run(5)
    waits = new_sequence("b", version=broken)
    engine.add(waits)
    engine.step()
    assert waits.slot is not None
    engine.drain()
    assert engine.failed == [waits]
    assert len(engine.finished) == 1


def test_adapter_that_failed_once_can_be_had_again():
    broken = Version("broken", num_faults=1)
    engine = FakeEngine(1, adapters=FakeAdapters(room=1))
    engine.add(new_sequence("a", version=broken))
    engine.drain()
    engine.run(5)
    engine.add(new_sequence("b", version=broken))
    engine.drain()
    assert [s.request_id for s in engine.failed + engine.finished] == ["a", "b"]


def test_abort_of_a_parked_sequence_leaves_nothing_held():
    a, b = Version("a"), Version("b")
    engine = FakeEngine(2, adapters=FakeAdapters(room=1, load_steps=1))
    engine.add(new_sequence("a", 2, 40, a), new_sequence("b", 2, 40, b))
    engine.run_until(lambda: engine.scheduler.num_parked == 2)
    for name in "ab":
        engine.scheduler.remove(engine.scheduler.find(name)[0])
    engine.drain()
    assert engine.run(1)[0].is_empty


def fill(
    engine: FakeEngine,
    num: int,
    tenant: str = "",
    version: Version | None = None,
    client: str = "",
    **one,
):
    """Sequences of a long answer, whose prompts are computed and begun."""
    for i in range(num):
        name = one.get("request_id", f"{tenant}{version and version.name}{client}{i}")
        max_tokens = one.get("max_tokens", 1500)
        engine.add(new_sequence(name, 3, max_tokens, version, tenant, i, client))
    engine.run(LEAST_PROGRESS + 2)


# --- slots taken back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hog", "other"),
    [
        ({"tenant": "hog"}, {"tenant": "other"}),
        ({"version": Version("a")}, {"version": Version("b")}),
        ({"version": Version("a")}, {}),
        ({"client": "hog"}, {"client": "other"}),
        ({"request_id": "one"}, {"request_id": "another"}),
    ],
)
def test_waiting_request_gets_a_slot_of_whoever_has_all(hog, other):
    engine = FakeEngine(16, budget=64)
    fill(engine, 16, max_tokens=4 * LEAST_PROGRESS, **hog)
    single = new_sequence(**{"request_id": "single", "num_prompt": 3, "max_tokens": 1} | other)
    engine.add(single)
    engine.run(1)
    assert engine.finished == [single]
    engine.drain()
    assert len(engine.finished) == 17


def test_slots_go_to_equal_shares_and_stay():
    engine = FakeEngine(8, budget=64)
    fill(engine, 12, "a")
    fill(engine, 12, "b")
    for _ in range(200):
        engine.step()
        tenants = Counter(s.tenant for s in engine.scheduler.running.values())
        assert tenants == {"a": 4, "b": 4}
    assert sum(s.num_preempted for s in engine.added) == 4


def test_slots_are_shared_by_weight():
    engine = FakeEngine(8, budget=64, queue=FairQueue({"gold": 3.0}))
    fill(engine, 8, "other")
    fill(engine, 8, "gold")
    tenants = Counter(s.tenant for s in engine.scheduler.running.values())
    assert tenants == {"gold": 6, "other": 2}


def test_youngest_of_whoever_has_most_goes():
    engine = FakeEngine(6, budget=64)
    fill(engine, 4, "most")
    fill(engine, 2, "some")
    engine.add(new_sequence("new", tenant="new"))
    engine.step()
    (gone,) = [s for s in engine.added if s.num_preempted]
    assert gone.request_id == "mostNone3"
    assert gone in engine.scheduler.waiting


def test_nobody_goes_for_an_equal():
    engine = FakeEngine(2, budget=64)
    fill(engine, 1, "a")
    fill(engine, 1, "b")
    engine.add(new_sequence("c", tenant="c"), new_sequence("a2", tenant="a"))
    engine.add(new_sequence("b2", tenant="b", client="another"))
    engine.run(50)
    assert not any(s.num_preempted for s in engine.added)


def test_whoever_has_had_more_takes_no_slot_back():
    engine = FakeEngine(4, budget=64)
    fill(engine, 4, "a")
    late = new_sequence("b", tenant="b")
    engine.add(late)
    engine.scheduler.waiting.charge(late, 10_000)
    engine.run(20)
    assert late.slot is None


def test_progress_doubles_with_each_preemption():
    sequence = new_sequence("a", 3, 1000)
    for number in range(5):
        sequence.output_token_ids += [7] * ((LEAST_PROGRESS << number) - 1)
        assert not sequence.may_be_preempted
        sequence.output_token_ids.append(7)
        assert sequence.may_be_preempted
        sequence.preempt()
    sequence.max_tokens = len(sequence.output_token_ids) + 300
    sequence.output_token_ids += [7] * (300 - LEAST_PROGRESS)
    assert not sequence.may_be_preempted, "it is about to end"


def test_preempted_sequence_computes_its_answer_like_a_prompt():
    sequence = new_sequence("a", 3, 100)
    sequence.output_token_ids += [10, 11, 12]
    sequence.num_computed = 5
    sequence.preempt()
    assert (sequence.num_prefill, sequence.num_computed) == (6, 0)
    assert sequence.next_tokens(4) == [0, 1, 2, 10]
    sequence.num_computed = 4
    assert sequence.next_tokens(2) == [11, 12]
    sequence.num_computed = 6
    sequence.output_token_ids.append(13)
    assert sequence.is_decoding
    assert sequence.next_tokens(1) == [13]


def test_recomputing_is_not_charged():
    engine = FakeEngine(2, budget=64)
    fill(engine, 2, "a")
    single = new_sequence("b", 3, 1, tenant="b")
    engine.add(single)
    engine.step()
    (gone,) = [s for s in engine.added if s.num_preempted]
    before = engine.scheduler.waiting.rank(gone)[0]
    engine.run(2)
    assert gone.slot is not None
    num_answered = 4  # by both, in two steps
    assert engine.scheduler.waiting.rank(gone)[0] <= before + num_answered * OUTPUT_COST


def test_slot_is_given_only_to_whom_has_its_adapter():
    hog, coming = Version("hog"), Version("coming")
    adapters = FakeAdapters(room=2, load_steps=5)
    engine = FakeEngine(2, budget=64, adapters=adapters)
    engine.add(*(new_sequence(f"h{i}", 3, 500, hog) for i in range(2)))
    engine.run(30)
    late = new_sequence("late", 3, 1, coming)
    engine.add(late)
    engine.run(3)
    assert len(engine.scheduler.running) == 2
    assert not any(s.num_preempted for s in engine.added)
    engine.run(6)
    assert late in engine.finished


@pytest.mark.parametrize("num_steps", [4, 8, 12])
def test_turn_goes_on_when_a_slot_goes_to_another_of_the_same_adapter(num_steps):
    one, other = Version("one"), Version("other")
    engine = FakeEngine(2, budget=64, adapters=FakeAdapters(room=1, load_steps=0))
    engine.add(new_sequence("r0", 1, 60, one))
    engine.run(LEAST_PROGRESS + 2)
    engine.add(new_sequence("r1", 3, 60, other))
    engine.run(num_steps)
    late = new_sequence("r2", 1, 2, one, tenant="late")
    engine.add(late)
    engine.drain()
    assert engine.finished[0] is late
