"""The scheduler on fake sequences, adapters and KV cache: slots, budget, shares and turns."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.engine.adapter_turns import MOST_PARKED, TURN_STEPS
from neuroada_serve.engine.fairness import AFFINITY, OUTPUT_COST, PROMPT_COST, FairQueue
from neuroada_serve.engine.scheduler import (
    _MOST_OVERTAKEN,
    Chunk,
    Schedule,
    Scheduler,
)
from neuroada_serve.engine.sequence import LEAST_PROGRESS, Sequence
from neuroada_serve.request import SamplingParams


@dataclass(eq=False)
class Version:
    """size: what it takes of the device's room. num_faults: loads of it that will fail."""

    name: str
    size: int = 1
    is_pinned: bool = False
    num_faults: int = 0


class FakeAdapters:
    """A device with so much room. As on a real one, whoever looks for room has the idle adapters
    leave, one by one, the longest idle first, whether it gets enough or not.

    Args:
        load_steps: how long an adapter is on its way.
        fresh_steps: how long one that has come is not made to leave.
    """

    def __init__(self, room: int, load_steps: int = 2, fresh_steps: int = 0) -> None:
        self.room, self.load_steps, self.fresh_steps = room, load_steps, fresh_steps
        self.coming: dict[Version, int] = {}  # -> steps to come
        self.idle: dict[Version, None] = {}  # on the device and not held
        self.holders: Counter[Version] = Counter()
        self.failed: dict[Version, int] = {}  # -> steps until it is tried again
        self.num_loads = 0
        self._fresh: dict[Version, int] = {}

    def step(self) -> None:
        """Time passes."""
        self._fresh = {v: left - 1 for v, left in self._fresh.items() if left > 1}
        self.failed = {v: left - 1 for v, left in self.failed.items() if left > 1}
        for version in list(self.coming):
            self.coming[version] -= 1
            if self.coming[version] <= 0:
                self._arrive(version)

    def is_ready(self, version: Version) -> bool:
        return version in self.idle or version in self.holders

    def request(self, version: Version) -> Readiness:
        if not self.is_ready(version) and version not in self.coming | self.failed:
            while self.room - self.used < version.size:
                if not self._make_room():
                    return Readiness.NO_ROOM
            self.coming[version] = self.load_steps
            self.num_loads += 1
            if not self.load_steps:
                self._arrive(version)
        if version in self.failed:
            return Readiness.FAILED
        return Readiness.COMING if version in self.coming else Readiness.READY

    def can_leave(self, version: Version) -> bool:
        return not version.is_pinned

    def hold(self, version: Version) -> bool:
        if not self.is_ready(version):
            return False
        self.idle.pop(version, None)
        self._fresh.pop(version, None)
        self.holders[version] += 1
        return True

    def release(self, version: Version) -> None:
        self.holders[version] -= 1
        assert self.holders[version] >= 0
        if not self.holders[version]:
            del self.holders[version]
            self.idle[version] = None

    @property
    def used(self) -> int:
        return sum(version.size for version in {*self.idle, *self.holders, *self.coming})

    def _arrive(self, version: Version) -> None:
        del self.coming[version]
        if version.num_faults:
            version.num_faults -= 1
            self.failed[version] = 3
        else:
            self.idle[version] = None
            self._fresh[version] = self.fresh_steps

    def _make_room(self) -> bool:
        for version in self.idle:
            if not version.is_pinned and not self._fresh.get(version):
                del self.idle[version]
                return True
        return False


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


def new_sequence(
    request_id: str,
    num_prompt: int = 3,
    max_tokens: int = 4,
    version: Version | None = None,
    tenant: str = "",
    index: int = 0,
    client: str = "",
) -> Sequence:
    return Sequence(
        request_id=request_id,
        index=index,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        end_token_ids=frozenset(),
        lease=None if version is None else SimpleNamespace(version=version),
        detokenizer=None,
        tenant=tenant,
        client=client,
    )


