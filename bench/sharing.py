"""Who waits for how long: more adapters than fit, tenants that ask for more than there is, prompts
that begin alike.

    turns      six adapters wanted at Poisson arrivals, at half of what 16 outstanding requests get
               answered, device room for three of them, and for all: time to first token (SGLang's
               case: median 83 ms, 99th percentile 39.5 s). 64 slots, since whoever waits for its
               turn keeps its own
    tenants    four tenants whose demands are 5:3:3:9, together twice what can be served, each above
               its share: tokens that each got, Jain's index of them, with equal shares, with shares
               2:1:1:1, and with equal shares and device room for three of the six adapters
    prefix     time to first token of a chat whose first 400 tokens, a system prompt, were computed
               for an earlier request of the same adapter, or were not

Writes sharing.json and sharing.png to --out; the last line of stdout is the JSON. Not measured: a
GPU, HTTP.

    python bench/sharing.py [MODEL] [--rounds 5]
"""

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.report import environment, plain, progress_bar
from neuroada_serve.benchmark.workload import arrivals, random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource, resolve_model
from neuroada_serve.plots import legend_beside, new_panels, png
from neuroada_serve.request import SamplingParams

BATCH = 16
WANTED, ROOM, TURN_SLOTS = 6, 3, 64
TURN_REQUESTS, TURN_PROMPT, TURN_OUTPUT = 120, 24, 32
TURN_LOAD = 0.5  # arrivals per request that could be served with room for all
DEMANDS = {"t1": 5, "t2": 3, "t3": 3, "t4": 9}
TENANT_SECONDS = 20.0
TENANT_CASES: dict[str, dict[str, float]] = {
    "equal shares": {},
    "shares 2:1:1:1": {"t1": 2.0},
    "equal, room for three": {},
}
SYSTEM_TOKENS, USER_TOKENS = 400, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    console = Console(stderr=True)
    source = resolve_model(args.model)
    result: dict[str, Any] = {
        "schema": "neuroada-bench/1",
        "benchmark": "sharing",
        **environment(),
        "settings": {
            "model": args.model,
            "rounds": args.rounds,
            "batch": BATCH,
            "wanted": WANTED,
            "room": ROOM,
            "turn_slots": TURN_SLOTS,
            "demands": DEMANDS,
            "system_tokens": SYSTEM_TOKENS,
        },
        "turns": turns(source, args.rounds, console),
        "tenants": tenants(source, args.rounds, console),
        "prefix": prefix(source, args.rounds, console),
    }
    show(result, console)
    args.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps(plain(result), allow_nan=False)
    (args.out / "sharing.json").write_text(document + "\n")
    plot(result, args.out / "sharing.png")
    print(document)


def new_engine(source: ModelSource, count: int, **config: Any) -> Engine:
    """An engine with adapters a0, a1, ... of k=1."""
    base = load_base(source)
    indices = magnitude_indices(base, [1])[1]
    engine = Engine(base, EngineConfig(**{"max_num_seqs": BATCH, **config}))
    for number in range(count):
        adapter = random_adapter(base.spec, indices, number)
        engine.adapters.add_resident(f"a{number}", adapter)
    return engine


def room_bytes(engine: Engine) -> int:
    """A memory budget in which ROOM of the engine's adapters fit, which share one index table."""
    bank = engine.adapters.bank
    nnz = engine.adapters.store.get("a0").nnz
    return bank.columns_bytes(nnz) + ROOM * bank.values_bytes(nnz)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


# --- turns -----------------------------------------------------------------------------------


