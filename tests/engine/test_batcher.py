"""The batcher on block tables of a small pool: who takes part in a step, and who makes room."""

import math

import pytest

from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.batcher import Batcher
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.sequence import Sequence
from tests.support.blocks import new_tables
from tests.support.scheduling import new_sequence

SIZE = 4  # tokens of a block


class Running:
    """Sequences that run; the claim of the first is the strongest."""

    def __init__(self, num_blocks: int, budget: int = 100, size: int = SIZE, **options) -> None:
        deterministic = options.get("deterministic", False)
        self.tables = new_tables(num_blocks, size, **{"root_of": None} | options)
        self.sequences: dict[int, Sequence] = {}
        self.preempted: list[Sequence] = []
        self.batcher = Batcher(
            self.sequences,
            self.tables,
            StepPace(math.inf, budget, math.inf, PROMPT_BLOCK if deterministic else 1),
            weakest_first=lambda: list(reversed(self.sequences.values())),
            preempt=self.preempt,
            deterministic=deterministic,
        )

    def start(self, num_prompt: int, num_computed: int = 0, slot: int | None = None) -> Sequence:
        """Start a sequence of which some tokens are computed; beyond its prompt, answered ones."""
        sequence = new_sequence("r", num_prompt, max_tokens=20)
        sequence.slot = len(self.sequences) if slot is None else slot
        sequence.has_adapter = True
        self.sequences[sequence.slot] = sequence
        self.tables.start(sequence)
        assert self.tables.reserve(sequence, num_computed)
        sequence.num_computed = num_computed
        sequence.output_token_ids = [7] * max(0, num_computed - num_prompt + 1)
        return sequence

    def preempt(self, sequence: Sequence) -> None:
        self.tables.release(sequence)
        del self.sequences[sequence.slot]
        sequence.preempt()
        self.preempted.append(sequence)

    def batch(self) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        decodes, prefills = self.batcher.batch()
        work = [(s, 1) for s in decodes] + [(c.sequence, c.num_tokens) for c in prefills]
        size = self.tables.blocks.block_tokens
        for sequence, num in work:
            assert sequence.num_computed + num <= len(sequence.blocks) * size
        return decodes, work[len(decodes) :]


def test_all_decode_by_slot_and_prompts_get_the_rest_of_the_step():
    running = Running(100, budget=10)
    one, two = running.start(3, 3, slot=1), running.start(3, 3, slot=0)
    prompt = running.start(20, 5)
    assert running.batch() == ([two, one], [(prompt, 8)])


def test_sequences_without_their_adapter_take_no_part():
    running = Running(100)
    decode, prompt = running.start(3, 3), running.start(3)
    decode.has_adapter = prompt.has_adapter = False
    assert running.batch() == ([], [])
    assert not running.preempted


def test_weakest_claims_make_room_for_decodes():
    running = Running(5)
    first, second = running.start(4, 4), running.start(7, 7)
    third, fourth = running.start(3, 3), running.start(2, 2)
    assert running.batch() == ([first, second, third], [])
    assert running.preempted == [fourth], "one was enough"
    assert fourth.slot is None
    assert not fourth.blocks


def test_parked_sequence_and_prompt_make_room_too():
    running = Running(3)
    first, prompt, parked = running.start(4, 4), running.start(9, 4), running.start(4, 4)
    parked.has_adapter = False
    running.batch()
    assert running.preempted == [parked]
    first.num_computed, first.output_token_ids = 8, [7] * 5
    assert running.batch() == ([first], [])
    assert running.preempted == [parked, prompt]


def test_whoever_needs_room_goes_itself_where_it_is_the_weakest():
    running = Running(3)
    first, second = running.start(7, 7), running.start(4, 4)
    assert running.batch() == ([first], [])
    assert running.preempted == [second]


def test_strongest_claim_is_never_preempted():
    running = Running(4)
    sequences = [running.start(4, 4) for _ in range(4)]
    decodes, _ = running.batch()
    assert decodes == sequences[:2]
    assert running.preempted == [sequences[3], sequences[2]]


def test_prompt_computes_only_what_there_is_room_for():
    running = Running(4)
    decode, prompt = running.start(3, 3), running.start(20)
    assert running.batch() == ([decode], [(prompt, 3 * SIZE)])
    prompt.num_computed = 3 * SIZE
    assert running.batch() == ([decode], [])
    assert not running.preempted, "decodes go on, and give their room back"


def test_weakest_makes_room_where_no_prompt_could_go_on():
    running = Running(4)
    first, second = running.start(20, 8), running.start(20, 8)
    assert running.batch() == ([], [(first, 8)])
    assert running.preempted == [second]


def test_strongest_of_those_without_room_goes_on_beside_a_parked_one():
    running = Running(4)
    parked, first = running.start(20, 8), running.start(20, 8)
    parked.has_adapter = False
    assert running.batch() == ([], [(first, 8)])
    assert running.preempted == [parked]


def test_whoever_waits_for_anothers_blocks_takes_no_part():
    running = Running(8, root_of=lambda sequence: b"root")
    first, second = running.start(9), running.start(9)
    assert running.batch() == ([], [(first, 9)])
    first.num_computed = 9
    running.tables.computed(first)
    assert running.batch()[1] == [(second, 1)]
    assert second.blocks[:2] == first.blocks[:2]


@pytest.mark.parametrize("budget", [PROMPT_BLOCK + 2, 2 * PROMPT_BLOCK, 3 * PROMPT_BLOCK + 1])
def test_deterministic_prompts_are_cut_at_multiples(budget):
    running = Running(20, budget, PROMPT_BLOCK, deterministic=True)
    first, second = running.start(4 * PROMPT_BLOCK + 3), running.start(2 * PROMPT_BLOCK)
    while not (first.is_decoding and second.is_decoding):
        decodes, prefills = running.batch()
        assert decodes or prefills
        for sequence, num in prefills:
            sequence.num_computed += num
            assert sequence.is_decoding or sequence.num_computed % PROMPT_BLOCK == 0
        assert sum(num for _, num in prefills) + len(decodes) <= budget
