"""Block tables on a cache that remembers what was written: who shares, who waits, who copies."""

import pytest

from neuroada_serve.engine.block_tables import Changes
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams
from tests.support.blocks import FakeCache, new_tables
from tests.support.scheduling import Version, new_sequence

SIZE = 4  # tokens of a block
PROMPT = "abcdefghij"  # a token per letter: two whole blocks and two tokens


class Run:
    """Sequences that run, without a scheduler. Every step is checked by the cache."""

    def __init__(self, num_blocks: int = 32, **options) -> None:
        self.tables = new_tables(num_blocks, SIZE, **options)
        self.blocks = self.tables.blocks
        self.cache = FakeCache(self.tables)
        self.running: list[Sequence] = []

    def start(self, prompt: str = PROMPT, max_tokens: int = 20, **fields) -> Sequence:
        sequence = new_sequence("r", max_tokens=max_tokens, version=fields.pop("version", None))
        sequence.prompt_token_ids = [ord(letter) for letter in prompt]
        sequence.num_prefill = len(prompt)
        for name, value in fields.items():
            setattr(sequence, name, value)
        return self.resume(sequence)

    def resume(self, sequence: Sequence) -> Sequence:
        taken = {other.slot for other in self.running}
        sequence.slot = min(set(range(len(taken) + 1)) - taken)
        self.running.append(sequence)
        assert self.tables.start(sequence) == sequence.num_computed
        return sequence

    def schedule(self, sequence: Sequence, most: int = 100) -> int:
        """Advance one that computes its prompt; return how many tokens it can compute."""
        if sequence.is_decoding:
            num = 1
        elif self.tables.advance(sequence) is None:
            return 0
        else:
            num = min(most, sequence.num_prefill - sequence.num_computed)
        return num if self.tables.reserve(sequence, num) else 0

    def step(self, *sequences: Sequence, most: int = 100) -> list[int]:
        """Let sequences compute their next tokens, and answer; return how many each computed."""
        nums = [self.schedule(sequence, most) for sequence in sequences]
        self.cache.change()
        for sequence, num in zip(sequences, nums, strict=True):
            self.cache.write(sequence, num)
            sequence.num_computed += num
            self.tables.computed(sequence)
            if num and sequence.is_decoding:
                sequence.output_token_ids.append(ord("A") + sequence.index)
        self.check()
        return nums

    def end(self, sequence: Sequence, forget: bool = False) -> None:
        self.tables.release(sequence, forget)
        self.running.remove(sequence)
        sequence.slot = None
        self.check()

    def preempt(self, sequence: Sequence) -> None:
        self.end(sequence)
        sequence.preempt()

    def check(self) -> None:
        self.cache.check(self.running)


# --- what is shared --------------------------------------------------------------------------


def test_whole_blocks_of_a_common_beginning_are_shared_by_reference():
    run = Run()
    first = run.start()
    run.step(first)
    second = run.start("abcdefghXYZ")
    assert second.num_computed == 2 * SIZE
    assert second.blocks == first.blocks[:2]
    assert run.step(first, second) == [1, 3]
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert run.blocks.num_shared == 2
    assert run.cache.num_copies == 0


def test_what_has_ended_is_found():
    run = Run()
    first = run.start()
    run.step(first)
    kept = first.blocks[:2]
    run.end(first)
    assert run.start("abcdefghXYZ").blocks == kept


def test_answers_are_found_too():
    run = Run()
    first = run.start("abc")
    for _ in range(7):
        run.step(first)
    run.end(first)
    second = run.start("abcAAAAAA??")  # its last answer was not computed
    assert second.num_computed == 9
    assert run.step(second) == [2]


def test_first_tokens_of_another_block_are_copied():
    run = Run()
    first = run.start()
    run.step(first)
    second = run.start("abcdefgX")
    assert second.num_computed == 7
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] != first.blocks[1]
    assert run.step(second) == [1]
    assert run.cache.num_copies == 1
    for _ in range(8):
        run.step(first, second)


def test_copied_block_is_held_until_the_copy_is_made():
    run = Run(num_blocks=3)
    first = run.start("abc")
    run.step(first)
    run.end(first)
    (source,) = run.blocks._idle
    second = run.start("abX")
    assert not run.blocks.is_idle(source)
    assert run.tables.reserve(second, 5)
    assert not run.tables.reserve(second, 9)
    run.cache.change()
    assert run.blocks.is_idle(source)


def test_nothing_is_copied_where_there_is_no_room_to():
    run = Run(num_blocks=1)
    first = run.start("abc")
    run.step(first)
    run.end(first)
    second = run.start("abX")
    assert second.num_computed == 0
    assert run.tables.changes == Changes()
    assert run.blocks.num_used == 0
    assert run.step(second) == [3]


