"""The scheduler on fake sequences and a fake KV cache: places, budget, fairness."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.engine.scheduler import Chunk, Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams


def new_sequence(request_id: str, num_prompt: int = 3, max_tokens: int = 4) -> Sequence:
    return Sequence(
        request_id=request_id,
        index=0,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        end_token_ids=(),
        lease=None,
        detokenizer=None,
    )


class FakeEngine:
    """Runs schedules on a cache that only remembers what was written: (request, position)."""

    def __init__(self, max_num_seqs: int, budget: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, budget)
        self.cache: dict[tuple[int, int], tuple[str, int]] = {}
        self.finished: list[str] = []
        self.steps = 0

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        self.steps += 1
        for move in schedule.moves:
            for position in range(move.num_tokens):
                self.cache[move.dst, position] = self.cache[move.src, position]
        self.check(schedule)

        work = [Chunk(s, 1) for s in schedule.decodes] + list(schedule.prefills)
        for chunk in work:
            sequence = chunk.sequence
            for position in range(sequence.num_computed, sequence.num_computed + chunk.num_tokens):
                self.cache[sequence.slot, position] = (sequence.request_id, position)
            assert len(sequence.next_tokens(chunk.num_tokens)) == chunk.num_tokens
            sequence.num_computed += chunk.num_tokens
        for chunk in work:
            sequence = chunk.sequence
            if sequence.is_decoding:
                sequence.output_token_ids.append(7)
                if len(sequence.output_token_ids) == sequence.max_tokens:
                    self.finished.append(sequence.request_id)
                    self.scheduler.remove(sequence)
        self.check_places()

    def check(self, schedule) -> None:
        self.check_places()
        running, decodes = self.scheduler.running, schedule.decodes
        assert schedule.running == tuple(running)
        assert decodes == tuple(running[: len(decodes)])
        assert all(s.is_decoding for s in decodes)
        assert not any(s.is_decoding for s in running[len(decodes) :])
        num_tokens = len(decodes) + sum(chunk.num_tokens for chunk in schedule.prefills)
        assert num_tokens <= self.scheduler.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in schedule.prefills)
        assert schedule.is_empty == (not running)
        for sequence in running:
            for position in range(sequence.num_computed):
                written = self.cache[sequence.slot, position]
                assert written == (sequence.request_id, position)

    def check_places(self) -> None:
        running = self.scheduler.running
        assert [s.slot for s in running] == list(range(len(running)))
        assert len(running) <= self.scheduler.max_num_seqs
        assert all(s.slot is None for s in self.scheduler.waiting)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_traffic_keeps_places_budget_and_cache(data):
    max_num_seqs = data.draw(st.integers(1, 6), "max_num_seqs")
    engine = FakeEngine(max_num_seqs, data.draw(st.integers(max_num_seqs, 20), "budget"))
    scheduler, expected = engine.scheduler, set()
    for i in range(data.draw(st.integers(1, 40), "actions")):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            lengths = data.draw(st.tuples(st.integers(1, 25), st.integers(1, 6)))
            scheduler.add(new_sequence(f"r{i}", *lengths))
            expected.add(f"r{i}")
        elif action == "step":
            engine.step()
        elif sequences := [*scheduler.running, *scheduler.waiting]:
            aborted = data.draw(st.sampled_from(sequences))
            scheduler.remove(aborted)
            expected.discard(aborted.request_id)
            assert aborted.slot is None
            engine.check_places()
    while scheduler.has_unfinished:
        assert engine.steps < 2000
        engine.step()
    assert set(engine.finished) == expected
    assert len(engine.finished) == len(expected)


def test_everyone_finishes_under_endless_traffic():
    """First come, first served: later arrivals never hold an earlier one back for ever."""
    draw, engine = random.Random(0), FakeEngine(4, 6)
    for i in range(2000):
        if i % 3 == 0:
            engine.scheduler.add(new_sequence(f"r{i}", draw.randrange(1, 9), draw.randrange(1, 5)))
        engine.step()
    waiting = [int(s.request_id[1:]) for s in engine.scheduler.waiting]
    running = [int(s.request_id[1:]) for s in engine.scheduler.running]
    oldest = min([*waiting, *running])
    assert waiting == sorted(waiting)
    assert max(running, default=0) < min(waiting, default=2000)
    finished = {int(request_id[1:]) for request_id in engine.finished}
    assert {i for i in range(0, oldest, 3)} <= finished
    assert len(finished) > 100


def test_sequences_start_in_the_order_they_came():
    scheduler = Scheduler(2, 100)
    for i in range(4):
        scheduler.add(new_sequence(f"r{i}"))
    assert [s.request_id for s in scheduler.schedule().running] == ["r0", "r1"]
    scheduler.remove(scheduler.running[0])
    assert [s.request_id for s in scheduler.schedule().running] == ["r1", "r2"]


def test_long_prompt_is_prefilled_in_chunks_beside_decodes():
    engine = FakeEngine(4, 5)
    engine.scheduler.add(new_sequence("short", 2, max_tokens=9))
    engine.scheduler.add(new_sequence("long", 12, max_tokens=9))
    chunks = []
    for _ in range(4):
        schedule = engine.scheduler.schedule()
        chunks.append([chunk.num_tokens for chunk in schedule.prefills])
        engine.step()
    assert chunks == [[2, 3], [4], [4], [1]]


def test_decodes_run_in_every_step():
    engine = FakeEngine(3, 3)
    engine.scheduler.add(new_sequence("a", 1, max_tokens=20))
    engine.step()
    engine.scheduler.add(new_sequence("b", 30, max_tokens=1))
    for num_tokens in range(2, 20):
        engine.step()
        assert len(engine.scheduler.find("a")[0].output_token_ids) == num_tokens


def test_leaving_the_middle_moves_the_last_of_each_kind():
    engine = FakeEngine(5, 8)
    for name in ("a", "b", "c"):
        engine.scheduler.add(new_sequence(name, 2, max_tokens=9))
    engine.step()
    for name in ("long", "last"):
        engine.scheduler.add(new_sequence(name, 4, max_tokens=9))
    engine.step()
    assert [s.is_decoding for s in engine.scheduler.running] == [True] * 4 + [False]
    engine.scheduler.remove(engine.scheduler.find("a")[0])
    assert [s.request_id for s in engine.scheduler.running] == ["long", "b", "c", "last"]
    engine.step()


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
    scheduler = Scheduler(1, 4)
    for name in ("a", "b", "a"):
        scheduler.add(new_sequence(name))
    scheduler.schedule()
    assert len(scheduler.find("a")) == 2
    assert scheduler.find("x") == []


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
