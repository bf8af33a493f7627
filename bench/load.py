"""Put one long prompt beside many short streams: their gaps, and the memory of keys and values.

Every round runs three ways, in turn: the streams alone, the same with a prompt of --prompt-len
tokens until its first token comes, and that prompt alone. A gap is the time between two tokens of
one stream. Both ways begin with new streams, and the streams alone are timed for as many steps as
the last prompt took, so that their contexts are alike: a step grows with them by itself. Where
there is a prompt, each step compares the bytes of all KV blocks in use with the bytes that the
computed tokens need.

Then the memory of a process before the streams and the prompt come, with them, and 5 s after they
have left, each way by itself: they end, they are aborted (in this process), and their clients
disconnect (a server). Without a prefix cache, which would keep the prompts on purpose.

    python -m bench.load [MODEL] [--rounds 7] [--streams 64] [--target-itl-ms MS]
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import interleaved, new_parser, ratio, result_of, settings_of, spread, write
from bench.load_engine import Load
from bench.load_memory import disconnected, left_in_process
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model

ALONE, BESIDE, PROMPT = "streams alone", "beside the prompt", "prompt alone"
MOST_MEDIAN, MOST_WORST = 2.5, 5.0  # times the gaps of the streams alone
MOST_KV = 1.1  # times what the tokens need
MOST_P99 = 1.5  # times the target
MOST_RSS = 1.1  # times the memory before


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 1 where a promise is broken."""
    parser = new_parser("load", __doc__, seed=0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--stream-prompt-len", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=200, help="of the first streams alone")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--target-itl-ms", type=float, help="as the server's; default: none")
    parser.add_argument("--memory-rounds", type=int, default=3, help="of every way to leave")
    args = parser.parse_args(argv)
    console = Console(stderr=True, width=120)

    base = load_base(resolve_model(args.model))
    engine = Engine(base, EngineConfig(**engine_settings(args)))
    lengths = args.stream_prompt_len, args.prompt_len
    load = Load(engine, args.streams, *lengths, args.steps, args.seed)
    load.run_alone(0, num_steps=2)  # compiles
    memory: dict[str, Any] = {}
    if args.memory_rounds:
        memory |= left_in_process(load, args.memory_rounds, console)
    ways = {ALONE: load.run_alone, BESIDE: load.run_beside, PROMPT: load.run_prompt}
    rounds = interleaved(ways, args.rounds, console)
    if args.memory_rounds:
        command = ["serve", args.model, *flags_of(args)]
        memory["disconnect"] = disconnected(load, command, args.memory_rounds, console)

    found = {
        "gaps": figures(rounds, args.target_itl_ms),
        "memory": {way: {"rounds": each, **to_before(each)} for way, each in memory.items()},
        "rounds": rounds,
        "not_measured": ["GPU", "a network"],
    }
    promises = promises_of(found)
    show(found, promises, console)
    settings = settings_of(args, dtype=str(base.dtype), max_num_seqs=args.streams + 1)
    write(result_of("load", settings, {**found, "promises": promises}), args.out)
    return 0 if all(promises.values()) else 1


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the engine, by their names."""
    settings = {
        "max_num_seqs": args.streams + 1,
        "max_num_batched_tokens": max(args.max_num_batched_tokens, args.streams + 1),
        "prefix_cache_memory": 0,
    }
    if args.target_itl_ms is not None:
        settings["target_itl_ms"] = args.target_itl_ms
    return settings


def flags_of(args: argparse.Namespace) -> list[str]:
    """The same settings as flags of the server."""
    return [
        part
        for name, value in engine_settings(args).items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]


# --- output ----------------------------------------------------------------------------------


def figures(rounds: Mapping[str, Sequence[Any]], target_ms: float | None) -> dict[str, Any]:
    """Gaps of both ways with their ratios, the prompt's seconds, and KV in use at the end of the
    prompt, when most is."""
    alone, beside, prompt = rounds[ALONE], rounds[BESIDE], rounds[PROMPT]
    found: dict[str, Any] = {}
    for name in ("median", "p99", "worst"):
        without, with_prompt = ([one["gap_ms"][name] for one in way] for way in (alone, beside))
        found[f"{name}_ms"] = {ALONE: spread(without), BESIDE: spread(with_prompt)}
        found[f"{name}_ratio"] = ratio(with_prompt, without)
    found["prompt_s"] = {
        way: spread([one["prompt_s"] for one in rounds[way]]) for way in (BESIDE, PROMPT)
    }
    found["prompt_ratio"] = ratio(
        [one["prompt_s"] for one in beside], [one["prompt_s"] for one in prompt]
    )
    found["kv_used_to_needed"] = ratio(
        [one["kv_used_bytes"][-1] for one in beside], [one["kv_needed_bytes"][-1] for one in beside]
    )
    found["kv_used_bytes"] = spread([one["kv_used_bytes"][-1] for one in beside])
    if target_ms is not None:
        found["p99_to_target"] = found["p99_ms"][BESIDE]["median"] / target_ms
    return found


def to_before(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Peak of the memory and memory after, in proportion to that before, of one way to leave."""
    before = [one["before_rss"] for one in rounds]
    return {
        "peak_to_before": ratio([one["peak_rss"] for one in rounds], before),
        "after_to_before": ratio([one["after_rss"] for one in rounds], before),
    }


def promises_of(found: Mapping[str, Any]) -> dict[str, bool]:
    """Say which promises were kept. Those on the gaps are another with a target."""
    gaps = found["gaps"]
    kept = {f"KV at most {MOST_KV} times what tokens need": gaps["kv_used_to_needed"] <= MOST_KV}
    if "p99_to_target" in gaps:
        kept[f"P99 at most {MOST_P99} times the target"] = gaps["p99_to_target"] <= MOST_P99
    else:
        kept[f"median gap at most {MOST_MEDIAN} times"] = gaps["median_ratio"] <= MOST_MEDIAN
        kept[f"worst gap at most {MOST_WORST} times"] = gaps["worst_ratio"] <= MOST_WORST
    for way, each in found["memory"].items():
        kept[f"memory at most {MOST_RSS} times after: {way}"] = each["after_to_before"] <= MOST_RSS
    return kept


def show(found: Mapping[str, Any], promises: Mapping[str, bool], console: Console) -> None:
    """Print gaps, memory and promises."""
    gaps = found["gaps"]
    table = Table("gap, ms", title="medians over the rounds")
    for heading in (ALONE, BESIDE, "ratio"):
        table.add_column(heading, justify="right")
    for name in ("median", "p99", "worst"):
        cells = (f"{gaps[f'{name}_ms'][way]['median']:.1f}" for way in (ALONE, BESIDE))
        table.add_row(name, *cells, f"{gaps[f'{name}_ratio']:.2f}")
    console.print(table)
    seconds = (gaps["prompt_s"][way]["median"] for way in (BESIDE, PROMPT))
    console.print("prompt: {:.1f} s beside the streams, {:.1f} s alone".format(*seconds))
    used, more = gaps["kv_used_bytes"]["median"], gaps["kv_used_to_needed"]
    console.print(f"KV in use: {used / 2**20:.0f} MiB, {more:.3f} times what the tokens need")
    memory = Table("they left by", title="resident memory, times that before")
    for heading in ("peak", "5 s after"):
        memory.add_column(heading, justify="right")
    for way, each in found["memory"].items():
        memory.add_row(way, f"{each['peak_to_before']:.2f}", f"{each['after_to_before']:.2f}")
    console.print(memory)
    for promise, kept in promises.items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {promise}")


if __name__ == "__main__":
    raise SystemExit(main())
