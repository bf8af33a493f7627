"""The scheduler: which sequences take part in the next step, with how many tokens. Pure Python.

A sequence runs in a slot, with blocks of the KV cache (`block_tables.py`), and needs its adapter on
the device. Who gets a free slot is a matter of fair shares (`fairness.py`); how many tokens each
computes in a step, of the step's budget (`batcher.py`). An adapter that is on its way holds up
nobody but its own requests, and when more adapters are wanted than the device has room for, they
take turns (`adapter_turns.py`).

Slots are taken back as well: whoever waits with fewer slots than its share gets one of whoever has
most, whose youngest sequence waits again and is computed anew later (`Sequence.preempt`). So does
the weakest claim where running sequences need more blocks than there are.
"""

import heapq
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.adapter_turns import AdapterTurns, DeviceAdapters
from neuroada_serve.engine.batcher import Batcher, Chunk
from neuroada_serve.engine.block_manager import BlockManager
from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.fairness import AFFINITY, PROMPT_COST, FairQueue
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.sequence import Sequence

# An adapter that is not there lets so many others go first before one of its requests takes a slot
# to wait in; and so many of those that wait are looked at, and brought in, ahead of their time.
_MOST_OVERTAKEN = 8
_LOOK_AHEAD = 8
_ANY_NUMBER = 1 << 40  # of blocks


