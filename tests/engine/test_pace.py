"""Pace: how much of a step prompts get, and which of them. Time is simulated."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from neuroada_serve.engine.pace import (
    FIRST_SHARE,
    LEAST_COST,
    DecodeTimes,
    StepPace,
    cost,
    divide,
    order,
    tokens_for,
)

SCALE = 3900.0  # of the demo base


@dataclass(eq=False)
class Prompt:
    num_prefill: int
    num_computed: int = 0
    rank: float = 0.0

    @property
    def left(self) -> int:
        return self.num_prefill - self.num_computed


def rank_of(prompt: Prompt) -> float:
    return prompt.rank


def divided(
    prompts: Sequence[Prompt], budget: float, most_tokens: int = 512, multiple: int = 1
) -> dict[Prompt, int]:
    return dict(divide(prompts, budget, most_tokens, SCALE, rank_of, multiple))


# --- costs -----------------------------------------------------------------------------------


def test_token_at_the_scale_costs_twice_the_first():
    assert cost(0, 1, SCALE) == 1
    assert cost(3900, 1, SCALE) == 2
    assert cost(10, 3, SCALE) == pytest.approx(3 + (10 + 11 + 12) / SCALE)


@given(
    budget=st.floats(0, 1e6),
    past=st.integers(0, 200_000),
    left=st.integers(1, 200_000),
    scale=st.floats(1, 1e6),
)
@example(budget=math.inf, past=0, left=8000, scale=SCALE)
def test_tokens_are_as_many_as_the_budget_pays(budget, past, left, scale):
    num = tokens_for(budget, past, left, scale)
    assert 0 <= num <= left
    assert cost(past, num, scale) <= budget
    assert num == left or cost(past, num + 1, scale) > budget


# --- which prompts ---------------------------------------------------------------------------


def test_shorter_rest_goes_first_within_a_rank():
    long, short, middle = Prompt(8000, 7000), Prompt(10), Prompt(500, 450)
    assert order([long, short, middle]) == [short, middle, long]


def test_lower_rank_goes_first_whatever_the_length():
    poor, rich = Prompt(8000, rank=1), Prompt(10, rank=2)
    assert order([rich, poor], rank_of) == [poor, rich]


def test_equals_keep_the_order_of_admission():
    prompts = [Prompt(10) for _ in range(5)]
    assert order(prompts) == prompts


def test_short_prompt_is_not_held_up_by_a_long_one():
    long, short = Prompt(8000), Prompt(40)
    got = divided([long, short], budget=64)
    assert got[short] == 40
    assert got[long] == 23  # what is left of 64, attention counted


def test_first_admitted_gets_a_quarter_beside_a_flow_of_short_ones():
    long, shorts = Prompt(8000), [Prompt(60) for _ in range(9)]
    got = divided([long, *shorts], budget=64)
    assert got[long] == 15
    assert sum(got.values()) <= 64


def test_first_admitted_gets_a_quarter_of_the_tokens_without_decodes():
    long, shorts = Prompt(8000), [Prompt(500) for _ in range(9)]
    assert divided([long, *shorts], budget=math.inf, most_tokens=512)[long] == 128


def test_budget_of_nothing_gives_nothing():
    assert divided([Prompt(10)], budget=0) == {}
    assert divided([], budget=64) == {}


def test_chunks_end_at_multiples_unless_the_prompt_does():
    long, short = Prompt(8000, 64), Prompt(45)
    got = divided([long, short], budget=100, multiple=32)
    assert got == {short: 45, long: 32}


def test_least_chunk_is_given_where_the_budget_has_no_room_for_it():
    far, short = Prompt(200_000, 150_000), Prompt(10)  # a token of the first costs 39
    assert divided([far, short], budget=16) == {short: 1, far: 1}
    long, other = Prompt(8000), Prompt(40)
    assert divided([long, other], budget=16, multiple=32) == {long: 32, other: 32}


prompts_of = st.lists(
    st.builds(
        lambda past, left, rank: Prompt(past + left, past, rank),
        st.integers(0, 20_000),
        st.integers(1, 9000),
        st.sampled_from((0.0, 1.0, 2.0)),
    ),
    min_size=1,
    max_size=12,
)
budgets = st.floats(16, 5000) | st.just(math.inf)


@given(prompts_of, budgets, st.integers(1, 2048), st.sampled_from((1, 32)))
def test_nobody_gets_more_than_is_left_and_all_no_more_than_the_step(
    prompts, budget, most, multiple
):
    for prompt in prompts:
        prompt.num_computed -= prompt.num_computed % multiple
    got = divided(prompts, budget, most, multiple)
    assert all(0 < num <= prompt.left for prompt, num in got.items())
    assert sum(got.values()) <= most
    spent = sum(cost(p.num_computed, num, SCALE) for p, num in got.items())
    least = [cost(p.num_computed, min(multiple, p.left), SCALE) for p in got]
    assert spent <= budget + sum(sorted(least)[-2:]) + 1e-6  # the least of two may be beyond it
    for prompt, num in got.items():
        assert num == prompt.left or (prompt.num_computed + num) % multiple == 0


@given(prompts_of, budgets, st.integers(1, 2048))
def test_budget_is_used_up_while_there_is_work(prompts, budget, most):
    got = divided(prompts, budget, most)
    spent = sum(cost(p.num_computed, num, SCALE) for p, num in got.items())
    for prompt in prompts:
        num = got.get(prompt, 0)
        if num < prompt.left and sum(got.values()) < most:
            assert spent + cost(prompt.num_computed + num, 1, SCALE) > budget - 1e-6


@given(prompts_of, budgets, st.integers(4, 2048))
def test_first_admitted_always_gets_its_quarter(prompts, budget, most):
    num = divided(prompts, budget, most)[prompts[0]]
    past, left = prompts[0].num_computed, prompts[0].left
    assert num >= min(tokens_for(FIRST_SHARE * budget, past, left, SCALE), most // 4)
    assert num >= 1


@given(prompts_of, budgets, st.integers(2, 2048))
def test_first_in_the_order_is_served_in_every_step(prompts, budget, most):
    assert order(prompts, rank_of)[0] in divided(prompts, budget, most)


def test_long_prompt_ends_within_four_times_its_time_beside_an_endless_flow():
    long, steps = Prompt(2000), 0
    while long.left:
        prompts = [long, *(Prompt(30, rank=-1) for _ in range(10))]
        for prompt, num in divide(prompts, 64, 512, 1e12, rank_of):
            prompt.num_computed += num
        steps += 1
    assert steps <= 1.1 * 4 * 2000 / 64


# --- decode steps ----------------------------------------------------------------------------


def test_times_between_known_numbers_are_interpolated():
    times = DecodeTimes()
    assert times.seconds(5) is None
    times.record(4, 0, 0.1)
    times.record(8, 0, 0.2)
    assert times.seconds(5) == pytest.approx(0.125)
    assert (times.seconds(1), times.seconds(64)) == (0.1, 0.2)


def test_one_step_that_was_held_up_changes_nothing():
    times = DecodeTimes()
    for seconds in (3.0, 0.1, 0.1, 5.0, 0.1):
        times.record(4, 50, seconds)
    assert times.seconds(4, 50) == 0.1


def test_time_of_contexts_is_learnt_from_steps_of_one_number():
    times, draw = DecodeTimes(), random.Random(0)
    for step in range(200):
        context = 64 * (16 + step)
        times.record(64, context, (0.1 + 3e-6 * context) * draw.gauss(1, 0.03))
    assert times.seconds_per_context == pytest.approx(3e-6, rel=0.15)
    assert times.seconds(64, 64 * 400) == pytest.approx(0.1 + 3e-6 * 64 * 400, rel=0.1)


def test_contexts_that_cost_nothing_get_no_negative_time():
    times = DecodeTimes()
    for step in range(100):
        times.record(4, 100 * step, 0.1 - step / 10_000)
    assert times.seconds_per_context == 0
    assert times.seconds(4, 10**9) == pytest.approx(0.09, rel=0.01)


# --- pace ------------------------------------------------------------------------------------


@dataclass
class Machine:
    """Seconds of steps: base + seq * decodes + context * their contexts, and for prompts mixed +
    token * (tokens + positions / scale); decodes are padded to lanes."""

    base: float
    sequence: float
    context: float
    token: float
    scale: float = SCALE
    mixed: float = 0.0
    lanes: int = 1
    noise: float = 0.05
    stalls: float = 0.0  # share of steps that take ten times as long
    compiles: bool = False  # each size of step takes two seconds more at first
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def seconds(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> float:
        lanes = math.ceil(len(contexts) / self.lanes) * self.lanes
        took = self.base + self.sequence * lanes + self.context * sum(contexts)
        if chunks:
            took += self.mixed
            took += self.token * sum(cost(past, num, self.scale) for past, num in chunks)
        took *= math.exp(self.draw.gauss(0, self.noise))
        if self.draw.random() < self.stalls:
            took *= 10
        kind = (len(contexts), sum(num for _, num in chunks).bit_length())
        if self.compiles and kind not in self._seen:
            self._seen.add(kind)
            took += 2
        return took


# CPU: the demo base, fitted to measurements, for two threads. GPU: estimates.
CPU = dict(base=0.009, sequence=0.0007, context=1.9e-6, token=0.0007, scale=1100, lanes=16)
GPU = dict(base=0.010, sequence=0.00003, context=30e-9, token=40e-6, scale=28_600, mixed=0.004)


def run(
    machine: Machine,
    pace: StepPace,
    num_streams: int = 64,
    alone: int = 100,
    arrive: Callable[[int], Sequence[Prompt]] = lambda step: (),
    steps: int = 100_000,
) -> tuple[list[float], list[float], float]:
    """Gaps of streams beside a prompt of 8,000 tokens, after some steps alone; what they are with
    the same contexts without it; and the prompt's seconds."""
    contexts = [16] * num_streams
    prompts: list[Prompt] = []
    long = Prompt(8000)
    other = replace(machine, draw=random.Random(1), _seen=set(), compiles=False)
    gaps: list[float] = []
    without: list[float] = []
    for step in range(steps):
        prompts += [long] if step == alone else arrive(step)
        given = pace.divide(prompts, len(contexts), sum(contexts))
        chunks = [(prompt.num_computed, num) for prompt, num in given]
        took = machine.seconds(contexts, chunks)
        spent = sum(pace.cost(*chunk) for chunk in chunks)
        pace.record(len(contexts), spent, took, sum(contexts))
        if step >= alone:
            gaps.append(took)
            without.append(other.seconds(contexts, []))
        contexts = [context + 1 for context in contexts]
        for prompt, num in given:
            prompt.num_computed += num
        prompts = [prompt for prompt in prompts if prompt.left]
        if step >= alone and long not in prompts:
            break
    return without, gaps, sum(gaps)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@pytest.mark.parametrize("kind", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("num_streams", [1, 5, 16, 64])
def test_long_prompt_leaves_streams_their_pace(kind, num_streams):
    machine = Machine(**kind)
    pace = StepPace(None, 2048, machine.scale)
    alone, beside, took = run(machine, pace, num_streams)
    assert statistics.median(beside) <= 2.5 * statistics.median(alone)
    assert max(beside) <= 5 * max(alone)
    # Half of the time is the prompt's, less what a step costs for having prompts at all.
    share = (statistics.median(alone) - machine.mixed) / (2 * statistics.median(alone))
    assert took <= 1.25 * machine.token * cost(0, 8000, machine.scale) / share


@pytest.mark.parametrize("kind", [CPU, GPU], ids=["cpu", "gpu"])
def test_steps_that_are_held_up_do_not_change_the_pace(kind):
    machine = Machine(**kind, stalls=0.03, compiles=True)
    alone, beside, took = run(machine, StepPace(None, 2048, machine.scale))
    assert statistics.median(beside) <= 2.5 * statistics.median(alone)
    calm = run(Machine(**kind), StepPace(None, 2048, machine.scale))[1]
    assert 0.8 <= statistics.median(beside) / statistics.median(calm) <= 1.2


@pytest.mark.parametrize(
    ("kind", "target"), [(CPU, 0.25), (CPU, 0.4), (GPU, 0.02), (GPU, 0.05)], ids=str
)
def test_gaps_keep_to_the_target(kind, target):
    machine = Machine(**kind)
    _, beside, took = run(machine, StepPace(target, 2048, machine.scale))
    assert percentile(beside, 99) <= 1.5 * target
    assert statistics.median(beside) >= 0.75 * target or len(beside) < 20  # and it is used


@pytest.mark.parametrize("factor", [0.25, 4])
def test_promises_hold_where_contexts_cost_more_or_less_than_is_said(factor):
    machine = Machine(**CPU)
    alone, beside, _ = run(machine, StepPace(None, 2048, factor * machine.scale))
    assert statistics.median(beside) <= 2.5 * statistics.median(alone)
    assert max(beside) <= 5 * max(alone)
    _, beside, _ = run(machine, StepPace(0.4, 2048, factor * machine.scale))
    assert percentile(beside, 99) <= 1.5 * 0.4


def test_target_that_decodes_alone_exceed_leaves_prompts_the_least():
    machine = Machine(**CPU)
    pace = StepPace(0.01, 2048, SCALE)
    _, beside, _ = run(machine, pace)
    assert len(beside) <= cost(0, 8000, SCALE) / (LEAST_COST - 4) * 1.1


def test_machine_that_slows_down_is_followed():
    machine = Machine(**CPU)
    pace = StepPace(0.25, 2048, SCALE)
    run(machine, pace)
    machine.token *= 3
    _, beside, _ = run(machine, pace, alone=0)
    assert percentile(beside[20:], 99) <= 1.5 * 0.25


def test_decodes_are_measured_even_if_there_are_always_prompts():
    machine = Machine(**CPU)
    pace = StepPace(None, 2048, SCALE)
    alone, beside, _ = run(machine, pace, alone=0, arrive=lambda step: [Prompt(40)])
    assert statistics.median(beside) <= 2.5 * statistics.median(alone)


def test_short_prompts_pass_a_long_one_beside_decodes():
    pace = StepPace(None, 2048, SCALE)
    for _ in range(5):
        pace.record(16, 0, 0.03)
        pace.record(16, 32, 0.06)
    long, short = Prompt(8000), Prompt(20)
    assert dict(pace.divide([long, short], 16))[short] == 20


def test_nothing_but_the_bound_limits_prompts_where_nothing_decodes():
    pace = StepPace(0.001, 512, SCALE)
    assert pace.divide([long := Prompt(8000)], 0) == [(long, 512)]


def test_a_step_without_prompts_is_followed_by_some_with():
    pace = StepPace(None, 512, SCALE)
    budgets = [pace.budget(8) for _ in range(10)]  # and no step is recorded
    assert budgets[0] == 0
    assert all(a or b for a, b in zip(budgets, budgets[1:], strict=False))


def test_blocks_of_prompts_fit_the_least_step():
    pace = StepPace(0.001, 512, SCALE, multiple=32)
    pace.record(8, 0, 0.5)
    long, short = Prompt(320), Prompt(33)
    assert dict(pace.divide([long, short], 8)) == {long: 32, short: 32}
