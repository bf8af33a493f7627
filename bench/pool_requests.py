"""The requests of bench/pool.py, on an engine in this process."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.engine.sequence import Sequence as EngineSequence
from neuroada_serve.request import Output, SamplingParams

ADAPTERS = 8
PROMPT, ANSWER = (10, 400), (5, 80)  # least and most tokens
COMMON = 64  # tokens of a common beginning
ROOM = 0.1  # of all tokens
SLOTS = 256  # more than the pool has blocks for
TOP_K = 5  # of draws
ARRIVALS = 0.1  # steps in which they arrive, for each request

Token = tuple[int, float]  # id, log probability


@dataclass(frozen=True)
class Asked:
    """One request, and the step in which it arrives."""

    name: str
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    step: int

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + (self.params.max_tokens or 0)


@dataclass
class Run:
    """Outcome of all requests together.

    answers: tokens with their log probabilities by request. reasons: of each final output, too.
    preempted: times by request.
    held: after every step, blocks in use, and the tokens in them; a shared one counts once.
    most_running: sequences at a time. num_short: steps after which some waited though there were
        slots: for blocks.
    computed, recomputed: tokens, and those of them that preempted sequences computed as prompts.
    """

    answers: dict[str, list[Token]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)
    held: list[tuple[int, int]] = field(default_factory=list)
    most_running: int = 0
    num_short: int = 0
    computed: int = 0
    recomputed: int = 0
    seconds: float = 0.0

    def add(self, output: Output) -> None:
        """Note what an output says."""
        self.answers.setdefault(output.request_id, []).extend(tokens_of(output))
        if output.finish_reason is not None:
            reasons = self.reasons.setdefault(output.request_id, [])
            reasons.append(output.error or output.finish_reason.value)

    def count(self, schedule: Schedule) -> None:
        """Count the tokens of a step."""
        self.computed += len(schedule.decodes)
        for chunk in schedule.prefills:
            self.computed += chunk.num_tokens
            if chunk.sequence.num_preempted:
                self.recomputed += chunk.num_tokens


def drawn(count: int, seed: int) -> list[Asked]:
    """Requests in the order of their arrival."""
    draw = random.Random(f"pool {seed}")
    steps = sorted(draw.randrange(max(1, round(ARRIVALS * count))) for _ in range(count))
    names = [None, *(f"a{i}" for i in range(ADAPTERS))]
    beginnings = {name: draw.choices(range(1000), k=COMMON) for name in names}
    requests = []
    for number, step in enumerate(steps):
        adapter = draw.choice(names)
        prompt = draw.choices(range(1000), k=log_uniform(draw, *PROMPT))
        if number % 4 == 0:
            prompt = (beginnings[adapter] + prompt)[: len(prompt)]
        params = SamplingParams(
            temperature=number % 2,
            top_k=TOP_K,
            seed=number,
            logprobs=0,
            max_tokens=log_uniform(draw, *ANSWER),
            ignore_eos=True,
        )
        requests.append(Asked(f"r{number}", prompt, params, adapter, step))
    return requests


def log_uniform(draw: random.Random, least: int, most: int) -> int:
    """Integer whose logarithm is uniform."""
    return round(math.exp(draw.uniform(math.log(least), math.log(most))))


def pool_blocks(requests: Sequence[Asked], block_tokens: int) -> int:
    """Blocks for a tenth of all tokens, and for the longest request at least."""
    tokens = ROOM * sum(asked.num_tokens for asked in requests)
    longest = max(asked.num_tokens for asked in requests)
    return math.ceil(max(tokens, longest) / block_tokens)


def together(engine: Engine, requests: Sequence[Asked], done: Callable[[int], None]) -> Run:
    """Answer all requests as they arrive.

    Args:
        done: called after each step with how many have ended.
    """
    run, execute = Run(), engine._executor.run

    def counting(schedule: Schedule, early: Any = None) -> list[Output]:
        run.count(schedule)
        return execute(schedule, early)

    engine._executor.run = counting
    sequences: list[EngineSequence] = []
    step, started = 0, time.perf_counter()
    while len(sequences) < len(requests) or engine.has_unfinished:
        while len(sequences) < len(requests) and requests[len(sequences)].step <= step:
            asked = requests[len(sequences)]
            engine.add_request(asked.name, asked.prompt, asked.params, asked.adapter)
            sequences += engine._scheduler.find(asked.name)
        for output in engine.step():
            run.add(output)
        if engine.num_running:
            run.held.append((engine.metrics.kv.used, tokens_held(engine)))
        run.most_running = max(run.most_running, engine.num_running)
        run.num_short += bool(engine.num_waiting and engine.num_running < SLOTS)
        step += 1
        done(len(run.reasons))
    run.seconds = time.perf_counter() - started
    run.preempted = {sequence.request_id: sequence.num_preempted for sequence in sequences}
    return run


def tokens_held(engine: Engine) -> int:
    """Tokens in the blocks of running sequences; a shared block's count once."""
    size, held = engine.metrics.kv.block_tokens, {}
    for sequence in engine._scheduler.running.values():
        for at, block in enumerate(sequence.blocks):
            tokens = min(size, max(0, sequence.num_computed - at * size))
            held[block] = max(tokens, held.get(block, 0))
    return sum(held.values())


def sampled(requests: Sequence[Asked], run: Run, count: int, seed: int) -> list[Asked]:
    """Requests to be asked alone: half of them preempted ones, where there are as many."""
    draw = random.Random(f"sample {seed}")
    shuffled = draw.sample(requests, len(requests))
    preempted = [asked for asked in shuffled if run.preempted[asked.name]][: math.ceil(count / 2)]
    others = [asked for asked in shuffled if asked not in preempted]
    return preempted + others[: count - len(preempted)]


def answer(engine: Engine, asked: Asked) -> list[Token]:
    """Ask one request by itself."""
    tokens: list[Token] = []
    engine.add_request(asked.name, asked.prompt, asked.params, asked.adapter)
    while engine.has_unfinished:
        for output in engine.step():
            tokens += tokens_of(output)
    return tokens


def tokens_of(output: Output) -> list[Token]:
    """New tokens of an output."""
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return [(token_id, scored.logprob) for token_id, scored in pairs]
