"""Which sequences take part in the next step, with how many tokens. Pure Python, no torch.

Running sequences occupy KV slots 0..n-1 without holes, the decoding ones first, so that decode
attention reads one contiguous view of the cache. Whoever leaves is replaced by the last of its
kind; the moves are handed out with the next schedule.
"""

from collections import deque
from dataclasses import dataclass

from neuroada_serve.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """num_tokens tokens of one sequence, from sequence.num_computed on."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True)
class Move:
    """Copy the first num_tokens entries of KV slot src to slot dst."""

    src: int
    dst: int
    num_tokens: int


@dataclass(frozen=True)
class Schedule:
    """One step: first the moves, then decodes (slots 0..len-1, one token each), then prefills."""

    moves: tuple[Move, ...]
    running: tuple[Sequence, ...]  # by slot; scheduled or not
    decodes: tuple[Sequence, ...]
    prefills: tuple[Chunk, ...]

    @property
    def is_empty(self) -> bool:
        return not self.decodes and not self.prefills


class Scheduler:
    """First come, first served; decodes always run, prefill fills the rest of the token budget."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # running[i].slot == i
        self._moves: list[Move] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            sequence.slot = len(self.running)
            self.running.append(sequence)

        # 1. Decode: every sequence whose prompt is computed.
        decodes = tuple(s for s in self.running if s.is_decoding)
        budget = self.max_num_batched_tokens - len(decodes)

        # 2. Prefill, in slot order. Only the last one scheduled can be left unfinished, so those
        # that start to decode next are always the first of the prefilling ones.
        prefills = []
        for sequence in self.running[len(decodes) :]:
            num_tokens = min(budget, len(sequence.prompt_token_ids) - sequence.num_computed)
            if num_tokens <= 0:
                break
            prefills.append(Chunk(sequence, num_tokens))
            budget -= num_tokens

        moves, self._moves = tuple(self._moves), []
        return Schedule(moves, tuple(self.running), decodes, tuple(prefills))

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting or running sequence out; its slot is filled by another."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        hole = sequence.slot
        num_decoding = sum(s.is_decoding for s in self.running)
        # A decoding sequence's place goes to the last decoding one, whose place goes to the last.
        fillers = [num_decoding - 1] if hole < num_decoding else []
        for last in [*fillers, len(self.running) - 1]:
            if last != hole:
                filler = self.running[last]
                if filler.num_computed:
                    self._moves.append(Move(last, hole, filler.num_computed))
                self.running[hole] = filler
                filler.slot = hole
            hole = last
        self.running.pop()
        sequence.slot = None

    def find(self, request_id: str) -> list[Sequence]:
        """All waiting and running sequences of a request."""
        return [s for s in [*self.running, *self.waiting] if s.request_id == request_id]