def turns(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    config: dict[str, Any] = {"prefix_cache_memory": 0, "max_num_seqs": TURN_SLOTS}
    roomy = new_engine(source, WANTED, **config)
    tight = new_engine(source, WANTED, adapter_memory=room_bytes(roomy), **config)
    assert tight.adapters.bank.num_resident == ROOM
    engines = {"room for three": tight, "room for all": roomy}
    params = greedy(TURN_OUTPUT)
    capacity = closed_rate(roomy, params)
    ttft: dict[str, list[list[float]]] = {name: [] for name in engines}
    gaps: dict[str, list[float]] = {name: [] for name in engines}
    with progress_bar(console) as progress:
        task = progress.add_task("turns", total=rounds * len(engines))
        for number in range(rounds):
            due = arrivals(TURN_REQUESTS, TURN_LOAD * capacity, 1.0, f"turns {number}")
            prompts = random_prompts(TURN_REQUESTS, TURN_PROMPT, range(1000), f"turns {number}")
            draw = random.Random(number)
            adapters = [f"a{draw.randrange(WANTED)}" for _ in due]
            for name, engine in engines.items():
                times, between = open_loop(engine, due, prompts, adapters, params)
                ttft[name].append(times)
                gaps[name] += between
                progress.update(task, advance=1, refresh=True)
    report: dict[str, Any] = {"requests_per_s": TURN_LOAD * capacity}
    for name, ran in ttft.items():
        every = [t for times in ran for t in times]
        report[name] = {
            "ttft_ms_p50": statistics.median(every),
            "ttft_ms_p99": percentile(every, 99),
            "ttft_ms_max": max(every),
            "p99_to_p50": percentile(every, 99) / statistics.median(every),
            "itl_ms_p50": statistics.median(gaps[name]),
            "itl_ms_p99": percentile(gaps[name], 99),
            "rounds_p99_to_p50": [percentile(t, 99) / statistics.median(t) for t in ran],
            "all_ttft_ms": ran,
        }
    report["room for three"]["adapters_parked"] = tight._scheduler.num_parked
    report["room for three"]["uploads"] = tight.adapters.tiers.metrics.num_uploads
    return report


def closed_rate(engine: Engine, params: SamplingParams) -> float:
    """Requests per second with BATCH outstanding; a first such run warms up."""
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
    """(time to first token of every request, gaps between later tokens), ms."""
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


# --- tenants ---------------------------------------------------------------------------------


def tenants(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
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
    served: dict[str, list[dict[str, float]]] = {case: [] for case in engines}
    with progress_bar(console) as progress:
        task = progress.add_task("tenants", total=rounds * len(engines))
        for number in range(rounds):
            for case, engine in engines.items():
                served[case].append(overload(engine, 2 * capacity, number))
                progress.update(task, advance=1, refresh=True)
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
    """1 where all have the same, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


# --- prefix ----------------------------------------------------------------------------------


def prefix(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    engine = new_engine(source, 2)
    pairs = 4 * rounds
    system = random_prompts(pairs, SYSTEM_TOKENS, range(1000), "system")
    users = random_prompts(3 * pairs, USER_TOKENS, range(1000), "users")
    ttft: dict[str, list[float]] = {"miss": [], "hit": [], "another adapter": []}
    cached: dict[str, list[int]] = {name: [] for name in ttft}
    with progress_bar(console) as progress:
        task = progress.add_task("prefix", total=pairs)
        for number in range(pairs):
            for name, adapter in (("miss", "a0"), ("hit", "a0"), ("another adapter", "a1")):
                prompt = system[number] + users.pop()
                started = time.perf_counter()
                engine.add_request(name, prompt, greedy(1), adapter)
                outputs = []
                while engine.has_unfinished:
                    outputs += engine.step()
                ttft[name].append(1000 * (time.perf_counter() - started))
                cached[name].append(outputs[-1].num_cached_tokens)
            progress.update(task, completed=number + 1, refresh=True)
    assert set(cached["miss"]) == set(cached["another adapter"]) == {0}
    return {
        "ttft_ms": {name: statistics.median(times) for name, times in ttft.items()},
        "hit_to_miss": statistics.median(
            hit / miss for hit, miss in zip(ttft["hit"], ttft["miss"], strict=True)
        ),
        "cached_tokens": statistics.median(cached["hit"]),
        "prompt_tokens": SYSTEM_TOKENS + USER_TOKENS,
        "all_ttft_ms": ttft,
    }


# --- output ----------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    for name in ("room for all", "room for three"):
        row = result["turns"][name]
        console.print(
            f"{name}: ttft p50 {row['ttft_ms_p50']:.0f} p99 {row['ttft_ms_p99']:.0f} ms, "
            f"{row['p99_to_p50']:.1f} times; itl p50 {row['itl_ms_p50']:.0f} p99 "
            f"{row['itl_ms_p99']:.0f}"
        )
    for case in TENANT_CASES:
        row = result["tenants"][case]
        rates = {name: round(rate) for name, rate in row["tokens_per_s"].items()}
        console.print(f"{case}: tokens/s {rates}, Jain's index {row['jain_index']:.3f}")
    row = result["prefix"]
    console.print(f"prefix: ttft ms {row['ttft_ms']}, hit/miss {row['hit_to_miss']:.3f}")


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, middle, right) = new_panels(1, 3, 15, 3.6)
    for name in ("room for all", "room for three"):
        every = sorted(t for times in result["turns"][name]["all_ttft_ms"] for t in times)
        left.plot(every, [(i + 1) / len(every) for i in range(len(every))], label=name)
    left.set(xlabel="time to first token, ms", ylabel="share of requests", xlim=(0, None))
    legend_beside(left, "six adapters wanted")
    names, width = list(DEMANDS), 0.27
    cases = [case for case in TENANT_CASES if case in result["tenants"]]
    for i, case in enumerate(cases):
        rates = [result["tenants"][case]["tokens_per_s"][name] for name in names]
        middle.bar([j + i * width for j in range(len(names))], rates, width, label=case)
    middle.set_xticks(
        [j + width for j in range(len(names))],
        [f"{name},\nasks {share}" for name, share in DEMANDS.items()],
    )
    middle.set(ylabel="output tokens/s, at twice the load")
    legend_beside(middle)
    ttft = result["prefix"]["ttft_ms"]
    right.bar(list(ttft), list(ttft.values()))
    right.set(ylabel=f"time to first token, ms\n({SYSTEM_TOKENS} + {USER_TOKENS} tokens)")
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