@pytest.mark.parametrize("num_tokens", [1, SIZE, 2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1])
def test_at_least_one_token_is_left_to_compute(num_tokens):
    run = Run()
    prompt = PROMPT[:num_tokens]
    first = run.start(prompt)
    run.step(first)
    run.end(first)
    second = run.start(prompt)
    assert second.num_computed == num_tokens - 1
    assert run.step(second) == [1]


def test_choices_of_a_prompt_share_all_whole_blocks_and_copy_the_last():
    run = Run()
    choices = [run.start(index=index) for index in range(4)]
    assert run.step(*choices) == [10, 0, 0, 0]
    assert run.step(*choices) == [1, 1, 1, 1]
    assert run.cache.num_copies == 3
    assert run.blocks.num_used == 2 + 4
    assert all(choice.blocks[:2] == choices[0].blocks[:2] for choice in choices)
    for _ in range(8):
        run.step(*choices)
    assert [choice.num_cached for choice in choices] == [0, 9, 9, 9]


def test_whoever_has_only_its_last_token_left_waits_for_nobody():
    run = Run()
    first, second = run.start("abcde"), run.start("abcde")
    assert run.step(first, second, most=SIZE) == [SIZE, 0]
    assert run.schedule(second) == 1


# --- who waits -------------------------------------------------------------------------------


def test_what_another_computes_just_now_is_waited_for():
    run = Run()
    first, second = run.start("abcdefghijkl"), run.start("abcdefghXY")
    assert run.step(first, second, most=SIZE) == [SIZE, 0]
    assert run.tables.advance(second) is None
    assert second.blocks == first.blocks[:1], "it follows block by block"
    assert run.step(first, second, most=SIZE) == [SIZE, 0]
    assert run.step(first, second) == [4, 2]
    assert second.blocks[:2] == first.blocks[:2]


def test_other_beginnings_do_not_wait():
    run = Run()
    assert run.step(run.start(), run.start("Xbcdefghij")) == [10, 10]


@pytest.mark.parametrize("how", ["aborted", "preempted", "failed"])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_when_the_one_waited_for_goes_one_of_the_others_computes(how, num_steps):
    run = Run()
    first, *others = [run.start("abcdefghijkl") for _ in range(4)]
    for _ in range(num_steps):
        run.step(first, *others, most=SIZE)
    if how == "preempted":
        run.preempt(first)
        others.append(run.resume(first))
    else:
        run.end(first, forget=how == "failed")
    for _ in range(3):
        computed = run.step(*others, most=SIZE)
        assert sum(num > 1 for num in computed) <= 1
        assert max(computed) >= 1
    run.step(*others)
    assert all(other.is_decoding for other in others)
    assert all(other.blocks[:2] == others[0].blocks[:2] for other in others)


def test_each_of_those_that_waited_waits_for_its_own_beginning():
    run = Run()
    first = run.start("abcdefghijklmnop")
    second, third = run.start("abcdefghXXXXXXXX"), run.start("abcdefghXXXXYYYY")
    assert run.step(first, second, third, most=8) == [8, 0, 0]
    run.end(first)
    assert run.step(second, third, most=SIZE) == [SIZE, 0]
    assert run.step(second, third) == [4, 4]


def test_nobody_waits_for_what_another_computed_and_cannot_be_found():
    run = Run()
    first = run.start("abcdefghijkl")
    run.step(first, most=SIZE)
    second = run.start("abcdXY")
    run.step(second)
    run.end(second, forget=True)  # the block that it shares with the first, too
    third = run.start("abcdZ")
    assert run.tables.advance(third) == 0
    assert run.step(first, third) == [8, 5]


# --- who shares nothing ----------------------------------------------------------------------


def test_scored_prompts_are_computed_from_their_beginning():
    run = Run()
    run.step(run.start())
    scored = run.start(params=SamplingParams(prompt_logprobs=1))
    assert (scored.num_computed, scored.blocks) == (0, [])
    assert run.step(scored, most=6) == [6]
    assert run.step(scored) == [4]
    assert scored.num_cached == 0
    assert run.blocks.num_shared == 0


def test_nobody_waits_for_a_scored_prompt_but_finds_it():
    run = Run()
    scored = run.start(params=SamplingParams(prompt_logprobs=1))
    run.step(scored, most=SIZE)
    plain = run.start()
    assert plain.blocks == scored.blocks[:1]
    assert run.step(plain) == [6]


