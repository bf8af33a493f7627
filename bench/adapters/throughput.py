"""Throughput of requests for few and for many registered adapters."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.adapters.files import BATCH, PROMPT_LEN, name_of, new_engine
from bench.harness import interleaved, ratio
from neuroada_serve.benchmark.workload import arrivals, assign, random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams

POPULARITY = "zipf:1.5"
OUTPUT_LEN = 32
OVERLOAD = 1.5  # arrivals per request that can be served
BESIDE = "distinct"  # the case that the others are compared with


@dataclass(frozen=True)
class Load:
    """Requests with their adapters and the seconds at which they come."""

    adapters: Sequence[str]
    prompts: Sequence[Sequence[int]]
    due_s: Sequence[float]


@dataclass(frozen=True)
class Served:
    """Rate and first tokens of a load."""

    tokens_per_s: float
    ttft_ms: list[float]
    num_read: int  # adapters that came from disk
    num_distinct: int


def throughput(
    source: ModelSource, folders: dict[int, Path], rounds: int, num_requests: int, console: Console
) -> dict[str, Any]:
    """Serve every case in every round; ratios are within a round."""
    engines = {count: new_engine(source, folder) for count, folder in folders.items()}
    largest = engines[max(engines)]
    vocab = range(int(largest.base.model.config.get_text_config().vocab_size))
    own = [name_of(number) for number in range(BATCH)]
    for name in own:
        largest.adapters.bring_in(name)
    cases: dict[str, tuple[Engine, int | None]] = {BESIDE: (largest, None)}
    cases |= {str(count): (engine, count) for count, engine in engines.items()}

    def load(case: str, number: int, rate: float) -> Load:
        _, count = cases[case]
        seed = f"{number}"
        if count is None:
            chosen: list[int | None] = assign("distinct", num_requests, BATCH, seed)
        else:
            chosen = assign(POPULARITY, num_requests, count, seed)
        return Load(
            [name_of(n or 0) for n in chosen],
            random_prompts(num_requests, PROMPT_LEN, vocab, seed),
            arrivals(num_requests, rate, 1.0, seed),
        )

    for case, (engine, _) in cases.items():  # kernels compiled, memory touched
        serve(engine, load(case, -1, float("inf")))
    capacity = serve(largest, load(BESIDE, -2, float("inf"))).tokens_per_s / OUTPUT_LEN
    rate = OVERLOAD * capacity
    ways = {
        case: (lambda number, c=case: serve(cases[c][0], load(c, number, rate))) for case in cases
    }
    served = interleaved(ways, rounds, console, "throughput", warm_up=False)
    rates = {case: [one.tokens_per_s for one in ran] for case, ran in served.items()}
    one_adapter = str(min(engines))
    return {
        "requests_per_s": rate,
        "cases": [
            {
                "case": case,
                "tokens_per_s": statistics.median(rates[case]),
                "ratio_to_distinct": ratio(rates[case], rates[BESIDE]),
                "ratio_to_one": ratio(rates[case], rates[one_adapter]),
                "ttft_ms_p50": statistics.median(t for one in ran for t in one.ttft_ms),
                "adapters_read": [one.num_read for one in ran],
                "distinct_adapters": [one.num_distinct for one in ran],
                "rounds_tokens_per_s": rates[case],
            }
            for case, ran in served.items()
        ],
    }


def serve(engine: Engine, load: Load) -> Served:
    """Add requests when they are due; step until the last has ended."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    read_before = engine.adapters.tiers.metrics.num_disk_reads
    started, sent = time.perf_counter(), 0
    sent_at: dict[str, float] = {}
    ttft_ms: list[float] = []
    num_tokens = 0
    while sent < len(load.due_s) or engine.has_unfinished:
        now = time.perf_counter() - started
        while sent < len(load.due_s) and load.due_s[sent] <= now:
            engine.adapters.prefetch(load.adapters[sent])
            engine.add_request(f"r{sent}", load.prompts[sent], params, load.adapters[sent])
            sent_at[f"r{sent}"] = time.perf_counter()
            sent += 1
        for output in engine.step():
            assert output.error is None, output.error
            num_tokens += len(output.token_ids)
            if output.request_id in sent_at and output.num_output_tokens == 1:
                ttft_ms.append(1000 * (time.perf_counter() - sent_at.pop(output.request_id)))
    return Served(
        num_tokens / (time.perf_counter() - started),
        ttft_ms,
        engine.adapters.tiers.metrics.num_disk_reads - read_before,
        len(set(load.adapters)),
    )
