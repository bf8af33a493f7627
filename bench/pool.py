"""Push many requests of mixed lengths through a KV cache that holds a tenth of their tokens.

Requests of eight adapters and of the base, float32, half of them greedy and half with seeded draws,
arrive at random steps, faster than they are answered. Lengths are log-uniform: many short ones, few
long ones. Every fourth prompt begins as others of its adapter do. Blocks run out before slots do,
so sequences are preempted and computed again.

Then a sample of them, half of it preempted ones where there are as many, is asked one at a time in
an engine with room for all and without a prefix cache: the answers must be the same tokens. Their
log probabilities are compared too. Draws are of the five likeliest tokens: with all of a
vocabulary, whose tail is flat, rounding would choose between neighbours there.

    python -m bench.pool [MODEL] [--requests 1000] [--alone 100]
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.harness import new_parser, result_of, settings_of, write
from bench.pool_requests import (
    ADAPTERS,
    SLOTS,
    Asked,
    Run,
    Token,
    answer,
    drawn,
    pool_blocks,
    sampled,
    together,
)
from bench.sharing.engines import new_engine
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import resolve_model
from neuroada_serve.request import FinishReason

LENGTH = FinishReason.LENGTH.value


def main(argv: Sequence[str] | None = None) -> int:
    """Run all together, then some alone; return 1 where a promise is broken."""
    parser = new_parser("pool", __doc__, rounds=None, seed=0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=100, help="of them, asked alone too")
    args = parser.parse_args(argv)
    console = Console(stderr=True, width=120)
    source = resolve_model(args.model)

    requests = drawn(args.requests, args.seed)
    roomy = new_engine(source, ADAPTERS, dtype="float32", max_num_seqs=1, prefix_cache_memory=0)
    block_tokens = roomy.metrics.kv.block_tokens
    blocks = pool_blocks(requests, block_tokens)
    size = blocks * (roomy._cache.num_bytes // roomy._cache.num_blocks)
    tight = new_engine(source, ADAPTERS, dtype="float32", max_num_seqs=SLOTS, kv_cache_memory=size)
    assert tight.metrics.kv.blocks == blocks
    with progress_bar(console) as progress:
        task = progress.add_task("together", total=len(requests))
        run = together(tight, requests, lambda n: progress.update(task, completed=n, refresh=True))
        sample = sampled(requests, run, args.alone, args.seed)
        task = progress.add_task("alone", total=len(sample))
        alone = {}
        for asked in sample:
            alone[asked.name] = answer(roomy, asked)
            progress.update(task, advance=1, refresh=True)

    found = {
        **figures(tight, requests, run),
        "alone": comparison(run, alone),
        "held": run.held,
        "not_measured": ["GPU", "HTTP"],
    }
    promises = promises_of(found)
    show(found, promises, console)
    settings = settings_of(args, dtype="float32", adapters=ADAPTERS, slots=SLOTS, pool_bytes=size)
    write(result_of("pool", settings, {**found, "promises": promises}), args.out)
    return 0 if all(promises.values()) else 1


def comparison(run: Run, alone: dict[str, list[Token]]) -> dict[str, Any]:
    """Compare answers with those alone.

    Returns:
        differ: the names of those with other tokens. logprob_difference: the largest one before the
        first other token.
    """
    differ, largest = [], 0.0
    for name, tokens in alone.items():
        both = list(zip(run.answers[name], tokens, strict=False))
        same = list(itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], both))
        largest = max([largest, *(abs(a - b) for (_, a), (_, b) in same)])
        if not len(same) == len(tokens) == len(run.answers[name]):
            differ.append(name)
    return {
        "asked": len(alone),
        "preempted": sum(run.preempted[name] > 0 for name in alone),
        "differ": differ,
        "logprob_difference": largest,
    }


def figures(engine: Engine, requests: Sequence[Asked], run: Run) -> dict[str, Any]:
    """Figures of the requests, the blocks and the time."""
    kv = engine.metrics.kv
    ratios = [used * kv.block_tokens / tokens for used, tokens in run.held if tokens]
    ended = [asked for asked in requests if run.reasons.get(asked.name) == [LENGTH]]
    answered = sum(map(len, run.answers.values()))
    prompts = sum(len(asked.prompt) for asked in requests)
    return {
        "requests": {"asked": len(requests), "ended_once": len(ended)},
        "tokens": {"prompts": prompts, "answered": answered},
        "pool": {
            "blocks": kv.blocks,
            "block_tokens": kv.block_tokens,
            "most_used": max(used for used, _ in run.held),
            "used_after": kv.used,
            "most_running": run.most_running,
            "steps_short_of_blocks": run.num_short,
            "cells_to_tokens_median": statistics.median(ratios),
        },
        "preemptions": engine.metrics.num_preemptions,
        "requests_preempted": sum(times > 0 for times in run.preempted.values()),
        "cached_tokens": engine.metrics.num_cached_tokens,
        "recomputed_share": run.recomputed / run.computed,
        "steps": engine.metrics.num_steps,
        "seconds": run.seconds,
        "answered_tokens_per_s": answered / run.seconds,
        "tokens_per_s": (prompts + answered) / run.seconds,
    }


def promises_of(found: dict[str, Any]) -> dict[str, bool]:
    """Promises, and if they were kept."""
    requests, alone = found["requests"], found["alone"]
    return {
        "every request ends exactly once, at its full length": (
            requests["ended_once"] == requests["asked"]
        ),
        "requests wait for blocks, not for slots, and preempted ones are asked alone": (
            found["pool"]["steps_short_of_blocks"] > 0
            and found["pool"]["most_running"] < SLOTS
            and found["preemptions"] > 0
            and alone["preempted"] > 0
        ),
        "token for token as alone": alone["asked"] > 0 and not alone["differ"],
        "no block in use afterwards": found["pool"]["used_after"] == 0,
    }


def show(found: dict[str, Any], promises: dict[str, bool], console: Console) -> None:
    """Print figures and promises."""
    pool, alone = found["pool"], found["alone"]
    console.print(
        f"{found['requests']['ended_once']} of {found['requests']['asked']} requests ended in "
        f"{found['seconds']:.0f} s, {found['answered_tokens_per_s']:.0f} tokens/s answered, "
        f"{found['tokens_per_s']:.0f} with prompts"
    )
    console.print(
        f"{found['preemptions']} preemptions of {found['requests_preempted']} requests, "
        f"{found['recomputed_share']:.1%} of all tokens computed again"
    )
    console.print(
        f"{pool['most_running']} run at a time, others wait for blocks after "
        f"{pool['steps_short_of_blocks']} of {found['steps']} steps"
    )
    console.print(
        f"blocks: {pool['blocks']}, at most {pool['most_used']} in use; room in them "
        f"{pool['cells_to_tokens_median']:.3f} times their tokens (median)"
    )
    console.print(
        f"alone: {alone['asked']}, {alone['preempted']} of them had been preempted; "
        f"log probabilities differ by at most {alone['logprob_difference']:.1e}"
    )
    for promise, kept in promises.items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {promise}")


if __name__ == "__main__":
    raise SystemExit(main())