class FakeEngine:
    """Runs schedules on a cache that only remembers what was written: (sequence, position). Checks
    in every step what must always hold.

    Args:
        reuse: of every prompt, so many tokens are in the prefix cache.
    """

    def __init__(
        self,
        max_num_seqs: int,
        budget: int = 16,
        adapters: FakeAdapters | None = None,
        queue: FairQueue[Sequence] | None = None,
        reuse: int = 0,
    ) -> None:
        self.adapters = FakeAdapters(room=100, load_steps=0) if adapters is None else adapters
        self.scheduler = Scheduler(
            max_num_seqs, budget, queue, self.adapters, self.adapters.can_leave, self._reuse
        )
        self.cache: dict[tuple[int, int], tuple[Sequence, int]] = {}
        self.steps = 0
        self.finished: list[Sequence] = []
        self.failed: list[Sequence] = []
        self.added: dict[Sequence, int] = {}  # -> step
        self.first_token: dict[Sequence, int] = {}  # -> step
        self.served: Counter[str | None] = Counter()  # tokens, by adapter
        self._num_reused = reuse
        self._reused: set[Sequence] = set()
        self._before: dict[Sequence, tuple[int | None, int, bool]] = {}
        self._turns: dict[Version, int] = {}  # version in use -> step in which it began to be

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.added[sequence] = self.steps
            self.scheduler.add(sequence)

    def run(self, num_steps: int) -> list[Schedule]:
        return [self.step() for _ in range(num_steps)]

    def run_until(self, holds: Callable[[], bool]) -> None:
        start = self.steps
        while not holds():
            assert self.steps < start + 3000
            self.step()

    def drain(self) -> None:
        """Until all have ended; nothing may be left of them."""
        self.run_until(lambda: not self.scheduler.has_unfinished)
        assert not self.adapters.holders
        assert not self.scheduler._turns._begun
        assert not self.scheduler.waiting._accounts.root.num_present
        assert sorted(self.scheduler._free_slots) == list(range(self.scheduler.max_num_seqs))

    def step(self) -> Schedule:
        self.adapters.step()
        schedule = self.scheduler.schedule()
        self.steps += 1
        self.check(schedule)
        for sequence in schedule.failed:
            self.scheduler.remove(sequence)
            self.failed.append(sequence)
        work = [*(Chunk(s, 1) for s in schedule.decodes), *schedule.prefills]
        for chunk in work:
            self.compute(chunk)
        for chunk in work:
            if chunk.sequence.is_decoding:
                self.answer(chunk.sequence)
        self.check_slots()
        self._before = {
            s: (s.slot, s.num_computed, s.has_adapter) for s in self.scheduler.running.values()
        }
        return schedule

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        for position in range(sequence.num_computed):
            assert self.cache[sequence.slot, position] == (sequence, position)
        for position in range(sequence.num_computed, sequence.num_computed + chunk.num_tokens):
            self.cache[sequence.slot, position] = (sequence, position)
        assert len(sequence.next_tokens(chunk.num_tokens)) == chunk.num_tokens
        sequence.num_computed += chunk.num_tokens
        self.served[sequence.adapter] += chunk.num_tokens

    def answer(self, sequence: Sequence) -> None:
        sequence.output_token_ids.append(7)
        self.scheduler.waiting.charge(sequence, OUTPUT_COST)
        self.first_token.setdefault(sequence, self.steps)
        if len(sequence.output_token_ids) == sequence.max_tokens:
            self.finished.append(sequence)
            self.scheduler.remove(sequence)

    def waits(self) -> list[int]:
        """Steps to the first token, of all that were added; those that have none wait still."""
        return [self.first_token.get(s, self.steps) - step for s, step in self.added.items()]

    def check(self, schedule: Schedule) -> None:
        self.check_slots()
        self.check_work(schedule)
        self.check_turns()
        running = list(self.scheduler.running.values())
        assert schedule.running == tuple(running)
        assert all(s.version in self.adapters.failed for s in schedule.failed)
        assert all(s.slot is not None and not s.has_adapter for s in schedule.starved)
        for sequence, (slot, num_computed, _) in self._before.items():
            if sequence.slot is not None:
                assert (sequence.slot, sequence.num_computed) == (slot, num_computed)
        if len(running) < self.scheduler.max_num_seqs:
            assert all(s.version is not None for s in self.scheduler.waiting)

    def check_slots(self) -> None:
        running = self.scheduler.running
        assert all(sequence.slot == slot for slot, sequence in running.items())
        assert all(0 <= slot < self.scheduler.max_num_seqs for slot in running)
        assert all(s.slot is None and not s.has_adapter for s in self.scheduler.waiting)
        holders = Counter(s.version for s in running.values() if s.has_adapter and s.lease)
        assert holders == self.adapters.holders

    def check_work(self, schedule: Schedule) -> None:
        """All decodes, and as much prefill as the budget has, of those whose adapter is held."""
        active = [s for s in self.scheduler.running.values() if s.has_adapter]
        assert all(s.version is None or self.adapters.holders[s.version] for s in active)
        slots = [s.slot for s in schedule.decodes]
        assert slots == sorted(s.slot for s in active if s.is_decoding)
        left = {s: s.num_prefill - s.num_computed for s in active if not s.is_decoding}
        chunks = {chunk.sequence: chunk.num_tokens for chunk in schedule.prefills}
        assert len(chunks) == len(schedule.prefills)
        assert all(0 < num_tokens <= left[s] for s, num_tokens in chunks.items())
        budget = self.scheduler.max_num_batched_tokens - len(slots)
        assert sum(chunks.values()) == min(budget, sum(left.values()))
        assert schedule.is_empty == (not active)

    def check_turns(self) -> None:
        """Whatever had to leave for another was there for its turn, and may leave."""
        for sequence, (_, _, had_adapter) in self._before.items():
            if had_adapter and sequence.slot is not None and not sequence.has_adapter:
                assert self.steps - self._turns[sequence.version] >= TURN_STEPS
                assert not sequence.version.is_pinned
        self._turns = {v: self._turns.get(v, self.steps) for v in self.adapters.holders}

    def _reuse(self, sequence: Sequence) -> int:
        assert sequence.slot is not None
        assert (sequence in self._reused) == (sequence.num_preempted > 0)
        self._reused.add(sequence)
        num_tokens = min(self._num_reused, len(sequence.prompt_token_ids) - 1)
        for position in range(num_tokens):
            self.cache[sequence.slot, position] = (sequence, position)
        return num_tokens


