"""What adapters cost: decode throughput of one engine with other adapters in the batch.

Every round runs each case once, in turn, so that drift of the machine hits all alike; the ratio of
a case is taken to the base case of its own round. Prints a table, writes JSON; its last line is
that JSON. Not measured here: prefill, HTTP, a GPU.

    python bench/mixed_batch.py [--rounds 5] [--requests 16] [--tokens 64] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from neuroada_serve import LLM, SamplingParams, __version__
from neuroada_serve.adapters.format import Adapter, AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.model.loader import adaptable_modules, load_base
from neuroada_serve.model.source import resolve_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Write a short story about a lighthouse."


def random_adapters(k: int, count: int) -> list[Adapter]:
    """Adapters of the demo base at its largest weights, with small random values."""
    base = load_base(resolve_model("demo"))
    index = {n: magnitude_index(m.weight, k) for n, m in adaptable_modules(base.model).items()}
    targets = tuple(sorted({name.rpartition(".")[2] for name in index}))
    config = AdapterConfig("demo", base.spec.fingerprint, k, targets)
    adapters = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        parts = {
            name: ModuleBypass(i, (torch.randn(i.shape, generator=generator) * 0.02).bfloat16())
            for name, i in index.items()
        }
        adapters.append(make_adapter(config, parts))
    return adapters


def decode_tokens_per_s(llm: LLM, names: list[str | None], num_tokens: int) -> float:
    """Throughput from the second token of the last request on: decode steps only."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    engine = llm.engine
    prompt = engine.base.tokenizer(PROMPT).input_ids
    for i, name in enumerate(names):
        engine.add_request(f"bench-{i}", prompt, params, name)
    num_started = 0
    while num_started < len(names):
        num_started += len(engine.step())
    started, produced = time.perf_counter(), 0
    while engine.has_unfinished:
        produced += len(engine.step())
    return produced / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mixed_batch.json")
    args = parser.parse_args()

    num = args.requests
    llm = LLM("demo", dtype=args.dtype, max_num_seqs=num)
    for k in (1, 8):
        for i, adapter in enumerate(random_adapters(k, num)):
            llm.load_adapter(f"k{k}-{i}", adapter)
    cases: dict[str, tuple[list[str | None], str | None]] = {  # adapters, and the merged one
        "base": ([None] * num, None),
        f"{num} distinct adapters, k=1": ([f"k1-{i}" for i in range(num)], None),
        f"{num} distinct adapters, k=8": ([f"k8-{i}" for i in range(num)], None),
        "one adapter, k=8": (["k8-0"] * num, None),
        "one adapter, k=8, merged": (["k8-0"] * num, "k8-0"),
        "half of them the merged one, half the base, k=8": (["k8-0", None] * (num // 2), "k8-0"),
    }
    samples: dict[str, list[float]] = {name: [] for name in cases}
    decode_tokens_per_s(llm, [None] * num, 8)  # warm up
    for _ in track(range(args.rounds), "rounds", console=Console(stderr=True)):
        for name, (names, merged) in cases.items():
            if merged is not None:
                llm.merge(merged)
            samples[name].append(decode_tokens_per_s(llm, names, args.tokens))
            if merged is not None:
                llm.unmerge()

    switch_ms: dict[str, list[float]] = {"merge": [], "swap": [], "unmerge": []}
    for _ in range(20):
        for action, call in (
            ("merge", lambda: llm.merge("k1-0")),
            ("swap", lambda: llm.merge("k1-1")),
            ("unmerge", llm.unmerge),
        ):
            started = time.perf_counter()
            call()
            switch_ms[action].append((time.perf_counter() - started) * 1000)

    ratios = {
        name: statistics.median(a / b for a, b in zip(values, samples["base"], strict=True))
        for name, values in samples.items()
    }
    table = Table("case", "tokens/s (median)", "of base (median of rounds)")
    for name, values in samples.items():
        table.add_row(name, f"{statistics.median(values):.0f}", f"{ratios[name]:.3f}")
    Console(stderr=True).print(table)
    result = {
        "benchmark": "mixed_batch",
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "hardware": hardware(),
        "versions": {
            "neuroada_serve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {
            "model": "demo",
            "dtype": str(llm.engine.base.dtype),
            "requests": num,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        },
        "tokens_per_s": samples,
        "ratio_to_base": ratios,
        "switch_k1_ms": {name: statistics.median(values) for name, values in switch_ms.items()},
        "shared_index_bytes": llm.engine._bank.index_bytes,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def hardware() -> str:
    """Processor name and cores, as the kernel tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
