"""Costs of a decode step with nothing merged, and with an adapter merged that others do not use."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.merge.engines import BATCH, PROMPT_LEN, new_engine
from bench.merge.swap import timed_ms
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams


def costs(source: ModelSource, k: int, rounds: int, console: Console) -> dict[str, Any]:
    """Time decode steps of an engine per case, a step of each in turn; derive ns per entry."""
    own, own_k1 = [f"k{k}-{i}" for i in range(BATCH)], [f"k1-{i}" for i in range(BATCH)]
    other = f"k{k}-{BATCH}"
    cases: dict[str, tuple[list[str | None], str | None]] = {
        "base": ([None] * BATCH, None),
        "own": (list(own), None),
        "own, another merged": (list(own), other),
        "own k=1": (list(own_k1), None),
        "own k=1, another k merged": (list(own_k1), other),
        "base, another merged": ([None] * BATCH, other),
    }
    engines: dict[str, Engine] = {}
    for case, (adapters, merged) in cases.items():
        names = dict.fromkeys(name for name in (*adapters, merged) if name is not None)
        engines[case] = new_engine(source, [*names, *([] if names else [other])])
        if merged is not None:
            engines[case].adapters.merging.merge(merged)
    steps: dict[str, list[float]] = {case: [] for case in cases}
    with progress_bar(console) as progress:
        task = progress.add_task(f"costs, k={k}", total=rounds)
        for number in range(rounds):
            for case, (adapters, _) in cases.items():
                start_decoding(engines[case], adapters)
            while all(engine.has_unfinished for engine in engines.values()):
                for case, engine in engines.items():
                    steps[case].append(timed_ms(engine.step))
            for engine in engines.values():
                while engine.has_unfinished:
                    engine.step()
            progress.update(task, completed=number + 1, refresh=True)
    step_ms = {case: statistics.median(times) for case, times in steps.items()}
    nnz = engines["own"].adapters.store.get(own[0]).nnz

    def entry(case: str, less: str) -> float:
        """Nanoseconds for one entry of an adapter of this k and one token."""
        return 1e6 * (step_ms[case] - step_ms[less]) / (BATCH * nnz)

    lane_ns = entry("own", "base")
    return {
        "step_ms": step_ms,
        "lane_ns_per_entry": lane_ns,
        "same_index_correction": entry("own, another merged", "own") / lane_ns,
        "other_index_correction": entry("own k=1, another k merged", "own k=1") / lane_ns,
        "base_correction": entry("base, another merged", "base") / lane_ns,
        "steps": steps,
    }


def start_decoding(engine: Engine, adapters: Sequence[str | None], steps: int = 40) -> None:
    """Add requests and step until all have had their first token."""
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "costs")
    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine.add_request(f"c{i}", prompt, params, adapter)
    started: set[str] = set()
    while len(started) < len(adapters):
        started |= {output.request_id for output in engine.step()}
