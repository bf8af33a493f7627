"""Pool, shared beginnings, scheduler and preemption together, under any load: no block is lost, has
two writers or is freed in use, and every request ends once.

`pytest -m slow` runs 500 examples of 50 operations; otherwise there are fewer.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from neuroada_serve.config import PROMPT_BLOCK
from neuroada_serve.engine.fairness import FairQueue
from neuroada_serve.engine.sequence import Sequence
from neuroada_serve.request import SamplingParams
from tests.support.blocks import new_tables
from tests.support.scheduling import FakeAdapters, FakeEngine, Fault, Version, new_sequence

BEGINNINGS = [[], [1] * 6, [1] * 13, [1] * 6 + [2] * 9, [3] * 20]
PLACES = st.sets(st.integers(0, 3), min_size=1, max_size=2).map(frozenset)


class Load(RuleBasedStateMachine):
    """Requests for an engine whose pool has room for a fraction of them. `FakeEngine` checks blocks
    and cache in every step, and `FakeCache` at every write."""

    deterministic = False

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        max_num_seqs = data.draw(st.integers(1, 8), "max_num_seqs")
        size = data.draw(st.sampled_from([2, 4, 8]), "block_tokens")
        self.repeat = PROMPT_BLOCK // 8 if self.deterministic else 1
        block_tokens = PROMPT_BLOCK if self.deterministic else size
        num_tokens = data.draw(st.sampled_from([16, 24, 32, 48, 96]), "num_tokens")
        self.num_tokens = num_tokens * self.repeat
        budget = data.draw(st.integers(max_num_seqs, 24), "budget")
        num_blocks = self.num_tokens // block_tokens
        most_idle = data.draw(st.sampled_from([None, 0, 1, num_blocks // 2]), "most_idle")
        self.adapters = FakeAdapters(
            room=data.draw(st.integers(1, 3), "room"),
            load_steps=data.draw(st.integers(0, 3), "load_steps"),
        )
        self.versions: list[Version | None] = [None, Version("a0"), Version("a1")]
        self.engine = FakeEngine(
            max_num_seqs,
            budget + PROMPT_BLOCK if self.deterministic else budget,
            self.adapters,
            FairQueue({"gold": 3.0}),
            new_tables(num_blocks, block_tokens, most_idle, deterministic=self.deterministic),
            self.deterministic,
        )
        self.num_brought = 0
        self.added: list[Sequence] = []
        self.aborted: list[Sequence] = []

    # --- operations --------------------------------------------------------------------------

    @rule(
        data=st.data(),
        beginning=st.sampled_from(BEGINNINGS),
        rests=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=3),
        max_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 2, 4]),
        tenant=st.sampled_from(["", "", "gold"]),
        is_scored=st.sampled_from([False, False, False, True]),
    )
    def add(self, data, beginning, rests, max_tokens, n, tenant, is_scored) -> None:
        version = data.draw(st.sampled_from(self.versions), "version")
        for rest in rests:
            prompt = [token for token in beginning + rest for _ in range(self.repeat)]
            prompt = prompt[: self.num_tokens]  # longer ones are refused
            name = f"r{len(self.added)}"
            for index in range(n):
                sequence = new_sequence(name, 1, max_tokens, version, tenant, index)
                sequence.prompt_token_ids = prompt
                sequence.num_prefill = len(prompt)
                sequence.max_tokens = min(max_tokens, self.num_tokens - len(prompt) + 1)
                sequence.params = SamplingParams(prompt_logprobs=1 if is_scored else None)
                self.added.append(sequence)
                self.engine.add(sequence)

    @rule(num_steps=st.sampled_from([1, 1, 3, 9]))
    def step(self, num_steps: int) -> None:
        self.engine.run(num_steps)

    @rule(num_steps=st.integers(1, 20))
    def go_on(self, num_steps: int) -> None:
        self.engine.run(num_steps)

    @rule(
        places=st.just(frozenset()) | PLACES,
        is_raised=st.booleans(),
        num_copies=st.sampled_from([None, 0, 1]),
        forgets=st.booleans(),
    )
    def step_that_fails(self, places, is_raised, num_copies, forgets) -> None:
        self.engine.step(Fault(places, is_raised, num_copies, forgets))

    @precondition(lambda self: self.engine.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.engine.scheduler
        sequences = [*scheduler.running.values(), *scheduler.waiting]
        sequence = data.draw(st.sampled_from(sequences), "aborted")
        scheduler.remove(sequence)
        self.aborted.append(sequence)

    @rule(num_faults=st.sampled_from([0, 0, 1, 99]))
    def bring_an_adapter(self, num_faults: int) -> None:
        self.num_brought += 1
        self.versions.append(Version(f"b{self.num_brought}", num_faults=num_faults))

    @precondition(lambda self: len(self.versions) > 3)
    @rule()
    def take_an_adapter_away(self) -> None:
        """Its requests end, as when an adapter is removed by force."""
        version = self.versions.pop()
        scheduler = self.engine.scheduler
        for sequence in [*scheduler.running.values(), *scheduler.waiting]:
            if sequence.version is version:
                scheduler.remove(sequence)
                self.aborted.append(sequence)
        self.adapters.idle.pop(version, None)

    # --- what always holds -------------------------------------------------------------------

    @invariant()
    def blocks_hold_what_they_should(self) -> None:
        self.engine.check_state()

    @invariant()
    def every_request_is_there_or_has_ended_once(self) -> None:
        scheduler = self.engine.scheduler
        ended = [*self.engine.finished, *self.engine.failed, *self.aborted]
        there = [*scheduler.running.values(), *scheduler.waiting]
        assert Counter([*ended, *there]) == Counter(self.added)
        assert all(len(s.output_token_ids) == s.max_tokens for s in self.engine.finished)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain(50_000)
            self.every_request_is_there_or_has_ended_once()


class DeterministicLoad(Load):
    """Nobody loses a slot, all blocks are reserved, and whole blocks of prompts are shared."""

    deterministic = True

    @invariant()
    def nobody_is_preempted_or_copies(self) -> None:
        assert not any(sequence.num_preempted for sequence in self.added)
        assert not self.engine.cache.num_copies


@pytest.mark.parametrize("num_examples", [100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("load", [Load, DeterministicLoad])
def test_any_load_keeps_blocks_and_ends_every_request_once(load, num_examples):
    run_state_machine_as_test(
        load, settings=settings(max_examples=num_examples, stateful_step_count=50)
    )
