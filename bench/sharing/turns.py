"""Turns: more adapters are wanted at a time than fit on the device."""

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from bench.harness import interleaved
from bench.sharing.engines import (
    BATCH,
    ROOM,
    TURN_OUTPUT,
    TURN_PROMPT,
    TURN_SLOTS,
    WANTED,
    greedy,
    new_engine,
    room_bytes,
)
from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.workload import arrivals, random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams

TURN_REQUESTS = 120
TURN_LOAD = 0.5  # arrivals per request that could be served with room for all


def turns(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    """Time first and later tokens with device room for three of six adapters, and for all."""
    config: dict[str, Any] = {"prefix_cache_memory": 0, "max_num_seqs": TURN_SLOTS}
    roomy = new_engine(source, WANTED, **config)
    tight = new_engine(source, WANTED, adapter_memory=room_bytes(roomy), **config)
    assert tight.adapters.bank.num_resident == ROOM
    engines = {"room for three": tight, "room for all": roomy}
    params = greedy(TURN_OUTPUT)
    capacity = closed_rate(roomy, params)

    def run(name: str, number: int) -> tuple[list[float], list[float]]:
        seed = f"turns {number}"
        due = arrivals(TURN_REQUESTS, TURN_LOAD * capacity, 1.0, seed)
        prompts = random_prompts(TURN_REQUESTS, TURN_PROMPT, range(1000), seed)
        draw = random.Random(number)
        adapters = [f"a{draw.randrange(WANTED)}" for _ in due]
        return open_loop(engines[name], due, prompts, adapters, params)

    ways = {name: partial(run, name) for name in engines}
    rounds_of = interleaved(ways, rounds, console, "turns", warm_up=False)
    report: dict[str, Any] = {"requests_per_s": TURN_LOAD * capacity}
    for name, found in rounds_of.items():
        ran = [times for times, _ in found]
        gaps = [gap for _, between in found for gap in between]
        every = [t for times in ran for t in times]
        report[name] = {
            "ttft_ms_p50": statistics.median(every),
            "ttft_ms_p99": percentile(every, 99),
            "ttft_ms_max": max(every),
            "p99_to_p50": percentile(every, 99) / statistics.median(every),
            "itl_ms_p50": statistics.median(gaps),
            "itl_ms_p99": percentile(gaps, 99),
            "rounds_p99_to_p50": [percentile(t, 99) / statistics.median(t) for t in ran],
            "all_ttft_ms": ran,
        }
    report["room for three"]["adapters_parked"] = tight._scheduler.num_parked
    report["room for three"]["uploads"] = tight.adapters.tiers.metrics.num_uploads
    return report


def closed_rate(engine: Engine, params: SamplingParams) -> float:
    """Requests answered per second with BATCH outstanding; a first such run warms up."""
    prompts = random_prompts(4 * BATCH, TURN_PROMPT, range(1000), "rate")
    for number in range(2):
        sent = ended = 0
        started = time.perf_counter()
        while ended < len(prompts):
            while sent < len(prompts) and sent - ended < BATCH:
                engine.add_request(f"w{number}-{sent}", prompts[sent], params, f"a{sent % WANTED}")
                sent += 1
            ended += sum(output.finished for output in engine.step())
    return len(prompts) / (time.perf_counter() - started)


def open_loop(
    engine: Engine,
    due_s: Sequence[float],
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    params: SamplingParams,
) -> tuple[list[float], list[float]]:
    """Add requests when they are due: (ms to every first token, ms between later tokens)."""
    started, sent = time.perf_counter(), 0
    last: dict[str, float] = {}
    ttft_ms, gaps_ms = [], []
    while sent < len(due_s) or engine.has_unfinished:
        now = time.perf_counter() - started
        while sent < len(due_s) and due_s[sent] <= now:
            engine.adapters.prefetch(adapters[sent])
            engine.add_request(f"r{sent}", prompts[sent], params, adapters[sent])
            last[f"r{sent}"] = started + due_s[sent]  # it waited for a step to end, too
            sent += 1
        for output in engine.step():
            assert output.error is None, output.error
            came = time.perf_counter()
            times = ttft_ms if output.num_output_tokens == 1 else gaps_ms
            times.append(1000 * (came - last[output.request_id]))
            last[output.request_id] = came
    return ttft_ms, gaps_ms
