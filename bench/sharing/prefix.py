"""Prompts that begin alike: first tokens with and without a cached beginning."""

import statistics
import time
from typing import Any

from rich.console import Console

from bench.harness import ratio
from bench.sharing.engines import greedy, new_engine
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS
from neuroada_serve.model.source import ModelSource

SYSTEM_TOKENS, USER_TOKENS = 400, 24


def prefix(source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    """Time first tokens: prompt new, its beginning cached, and cached for another adapter."""
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
    # Less than a block: a few tokens at the beginning are the same by chance or by the template.
    assert max(cached["miss"] + cached["another adapter"]) < CPU_BLOCK_TOKENS
    return {
        "ttft_ms": {name: statistics.median(times) for name, times in ttft.items()},
        "hit_to_miss": ratio(ttft["hit"], ttft["miss"]),
        "cached_tokens": statistics.median(cached["hit"]),
        "prompt_tokens": SYSTEM_TOKENS + USER_TOKENS,
        "all_ttft_ms": ttft,
    }