@dataclass(frozen=True)
class Schedule:
    """One step: a token of every sequence in decodes, by slot, and chunks of prompts.

    running: scheduled or not.
    failed: sequences whose adapter cannot be had.
    starved: sequences with a slot whose adapter has no room.
    """

    running: tuple[Sequence, ...]
    decodes: tuple[Sequence, ...]
    prefills: tuple[Chunk, ...]
    failed: tuple[Sequence, ...] = ()
    starved: tuple[Sequence, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.decodes and not self.prefills

    @property
    def scheduled(self) -> tuple[Sequence, ...]:
        """Every sequence that takes part."""
        return (*self.decodes, *(chunk.sequence for chunk in self.prefills))

    def without(self, sequence: Sequence) -> "Schedule":
        """Return the same step without one sequence."""
        return replace(
            self,
            running=tuple(s for s in self.running if s is not sequence),
            decodes=tuple(s for s in self.decodes if s is not sequence),
            prefills=tuple(c for c in self.prefills if c.sequence is not sequence),
        )

    def unended(self) -> "Schedule":
        """Return the same step without sequences that have ended since it was made."""
        ended = [sequence for sequence in self.scheduled if sequence.has_ended]
        return reduce(Schedule.without, ended, self)

    def halves(self) -> "tuple[Schedule, ...]":
        """Return the same step as two of about half the tokens; one with half a chunk where there
        is no more, and none where that cannot be cut."""
        work = [Chunk(s, 1) for s in self.decodes] + list(self.prefills)
        if len(work) == 1:
            num_tokens = work[0].num_tokens // 2
            num_tokens -= num_tokens % PROMPT_BLOCK
            if not num_tokens:
                return ()
            return (replace(self, prefills=(Chunk(work[0].sequence, num_tokens),)),)
        half, size = sum(chunk.num_tokens for chunk in work) / 2, 0
        first: set[Sequence] = set()
        for chunk in work[:-1]:
            size += chunk.num_tokens
            if first and size > half:
                break
            first.add(chunk.sequence)
        return tuple(
            replace(
                self,
                decodes=tuple(s for s in self.decodes if (s in first) is is_first),
                prefills=tuple(c for c in self.prefills if (c.sequence in first) is is_first),
            )
            for is_first in (True, False)
        )


class Scheduler:
    """Choose the sequences of each step: fair shares, first come first served within one;
    decodes always run, prefill fills the rest of the token budget.

    Args:
        queue: whose shares are which; default: all alike.
        adapters: where they are; default: on the device.
        can_leave: whether a version may leave the device once no sequence holds it.
        tables: blocks of the sequences; default: as many as they like.
        pace: how much prompts may add to a step; default: whatever fits into it.
        on_preempt: called with a sequence that is about to lose its slot.
        deterministic: prompts are cut at multiples of PROMPT_BLOCK, and nobody loses a slot: what
            was answered would be computed anew as a prompt, in other shapes.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        queue: FairQueue[Sequence] | None = None,
        adapters: DeviceAdapters | None = None,
        can_leave: Callable[[Any], bool] = lambda version: True,
        tables: BlockTables | None = None,
        pace: StepPace | None = None,
        on_preempt: Callable[[Sequence], None] = lambda sequence: None,
        deterministic: bool = False,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: FairQueue[Sequence] = FairQueue() if queue is None else queue
        self.running: dict[int, Sequence] = {}  # by slot, in the order of admission
        self._turns = AdapterTurns(self.running, self.waiting.rank, adapters, can_leave)
        self.tables = tables or BlockTables(BlockManager(_ANY_NUMBER, PROMPT_BLOCK))
        self.pace = pace or StepPace(math.inf, max_num_batched_tokens, math.inf)
        self._on_preempt = on_preempt
        self._deterministic = deterministic
        self._free_slots = list(range(max_num_seqs))  # a heap: low slots are used first
        self._batcher = Batcher(
            self.running,
            self.tables,
            self.pace,
            self._weakest_first,
            self._preempt,
            deterministic,
            self._refund,
        )

    @property
    def num_parked(self) -> int:
        """Times that an adapter has left the device for another."""
        return self._turns.num_parked

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def schedule(self) -> Schedule:
        self._turns.begin_step()
        states = self._turns.wake_parked()
        states |= self._admit()
        # While adapters take turns, these see to their shares.
        if not self._deterministic:
            states |= self._take_slots_back(take_turns=Readiness.NO_ROOM in states.values())
        no_room = Readiness.NO_ROOM
        starved = [s for s, state in states.items() if state is no_room and s.slot is not None]
        self._turns.make_room(starved)

        decodes, prefills = self._batcher.batch()
        return Schedule(
            running=tuple(self.running.values()),
            decodes=tuple(decodes),
            prefills=tuple(prefills),
            failed=tuple(s for s, state in states.items() if state is Readiness.FAILED),
            starved=tuple(s for s in starved if s.slot is not None),  # it may just have lost it
        )

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting or running sequence out."""
        if sequence.slot is None:
            self.waiting.take(sequence)
        else:
            self._free_slot(sequence)
            sequence.slot = None
        self.waiting.leave(sequence)

    def find(self, request_id: str) -> list[Sequence]:
        """Return all waiting and running sequences of a request."""
        return [s for s in [*self.running.values(), *self.waiting] if s.request_id == request_id]

    # --- slots -------------------------------------------------------------------------------

    def _admit(self) -> dict[Sequence, Readiness]:
        """Give free slots away; return what hinders those that could not use one."""
        states: dict[Sequence, Readiness] = {}
        while self._free_slots and (chosen := self._next(states)) is not None:
            self._start(chosen)
        return {s: state for s, state in states.items() if s.slot is not None or state is _FAILED}

    def _start(self, sequence: Sequence) -> None:
        """Give a waiting sequence the lowest free slot."""
        self.waiting.take(sequence)
        sequence.slot = heapq.heappop(self._free_slots)
        self.running[sequence.slot] = sequence
        num_known = self.tables.start(sequence)
        if not sequence.num_preempted:  # it pays once
            num_new = sequence.num_prefill - num_known
            self.waiting.charge(sequence, PROMPT_COST * num_new)

    def _refund(self, sequence: Sequence, num_tokens: int) -> None:
        """Take back the charge for tokens that another has computed meanwhile."""
        if not sequence.num_preempted:
            self.waiting.charge(sequence, -PROMPT_COST * num_tokens)

    def _has_room(self, sequence: Sequence, freed: Sequence | None = None) -> bool:
        """Return whether there are blocks for a waiting sequence, if `freed` gives up its own."""
        return self.tables.has_room_for(sequence, self.running.values(), freed)

    def _take_slots_back(self, take_turns: bool) -> dict[Sequence, Readiness]:
        """If there is no slot or no room for who is next, take slots from whoever has most for
        those who have less than their share; return what hinders those that cannot use one yet.

        Args:
            take_turns: adapters do, so none of a tenant's for another of its adapters.
        """
        states: dict[Sequence, Readiness] = {}
        preempted: set[Sequence] = set()
        while len(states) < _LOOK_AHEAD and self._is_full():
            due = self._due_slot(preempted.union(states), take_turns)
            if due is None:
                break
            head, victim = due
            if not self._turns.hold(head):
                state = states[head] = self._turns.request(head)
                if state is not Readiness.READY and state is not Readiness.NO_ROOM:
                    continue
            self._preempt(victim)
            preempted.add(victim)
            self._start(head)
        return {s: state for s, state in states.items() if s.slot is not None or state is _FAILED}

    def _due_slot(
        self, besides: Collection[Sequence], take_turns: bool
    ) -> tuple[Sequence, Sequence] | None:
        """Return the first waiting sequence to which another's slot is due, and the one that
        loses it: of whoever has most, the last that got a slot."""
        able = [s for s in reversed(self.running.values()) if s.may_be_preempted]
        if not able:
            return None
        queue = self.waiting
        able.sort(key=queue.slots_of, reverse=True)
        most = [max(shares) for shares in zip(*(queue.slots_of(s, -1) for s in able), strict=True)]
        for head in queue.heads():
            # Most have no claim at all, whoever is compared.
            has_least = any(own <= m for own, m in zip(queue.slots_of(head, 1), most, strict=True))
            if not has_least or head in besides:
                continue
            for victim in able:
                if take_turns and victim.tenant == head.tenant and victim.adapter != head.adapter:
                    continue
                if queue.may_displace(head, victim) and self._has_room(head, victim):
                    return head, victim
        return None

    def _is_full(self) -> bool:
        """Return whether the next in the queue finds no slot, or no room."""
        if not self._free_slots:
            return True
        heads = self.waiting.heads()
        return bool(heads) and not self._has_room(heads[0])

    def _weakest_first(self) -> list[Sequence]:
        """Return the running sequences by their claim to room: of whoever has most, the youngest
        first."""
        return sorted(reversed(self.running.values()), key=self.waiting.slots_of, reverse=True)

    def _preempt(self, sequence: Sequence) -> None:
        self._on_preempt(sequence)
        self._free_slot(sequence)
        sequence.preempt()
        self.waiting.requeue(sequence)

    def _free_slot(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.tables.release(sequence)
        del self.running[sequence.slot]
        self._turns.release(sequence)
        heapq.heappush(self._free_slots, sequence.slot)

    def _next(self, states: dict[Sequence, Readiness]) -> Sequence | None:
        """Return the first in the queue that can use a slot, its adapter held; or one that takes
        a slot to wait in, since there is no room for its adapter, or it was passed over often
        enough."""
        heads = self.waiting.heads()
        if not heads:
            return None
        tenant, lowest = self.waiting.rank(heads[0])
        passed_over: list[Sequence] = []
        # Among claims that are level, those whose adapter is there go first.
        level = [h for h in heads if self.waiting.rank(h) <= (tenant, lowest + AFFINITY)]
        level.sort(key=lambda head: not self._turns.is_ready(head))
        for place, head in enumerate([*level, *heads[len(level) :]]):
            if states.get(head) is _FAILED:
                continue
            if not self._has_room(head):
                self._turns.fetch(head)  # so that it is there by then
                return None  # nobody else takes what it waits for
            if not self._turns.hold(head):
                if place >= _LOOK_AHEAD:
                    continue
                state = states[head] = self._turns.request(head)
                can_start = state is Readiness.READY or state is Readiness.NO_ROOM
                if not can_start and not self._is_due(head, state):
                    passed_over.append(head)
                    continue
            for other in passed_over:
                other.num_overtaken += 1
            return head
        return None

    def _is_due(self, head: Sequence, state: Readiness) -> bool:
        """Return whether a sequence was passed over so often that it takes a slot before its
        adapter has come. Only one of an adapter's does, so that the adapter is held when it
        comes."""
        return (
            state is Readiness.COMING
            and head.num_overtaken >= _MOST_OVERTAKEN
            and not any(s.version is head.version for s in self.running.values())
        )


_FAILED = Readiness.FAILED
