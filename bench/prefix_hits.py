"""Ask with one system prompt: first tokens of hits and misses, and the blocks that hold it.

One request at a time: a chat with a new system prompt, one with the same and another question, and
one with the same for another adapter; as often as --rounds says four times over, in turn.

Then 64 requests of eight adapters, all with one system prompt, run at once. The blocks that hold it
are counted in their block tables. So are those of requests that differ in nothing but the tenant,
the salt, or the version of their adapter: no two such groups may have a block in common.

Not measured: a GPU, HTTP.

    python -m bench.prefix_hits [MODEL] [--rounds 7]
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from rich.console import Console

from bench.harness import new_parser, result_of, settings_of, write
from bench.sharing.engines import greedy, new_engine
from bench.sharing.prefix import SYSTEM_TOKENS, USER_TOKENS, prefix
from neuroada_serve.benchmark.adapters import random_adapter
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource, resolve_model

ADAPTERS, EACH = 8, 8
TENANTS, SALTS, VERSIONS = ("t1", "t2"), ("", "salt"), 2
ANSWER = 512  # more tokens than any answers while the others start
MOST_HIT = 0.15  # of the time of a miss


def main(argv: Sequence[str] | None = None) -> int:
    """Time, then count; return 1 where a promise is broken."""
    args = new_parser("prefix_hits", __doc__).parse_args(argv)
    console = Console(stderr=True, width=120)
    source = resolve_model(args.model)
    found = {
        "time": prefix(source, args.rounds, console),
        "adapters": of_adapters(source),
        "others": of_others(source),
    }
    promises = promises_of(found)
    show(found, promises, console)
    settings = settings_of(args, system_tokens=SYSTEM_TOKENS, user_tokens=USER_TOKENS)
    write(result_of("prefix_hits", settings, {**found, "promises": promises}), args.out)
    return 0 if all(promises.values()) else 1


# --- blocks ------------------------------------------------------------------------------------


def of_adapters(source: ModelSource) -> dict[str, Any]:
    """Run eight requests of each of eight adapters at once, and count their blocks."""
    engine = new_engine(source, ADAPTERS, max_num_seqs=ADAPTERS * EACH)
    for prompt, number in zip(prompts(ADAPTERS * EACH), range(ADAPTERS * EACH), strict=True):
        engine.add_request(f"r{number}", prompt, greedy(ANSWER), f"a{number % ADAPTERS}")
    return counted(engine)


def of_others(source: ModelSource) -> dict[str, Any]:
    """Run requests of one adapter's name that differ in tenant, salt or version."""
    num_groups = len(TENANTS) * len(SALTS) * VERSIONS
    engine = new_engine(source, 1, max_num_seqs=2 * num_groups)
    modules = engine.adapters.store.get("a0").source.modules
    indices = {name: module.index for name, module in modules.items()}
    asked = iter(prompts(2 * num_groups))
    for version in range(VERSIONS):
        if version:
            adapter = random_adapter(engine.base.spec, indices, seed=version)
            engine.adapters.add_resident("a0", adapter, replace=True)
        for tenant, salt in product(TENANTS, SALTS):
            names = [f"{version} {tenant} {salt} {number}" for number in range(2)]
            new = [next(asked) for _ in names]
            engine.add_requests(names, new, greedy(ANSWER), "a0", tenant, salt)
    return counted(engine)


def prompts(count: int) -> list[list[int]]:
    """Prompts of one system prompt, each with other tokens behind it from the first on."""
    [system] = random_prompts(1, SYSTEM_TOKENS, range(1000), "system")
    users = random_prompts(count, USER_TOKENS, range(1000), "users")
    return [[*system, number, *user[1:]] for number, user in enumerate(users)]


def counted(engine: Engine) -> dict[str, Any]:
    """Step until all requests run, then count their blocks by group: all that has one tenant,
    salt and adapter version.

    Returns:
        copies: of the system prompt's whole blocks in each group; 1 where they are shared.
        across: blocks that two groups have in common.
        used, shared: blocks as the engine's metrics say. unshared: that would be used if each
        request had its own.
    """
    running = engine._scheduler.running
    while engine.num_waiting or not all(s.is_decoding for s in running.values()):
        for output in engine.step():
            assert output.finish_reason is None, output
    kv = engine.metrics.kv
    whole = SYSTEM_TOKENS // kv.block_tokens
    groups: dict[tuple[str, str, str], list[list[int]]] = {}
    for sequence in running.values():
        assert sequence.version is not None
        key = sequence.tenant, sequence.cache_salt, sequence.version.digest
        groups.setdefault(key, []).append(sequence.blocks)
    all_of = [{block for blocks in group for block in blocks} for group in groups.values()]
    held = [{block for blocks in group for block in blocks[:whole]} for group in groups.values()]
    return {
        "requests": len(running),
        "groups": len(groups),
        "block_tokens": kv.block_tokens,
        "copies": [len(blocks) / whole for blocks in held],
        "across": sum(len(some & others) for some, others in combinations(all_of, 2)),
        "used": kv.used,
        "shared": kv.shared,
        "unshared": sum(len(blocks) for group in groups.values() for blocks in group),
    }


# --- output ------------------------------------------------------------------------------------


def promises_of(found: dict[str, Any]) -> dict[str, bool]:
    """Promises, and if they were kept."""
    adapters, others = found["adapters"], found["others"]
    whole = SYSTEM_TOKENS // adapters["block_tokens"]
    return {
        f"a hit takes at most {MOST_HIT} of a miss": found["time"]["hit_to_miss"] <= MOST_HIT,
        "the system prompt is held once for each adapter": (
            set(adapters["copies"]) == {1} and adapters["shared"] == whole * adapters["groups"]
        ),
        "no block is shared across adapters": adapters["across"] == 0,
        "no block is shared across tenants, salts or versions": (
            set(others["copies"]) == {1} and others["across"] == 0
        ),
    }


def show(found: dict[str, Any], promises: dict[str, bool], console: Console) -> None:
    """Print times, blocks and promises."""
    row = found["time"]
    times = {name: round(ms, 1) for name, ms in row["ttft_ms"].items()}
    console.print(f"first token, ms: {times}; a hit takes {row['hit_to_miss']:.3f} of a miss")
    for name in ("adapters", "others"):
        row = found[name]
        console.print(
            f"{name}: {row['requests']} requests in {row['groups']} groups use {row['used']} "
            f"blocks, {row['shared']} of them shared; each for itself, {row['unshared']}"
        )
    for promise, kept in promises.items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {promise}")


if __name__ == "__main__":
    raise SystemExit(main())