def test_scored_prompt_that_has_answered_is_found_again():
    run = Run()
    scored = run.start(params=SamplingParams(prompt_logprobs=1))
    run.step(scored)
    run.step(scored)
    run.preempt(scored)
    run.resume(scored)
    assert scored.num_computed == 11
    assert scored.num_cached == 0


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "b"},
        {"cache_salt": "c"},
        {"tenant": "ab", "cache_salt": ""},
        {"version": Version("a2")},
        {"version": None},
    ],
)
def test_others_never_share(other):
    run = Run()
    one = {"tenant": "a", "cache_salt": "b", "version": Version("a1")}
    first, second = run.start(**one), run.start(**one | other)
    assert run.step(first, second) == [10, 10]
    third = run.start(**one | other)
    assert third.blocks[:2] == second.blocks[:2]
    assert not set(first.blocks) & set(second.blocks)


def test_without_roots_nothing_is_shared_or_kept():
    run = Run(root_of=None)
    first, second = run.start(), run.start()
    assert run.step(first, second) == [10, 10]
    for sequence in (first, second):
        run.end(sequence)
    assert run.blocks.num_idle == 0
    assert run.start().num_computed == 0
    assert run.tables.num_queries == 0


# --- deterministic ---------------------------------------------------------------------------


def test_deterministic_shares_whole_blocks_of_prompts_only():
    run = Run(deterministic=True)
    first = run.start("abcdef")
    for _ in range(4):
        run.step(first)
    run.end(first)
    assert run.start("abcdefAAAXYZ").num_computed == SIZE
    assert run.start("abcdef").num_computed == SIZE
    assert run.start("abcd").num_computed == 0
    assert not run.tables.changes.copies


def test_deterministic_reserves_all_that_a_sequence_may_need():
    run = Run(num_blocks=10, deterministic=True)
    first = run.start("abcdef", max_tokens=7)
    assert len(first.blocks) == 3  # its last answer is never computed
    for _ in range(7):
        run.step(first)
    assert len(first.blocks) == 3
    assert run.blocks.num_used == 3


def test_deterministic_shares_what_comes_after_all_was_reserved():
    run = Run(deterministic=True)
    first, second = run.start(max_tokens=3), run.start(max_tokens=3)
    assert run.blocks.num_used == 6
    assert run.step(first, second) == [10, 0]
    assert run.step(first, second) == [1, 2]
    assert second.blocks[:2] == first.blocks[:2]
    assert run.blocks.num_used == 4


def test_deterministic_waits_only_for_what_it_can_share():
    run = Run(deterministic=True)
    assert run.step(run.start("abc"), run.start("abc")) == [3, 3]
    assert run.step(run.start("efgh"), run.start("efgh")) == [4, 4]


# --- the way of a sequence -------------------------------------------------------------------


def test_failed_sequence_leaves_nothing_to_be_found():
    run = Run()
    first = run.start()
    for _ in range(4):
        run.step(first)
    run.end(first, forget=True)
    assert run.blocks.num_idle == 0
    assert run.start().num_computed == 0


def test_aborted_sequence_leaves_what_it_has_computed():
    run = Run()
    first = run.start()
    run.step(first, most=6)
    run.end(first)
    assert run.start().num_computed == 6


def test_step_that_raises_changes_nothing_that_is_known():
    run = Run()
    first = run.start()
    run.step(first, most=SIZE)
    num = run.schedule(first)
    run.cache.change()
    run.cache.write(first, num, junk=True)
    run.check()
    other = run.start("abcdefXY")
    assert other.num_computed == SIZE
    assert run.step(first, other) == [6, 4]


@pytest.mark.parametrize("forget", [False, True])
def test_release_before_the_changes_are_made_leaves_none(forget):
    run = Run()
    first = run.start()
    run.step(first)
    run.end(first)
    second = run.start("abcdefgX")
    assert run.tables.changes.copies
    run.end(second, forget)
    assert run.tables.changes == Changes()
    assert run.blocks.num_used == 0
    assert run.start("abcdefgX").num_computed == (0 if forget else 7)


def test_changes_may_be_made_again_after_they_failed():
    run = Run()
    first = run.start()
    run.step(first)
    run.end(first)
    second = run.start("abcdefgX")
    third = run.start("abcdXY")
    run.cache.change(num_made=1)
    assert run.step(second, third) == [1, 2]


def test_shared_block_takes_the_place_of_a_reserved_one():
    run = Run()
    first, second = run.start("abcdefghXY"), run.start()
    run.step(first, second, most=SIZE)
    assert run.tables.reserve(second, 6)
    reserved = second.blocks[1]
    run.step(first, most=SIZE)
    run.step(second)
    assert second.blocks[1] == first.blocks[1] != reserved


