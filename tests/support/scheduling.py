"""An engine that only schedules, on a cache that remembers what was written."""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import SimpleNamespace

from neuroada_serve.adapters.readiness import Readiness
from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.adapter_turns import TURN_STEPS
from neuroada_serve.engine.block_manager import BlockManager
from neuroada_serve.engine.block_tables import BlockTables
from neuroada_serve.engine.fairness import OUTPUT_COST, FairQueue
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.engine.scheduler import Chunk, Schedule, Scheduler
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams
from tests.support.blocks import FakeCache


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


@dataclass(frozen=True)
class Fault:
    """A step that fails.

    places: in the step's work, of the sequences that end.
    is_raised: before anything was computed; otherwise their own logits were not finite.
    num_copies: raised while the cache is changed, after so many copies; None: later.
    forgets: nothing of those that end is kept.
    """

    places: frozenset[int] = frozenset()
    is_raised: bool = False
    num_copies: int | None = None
    forgets: bool = True


class FakeEngine:
    """Runs schedules on a cache that only remembers what was written. Checks in every step what
    must always hold.

    Args:
        tables: default: as many blocks as are wanted, and nobody shares any.
    """

    def __init__(
        self,
        max_num_seqs: int,
        budget: int = 16,
        adapters: FakeAdapters | None = None,
        queue: FairQueue[Sequence] | None = None,
        tables: BlockTables | None = None,
        deterministic: bool = False,
    ) -> None:
        self.adapters = FakeAdapters(room=100, load_steps=0) if adapters is None else adapters
        self.has_any_room = tables is None
        self.tables = BlockTables(BlockManager(1 << 40, 32)) if tables is None else tables
        self.scheduler = Scheduler(
            max_num_seqs,
            budget,
            queue,
            self.adapters,
            self.adapters.can_leave,
            self.tables,
            StepPace(math.inf, budget, math.inf, PROMPT_BLOCK if deterministic else 1),
            deterministic=deterministic,
        )
        self.cache = FakeCache(self.tables)
        self.steps = 0
        self.finished: list[Sequence] = []
        self.failed: list[Sequence] = []
        self.added: dict[Sequence, int] = {}  # -> step
        self.first_token: dict[Sequence, int] = {}  # -> step
        self.served: Counter[str | None] = Counter()  # tokens, by adapter
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
        assert not self.tables.blocks.num_used
        assert not self.tables._coming
        assert not self.tables._announced

    def step(self, fault: Fault | None = None) -> Schedule:
        self.adapters.step()
        schedule = self.scheduler.schedule()
        self.steps += 1
        self.check(schedule)
        for sequence in schedule.failed:
            self.scheduler.remove(sequence)
            self.failed.append(sequence)
        work = [*(Chunk(s, 1) for s in schedule.decodes), *schedule.prefills]
        if work and fault is not None and fault.is_raised:
            self.raise_fault(work, fault)
        else:
            places = frozenset() if fault is None else fault.places
            self.compute(work, places)
            self.answer_all(work, places)
        self.check_state()
        if not self.scheduler.running:
            self.cache.give_back()
        self._before = {
            s: (s.slot, s.num_computed, s.has_adapter) for s in self.scheduler.running.values()
        }
        return schedule

    def compute(self, work: list[Chunk], failing: Collection[int]) -> None:
        if work:
            self.cache.change()
        for place, chunk in enumerate(work):
            sequence, num_tokens = chunk.sequence, chunk.num_tokens
            assert len(sequence.next_tokens(num_tokens)) == num_tokens
            self.cache.write(sequence, num_tokens, junk=place in failing)
        for chunk in work:
            chunk.sequence.num_computed += chunk.num_tokens
            self.tables.computed(chunk.sequence)
            self.served[chunk.sequence.adapter] += chunk.num_tokens

    def answer_all(self, work: list[Chunk], failing: Collection[int]) -> None:
        for place, chunk in enumerate(work):
            if place in failing:
                self.fail(chunk.sequence)
            elif chunk.sequence.is_decoding:
                self.answer(chunk.sequence)

    def raise_fault(self, work: list[Chunk], fault: Fault) -> None:
        """Do what a step does that raises on its way: computed tokens stay as many as before."""
        self.cache.change(fault.num_copies)
        if fault.num_copies is None:
            for chunk in work:
                self.cache.write(chunk.sequence, chunk.num_tokens, junk=True)
        for place, chunk in enumerate(work):
            if place in fault.places:
                self.fail(chunk.sequence, forget=fault.forgets)

    def fail(self, sequence: Sequence, forget: bool = True) -> None:
        if forget:
            self.tables.release(sequence, forget=True)
        self.scheduler.remove(sequence)
        self.failed.append(sequence)

    def answer(self, sequence: Sequence) -> None:
        sequence.output_token_ids.append(7 + sequence.index % 2)
        self.scheduler.waiting.charge(sequence, OUTPUT_COST)
        self.first_token.setdefault(sequence, self.steps)
        if len(sequence.output_token_ids) == sequence.max_tokens:
            self.finished.append(sequence)
            self.scheduler.remove(sequence)

    def waits(self) -> list[int]:
        """Steps to the first token, of all that were added; those that have none wait still."""
        return [self.first_token.get(s, self.steps) - step for s, step in self.added.items()]

    def check(self, schedule: Schedule) -> None:
        self.check_state()
        self.check_work(schedule)
        self.check_turns()
        running = list(self.scheduler.running.values())
        assert schedule.running == tuple(running)
        assert all(s.version in self.adapters.failed for s in schedule.failed)
        assert all(s.slot is not None and not s.has_adapter for s in schedule.starved)
        for sequence, (slot, num_computed, _) in self._before.items():
            if sequence.slot is not None:
                assert sequence.slot == slot
                assert sequence.num_computed >= num_computed
        if self.has_any_room and len(running) < self.scheduler.max_num_seqs:
            assert all(s.version is not None for s in self.scheduler.waiting)

    def check_state(self) -> None:
        """Check slots, holds and blocks, between any two operations."""
        self.check_slots()
        assert not any(sequence.blocks for sequence in self.scheduler.waiting)
        self.cache.check(self.scheduler.running.values())

    def check_slots(self) -> None:
        running = self.scheduler.running
        assert all(sequence.slot == slot for slot, sequence in running.items())
        assert all(0 <= slot < self.scheduler.max_num_seqs for slot in running)
        assert all(s.slot is None and not s.has_adapter for s in self.scheduler.waiting)
        holders = Counter(s.version for s in running.values() if s.has_adapter and s.lease)
        assert holders == self.adapters.holders

    def check_work(self, schedule: Schedule) -> None:
        """All decodes, and as much prefill as the budget has, of those whose adapter is held. Where
        there is not room for all, or one waits for another, at least something."""
        active = [s for s in self.scheduler.running.values() if s.has_adapter]
        assert all(s.version is None or self.adapters.holders[s.version] for s in active)
        slots = [s.slot for s in schedule.decodes]
        assert slots == sorted(s.slot for s in active if s.is_decoding)
        left = {s: s.num_prefill - s.num_computed for s in active if not s.is_decoding}
        chunks = {chunk.sequence: chunk.num_tokens for chunk in schedule.prefills}
        assert len(chunks) == len(schedule.prefills)
        assert all(0 < num_tokens <= left[s] for s, num_tokens in chunks.items())
        budget = self.scheduler.max_num_batched_tokens - len(slots)
        assert sum(chunks.values()) <= min(budget, sum(left.values()))
        if self.has_any_room:
            assert sum(chunks.values()) == min(budget, sum(left.values()))
        assert schedule.is_empty == (not active)

    def check_turns(self) -> None:
        """Whatever had to leave for another was there for its turn, and may leave."""
        for sequence, (_, _, had_adapter) in self._before.items():
            if had_adapter and sequence.slot is not None and not sequence.has_adapter:
                assert self.steps - self._turns[sequence.version] >= TURN_STEPS
                assert not sequence.version.is_pinned
        self._turns = {v: self._turns.get(v, self.steps) for v in self.adapters.holders}


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
