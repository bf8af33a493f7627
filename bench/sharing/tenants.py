"""Tenants that together ask for twice what can be served."""

import heapq
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.harness import interleaved
from bench.sharing.engines import (
    TURN_OUTPUT,
    TURN_PROMPT,
    TURN_SLOTS,
    WANTED,
    greedy,
    new_engine,
    room_bytes,
)
from bench.sharing.turns import closed_rate
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource

DEMANDS = {"t1": 5, "t2": 3, "t3": 3, "t4": 9}
TENANT_SECONDS = 20.0
TENANT_CASES: dict[str, dict[str, float]] = {
    "equal shares": {},
    "shares 2:1:1:1": {"t1": 2.0},
    "equal, room for three": {},
}


def tenants(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    """Measure the tokens that each tenant gets where all ask for more than their share."""
    names = list(DEMANDS)
    engines: dict[str, Engine] = {}
    for case, weights in TENANT_CASES.items():
        config: dict[str, Any] = {"prefix_cache_memory": 0, "tenant_weights": weights}
        if "room for three" in case:
            config |= {
                "adapter_memory": room_bytes(engines["equal shares"]),
                "max_num_seqs": TURN_SLOTS,
            }
        engines[case] = new_engine(source, WANTED, **config)
    capacity = closed_rate(engines["equal shares"], greedy(TURN_OUTPUT))
    ways = {
        case: (lambda number, e=engine: overload(e, 2 * capacity, number))
        for case, engine in engines.items()
    }
    served = interleaved(ways, rounds, console, "tenants", warm_up=False)
    report: dict[str, Any] = {"requests_per_s": 2 * capacity, "demands": DEMANDS}
    for case, ran in served.items():
        weights = {name: TENANT_CASES[case].get(name, 1.0) for name in names}
        indices = [jain([one[name] / weights[name] for name in names]) for one in ran]
        total = {name: statistics.median(one[name] for one in ran) for name in names}
        report[case] = {
            "tokens_per_s": total,
            "jain_index": statistics.median(indices),
            "rounds_jain_index": indices,
            "rounds": ran,
        }
    return report


def overload(engine: Engine, rate: float, seed: int) -> dict[str, float]:
    """Output tokens per second of every tenant, once the queue has built up."""
    draw = random.Random(f"tenants {seed}")
    params = greedy(TURN_OUTPUT)
    rates = {name: rate * share / sum(DEMANDS.values()) for name, share in DEMANDS.items()}
    due = [(draw.expovariate(rates[name]), name) for name in DEMANDS]
    heapq.heapify(due)
    tenant_of: dict[str, str] = {}
    tokens = dict.fromkeys(DEMANDS, 0)
    started, first = time.perf_counter(), TENANT_SECONDS / 4
    prompts = random_prompts(512, TURN_PROMPT, range(1000), f"tenants {seed}")
    while (now := time.perf_counter() - started) < TENANT_SECONDS:
        while due[0][0] <= now:
            at, name = heapq.heappop(due)
            request_id = f"s{seed}-{len(tenant_of)}"
            prompt = prompts[len(tenant_of) % len(prompts)]
            adapter = f"a{draw.randrange(WANTED)}"
            tenant_of[request_id] = name
            engine.add_requests([request_id], [prompt], params, adapter, tenant=name)
            heapq.heappush(due, (at + draw.expovariate(rates[name]), name))
        for output in engine.step():
            assert output.error is None, output.error
            if now >= first:
                tokens[tenant_of[output.request_id]] += len(output.token_ids)
    for request_id in tenant_of:
        engine.abort(request_id)
    engine.step()
    assert not engine.has_unfinished
    return {name: count / (TENANT_SECONDS - first) for name, count in tokens.items()}


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))