class Clients:
    """So many for every adapter, each of whom asks again as soon as it is answered."""

    def __init__(
        self,
        engine: FakeEngine,
        versions: list[Version | None],
        num_each: int = 2,
        seed: int = 0,
        most_prompt: int = 12,
        most_output: int = 10,
    ) -> None:
        self.engine = engine
        self._random = random.Random(seed)
        self._most = most_prompt, most_output
        for version in versions * num_each:
            self._ask(version)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            num_finished = len(self.engine.finished)
            self.engine.step()
            for sequence in self.engine.finished[num_finished:]:
                self._ask(sequence.version)

    def _ask(self, version: Version | None) -> None:
        lengths = [self._random.randint(1, most) for most in self._most]
        self.engine.add(new_sequence(f"r{len(self.engine.added)}", *lengths, version))


# --- any traffic -----------------------------------------------------------------------------


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
            engine.check_slots()
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
        data.draw(st.integers(0, 8), "reuse"),
    )
    return engine, [None, *versions]


def draw_request(data, request_id: str, versions: list[Version | None]) -> Iterator[Sequence]:
    lengths = data.draw(st.tuples(st.integers(1, 25), st.integers(1, 30)))
    version, tenant = data.draw(st.tuples(st.sampled_from(versions), st.sampled_from(["", "gold"])))
    for index in range(data.draw(st.sampled_from([1, 1, 1, 3]), "n")):
        yield new_sequence(request_id, *lengths, version, tenant, index)


# --- the base alone: slots and budget --------------------------------------------------------


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
    engine = FakeEngine(1, reuse=6)
    sequence = new_sequence("a", 10, max_tokens=2)
    engine.add(sequence)
    (chunk,) = engine.step().prefills
    assert chunk.num_tokens == 4
    assert engine.scheduler.waiting.rank(sequence)[0] == 4 * PROMPT_COST + OUTPUT_COST


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


# --- shares ----------------------------------------------------------------------------------


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


# --- adapters on their way -------------------------------------------------------------------


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


# --- affinity --------------------------------------------------------------------------------


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


# --- turns -----------------------------------------------------------------------------------


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


# --- failures --------------------------------------------------------------------------------


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


# --- slots taken back ------------------------------------------------------------------------


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