def test_cached_tokens_are_those_of_the_prompt_that_were_found():
    run = Run()
    first, second = run.start(), run.start("abcdefghXY")
    run.step(first, second, most=SIZE)
    run.step(first, second)
    run.step(first, second)
    assert (first.num_cached, second.num_cached) == (0, 8)
    assert (run.tables.num_queries, run.tables.num_hits) == (20, 8)
    for _ in range(3):
        run.step(second)
    run.preempt(second)
    run.resume(second)
    assert second.num_computed == 13
    assert second.num_cached == 8, "what is found of an answer is not counted"


def test_what_a_sequence_computed_before_a_preemption_is_not_counted_as_cached():
    run = Run()
    first = run.start()
    run.step(first)
    second = run.start("abcdefghXYZX")
    assert second.num_cached == 8
    run.step(second, most=2)
    run.preempt(second)
    run.resume(second)
    assert second.num_computed == 10
    assert second.num_cached == 8, "two tokens are its own"


def test_copy_that_was_not_made_is_not_counted_as_cached():
    run = Run()
    first = run.start()
    run.step(first)
    run.end(first)
    second = run.start("abcdefgX")
    assert second.num_cached == 7
    run.preempt(second)
    assert second.num_cached == run.tables.num_hits == 4


# --- room ------------------------------------------------------------------------------------


def test_reserve_gives_all_that_is_needed_or_nothing():
    run = Run(num_blocks=3)
    first = run.start()
    assert run.tables.room_of(first) == 12
    assert not run.tables.reserve(first, 13)
    assert first.blocks == []
    assert run.tables.reserve(first, 5)
    assert len(first.blocks) == 2
    assert run.tables.reserve(first, 8)
    assert len(first.blocks) == 2
    assert run.tables.room_of(first) == 12
    second = run.start("XY")
    assert run.tables.room_of(second) == 4


def test_room_is_kept_for_the_prompts_of_those_that_run():
    run = Run(num_blocks=7)
    waiting = new_sequence("w", 7)  # two blocks
    first = run.start()  # three blocks, and one to go on
    assert run.tables.has_room_for(waiting, [first])
    second = run.start("XYZ")  # one block, and one to go on
    assert not run.tables.has_room_for(waiting, [first, second])
    assert run.tables.has_room_for(waiting, [first, second], freed=second)
    run.end(second)
    assert run.tables.has_room_for(waiting, [first])


def test_whoever_is_alone_always_has_room():
    run = Run(num_blocks=1)
    assert run.tables.has_room_for(new_sequence("w", 100), [])
    first = run.start()
    assert run.tables.has_room_for(new_sequence("w", 100), [first], freed=first)
    assert not run.tables.has_room_for(new_sequence("w", 1), [first])


def test_blocks_in_use_that_can_be_shared_need_no_room():
    run = Run(num_blocks=6)
    first = run.start()
    run.step(first)
    second = run.start("abcdefghXY")
    run.end(second)
    run.start("1234")
    assert run.tables.reserve(run.running[1], 4)
    second.num_computed, second.slot = 0, None
    assert run.tables.has_room_for(second, [first])
    other = new_sequence("w", 10)
    assert not run.tables.has_room_for(other, [first])


def test_blocks_that_only_a_leaving_one_uses_are_room_but_not_shared_too():
    run = Run(num_blocks=7)
    leaving, staying = run.start(max_tokens=1), run.start("XYZ", max_tokens=1)
    run.step(leaving, staying)
    assert (len(leaving.blocks), len(staying.blocks), run.blocks.num_free) == (3, 1, 3)
    waiting = new_sequence("w", 1)  # 6 blocks, the first two as those of the leaving one
    waiting.prompt_token_ids = [ord(letter) for letter in PROMPT[:8] + 12 * "W"]
    waiting.num_prefill = 20
    assert not run.tables.has_room_for(waiting, [leaving, staying])
    # One more is kept for the one that stays: 5 are left, the two known ones among them.
    assert not run.tables.has_room_for(waiting, [leaving, staying], freed=leaving)
    waiting.prompt_token_ids = waiting.prompt_token_ids[:19]
    waiting.num_prefill = 19
    assert run.tables.has_room_for(waiting, [leaving, staying], freed=leaving)


def test_idle_blocks_are_room():
    run = Run(num_blocks=4)
    first = run.start()
    run.step(first)
    run.end(first)
    assert run.blocks.num_idle == 3
    second = run.start("X")
    run.step(second)
    assert run.tables.has_room_for(new_sequence("w", 7), [second])
    third = run.start("0123456")
    assert run.step(third) == [7]
    assert run.step(second, third) == [1, 1]
