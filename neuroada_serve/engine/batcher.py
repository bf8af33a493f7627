"""The batcher: how many tokens each running sequence computes in the next step. Pure Python."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """num_tokens tokens of one sequence, from sequence.num_computed on."""

    sequence: Sequence
    num_tokens: int


class Batcher:
    """Choose the tokens of each step: decodes always run, prompts get what `StepPace` leaves them.

    Args:
        running: sequences with a slot, by slot, in the order of admission; the scheduler's own.
        tables: their blocks.
        pace: bounds the tokens of a step.
        weakest_first: returns the running sequences by their claim to room.
        preempt: takes slot and blocks from a sequence.
        on_found: called with a sequence and how many of its tokens others have computed since it
            started.
        deterministic: prompts are cut at multiples of PROMPT_BLOCK.
    """

    def __init__(
        self,
        running: Mapping[int, Sequence],
        tables: BlockTables,
        pace: StepPace,
        weakest_first: Callable[[], Seq[Sequence]],
        preempt: Callable[[Sequence], None],
        deterministic: bool,
        on_found: Callable[[Sequence, int], None] = lambda sequence, num_tokens: None,
    ) -> None:
        self._running = running
        self._tables = tables
        self._pace = pace
        self._weakest_first = weakest_first
        self._preempt = preempt
        self._deterministic = deterministic
        self._on_found = on_found

    def batch(self) -> tuple[list[Sequence], list[Chunk]]:
        """Return the sequences that decode, by slot, and chunks of prompts; all have the blocks
        that they need."""
        decodes = self._decodes()
        prefills = self._prefills(decodes)
        while not decodes and not prefills and (first := self._first_without_room()) is not None:
            self._preempt(next(s for s in self._weakest_first() if s is not first))
            prefills = self._prefills([])
        return decodes, prefills

    def _decodes(self) -> list[Sequence]:
        active = [s for s in self._running.values() if s.has_adapter and s.is_decoding]
        if not all(self._tables.reserve(s, 1) for s in active):
            for sequence in reversed(self._weakest_first()):
                if sequence not in active:
                    continue
                while sequence.slot is not None and not self._tables.reserve(sequence, 1):
                    self._preempt(self._weakest_first()[0])
        return sorted((s for s in active if s.slot is not None), key=lambda s: s.slot or 0)

    def _prefills(self, decodes: Seq[Sequence]) -> list[Chunk]:
        """Return chunks of prompts that fit into the step and into the blocks that are free."""
        waiting = [s for s in self._running.values() if s.has_adapter and not s.is_decoding]
        able = [s for s in waiting if self._advance(s)]
        context = sum(s.num_computed for s in decodes)
        prefills = []
        for sequence, num_tokens in self._pace.divide(able, len(decodes), context, self._ranks()):
            left = sequence.num_prefill - sequence.num_computed
            num_tokens = min(num_tokens, self._tables.room_of(sequence))
            if num_tokens < left and self._deterministic:
                num_tokens -= (sequence.num_computed + num_tokens) % PROMPT_BLOCK
            if num_tokens > 0:
                self._tables.reserve(sequence, num_tokens)
                prefills.append(Chunk(sequence, num_tokens))
        return prefills

    def _advance(self, sequence: Sequence) -> bool:
        """Move a sequence beyond what has become known; return False if another is just computing
        what it needs next."""
        before = sequence.num_computed
        is_able = self._tables.advance(sequence) is not None
        if found := sequence.num_computed - before:
            self._on_found(sequence, found)
        return is_able

    def _ranks(self) -> Callable[[Sequence], tuple[bool, int]]:
        """Return what ranks prompts: those that fit into a step, as they were admitted, before
        longer ones, which are alike."""
        places = {sequence: place for place, sequence in enumerate(self._running.values())}

        def rank(sequence: Sequence) -> tuple[bool, int]:
            is_long = sequence.num_prefill - sequence.num_computed > self._pace.most_tokens
            return is_long, 0 if is_long else places[sequence]

        return rank

    def _first_without_room(self) -> Sequence | None:
        """Return the strongest claim among those that could compute a part of their prompt if there
        were room; None if others cannot make room for it."""
        if len(self._running) < 2:
            return None
        for sequence in reversed(self._weakest_first()):
            is_able = sequence.has_adapter and not sequence.is_decoding
            if is_able and self._tables.room_of(sequence) <= 0:
                return sequence
        return None
