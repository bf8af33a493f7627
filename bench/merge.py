"""Merging: how fast one adapter takes another's place, whether the weights survive, when it pays.

    swap       one merged adapter taking the place of another (k=1 and k=8, all projections), beside
               PEFT's merge_adapter + unmerge_adapter of a LoRA r=8 of the same modules, which is
               what a swap takes there; round by round in one process
    rotations  --rotations swaps over 64 adapters of two sizes, then unmerged: is the digest of all
               weights what it was
    costs      a decode step of 16 requests that differ, with nothing merged, with an adapter merged
               that none of them uses, and on the base with it merged: the constants of
               engine/merge_policy.py
    modes      never, one adapter kept merged, and auto, on loads of five adapters of k=8: all
               requests for one (identical), nearly all (skewed), as often each (uniform), and
               nearly all for one that changes (shifting); 20 requests outstanding at all times

Writes merge.json and merge.png to --out; the last line of stdout is the JSON. Not measured: a GPU.

    python bench/merge.py [MODEL] [--rounds 7] [--rotations 10000]
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from neuroada_serve.benchmark.adapters import (
    magnitude_indices,
    random_adapter,
    save_random_lora,
)
from neuroada_serve.benchmark.report import environment, plain, progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource, resolve_model
from neuroada_serve.request import SamplingParams

BATCH = 16
NUM_ROTATING = 64
PROMPT_LEN, OUTPUT_LEN = 16, 48
NUM_REQUESTS = 96
OUTSTANDING = BATCH + 4
MODE_K = 8
MODE_ADAPTERS = 5
MODES = ("never", "named", "auto")
LOADS = ("identical", "skewed", "uniform", "shifting")
POPULAR = 0.9  # share of the popular adapter in skewed and shifting
SHIFTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rotations", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    console = Console(stderr=True)
    source = resolve_model(args.model)
    base = load_base(source)
    indices = magnitude_indices(base, [1, MODE_K])
    engine = Engine(base, EngineConfig(max_num_seqs=BATCH, prefix_cache_memory=0))
    for k, count in ((1, NUM_ROTATING), (MODE_K, BATCH + 1)):
        for number in range(count):
            adapter = random_adapter(base.spec, indices[k], number)
            engine.adapters.add_resident(f"k{k}-{number}", adapter)
    digest = engine.base_digest()

    result: dict[str, Any] = {
        "schema": "neuroada-bench/1",
        "benchmark": "merge",
        **environment(),
        "settings": {"model": args.model, "rounds": args.rounds, "rotations": args.rotations},
        "swap": swap(engine, source, args.rounds, console),
        "rotations": rotations(engine, args.rotations, digest, console),
        "costs": costs(engine, args.rounds, console),
        "modes": modes(engine, args.rounds, console),
    }
    engine.adapters.unmerge()
    assert engine.base_digest() == digest
    show(result, console)
    args.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps(plain(result), allow_nan=False)
    (args.out / "merge.json").write_text(document + "\n")
    plot(result, args.out / "merge.png")
    print(document)


def timed_ms(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


# --- swap ------------------------------------------------------------------------------------


def swap(engine: Engine, source: ModelSource, rounds: int, console: Console) -> dict[str, Any]:
    """Times in ms of every round; a swap of ours is the median of eight in a row."""
    peft = peft_model(source)
    ours: dict[str, list[float]] = {"k1": [], f"k{MODE_K}": []}
    theirs: list[float] = []
    with progress_bar(console) as progress:
        task = progress.add_task("swap", total=rounds)
        for number in range(rounds + 1):
            for name, times in ours.items():
                engine.adapters.merge(f"{name}-0")
                swaps = [partial(engine.adapters.merge, f"{name}-{i}") for i in range(1, 9)]
                eight = [timed_ms(action) for action in swaps]
                times.append(statistics.median(eight))
            engine.adapters.unmerge()
            merge = timed_ms(peft.merge_adapter)
            theirs.append(merge + timed_ms(peft.unmerge_adapter))
            progress.update(task, completed=number, refresh=True)
    # The first round warms up.
    return {
        "ours_ms": {name: statistics.median(times[1:]) for name, times in ours.items()},
        "peft_lora_r8_ms": statistics.median(theirs[1:]),
        "times_faster": {
            name: statistics.median(b / a for a, b in zip(times[1:], theirs[1:], strict=True))
            for name, times in ours.items()
        },
        "rounds": {"ours_ms": ours, "peft_ms": theirs},
    }


def peft_model(source: ModelSource) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(source)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=base.dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_random_lora(base.spec, 8, 0, Path(folder) / "lora")
        return PeftModel.from_pretrained(
            model, str(Path(folder) / "lora"), autocast_adapter_dtype=False
        ).eval()


def rotations(engine: Engine, count: int, digest: str, console: Console) -> dict[str, Any]:
    """Swaps over all adapters of k=1, with one of k=8 now and then: another index."""
    started = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("rotations", total=count)
        for number in range(count):
            k = MODE_K if number % 97 == 0 else 1
            engine.adapters.merge(f"k{k}-{number % (BATCH if k == MODE_K else NUM_ROTATING)}")
            if number % 500 == 0:
                progress.update(task, completed=number, refresh=True)
    duration_s = time.perf_counter() - started
    while_merged = engine.base_digest()
    engine.adapters.unmerge()
    return {
        "swaps": count,
        "adapters": NUM_ROTATING,
        "duration_s": duration_s,
        "digest_before": digest,
        "digest_while_merged_differs": while_merged != digest,
        "digest_after": engine.base_digest(),
        "bit_exact": engine.base_digest() == digest,
    }


# --- costs -----------------------------------------------------------------------------------


def costs(engine: Engine, rounds: int, console: Console) -> dict[str, Any]:
    """Median decode steps, and what they say of one entry."""
    own = [f"k{MODE_K}-{number}" for number in range(BATCH)]
    other = f"k{MODE_K}-{BATCH}"
    cases: dict[str, tuple[list[str | None], str | None]] = {
        "base": ([None] * BATCH, None),
        "own": (list(own), None),
        "own, another merged": (list(own), other),
        "own k=1, k=8 merged": ([f"k1-{number}" for number in range(BATCH)], other),
        "base, another merged": ([None] * BATCH, other),
        "all merged": ([other] * BATCH, other),
        "own k=1": ([f"k1-{number}" for number in range(BATCH)], None),
    }
    steps: dict[str, list[float]] = {case: [] for case in cases}
    with progress_bar(console) as progress:
        task = progress.add_task("costs", total=rounds)
        for number in range(rounds):
            for case, (adapters, merged) in cases.items():
                if merged is None:
                    engine.adapters.unmerge()
                else:
                    engine.adapters.merge(merged)
                steps[case].append(decode_step_ms(engine, adapters))
            progress.update(task, completed=number + 1, refresh=True)
    engine.adapters.unmerge()
    nnz = engine.adapters.store.get(other).nnz
    entries = BATCH * nnz

    def beyond(case: str, less: str) -> float:
        differences = [a - b for a, b in zip(steps[case], steps[less], strict=True)]
        return statistics.median(differences)

    lane_ns = 1e6 * beyond("own", "base") / entries
    return {
        "step_ms": {case: statistics.median(times) for case, times in steps.items()},
        "lane_ns_per_entry": lane_ns,
        "correction_beside_own": beyond("own, another merged", "own") / beyond("own", "base"),
        "correction_beside_other_index": beyond("own k=1, k=8 merged", "own k=1")
        / beyond("own", "base"),
        "correction_on_base": beyond("base, another merged", "base") / beyond("own", "base"),
        "rounds": steps,
    }


def decode_step_ms(engine: Engine, adapters: Sequence[str | None], steps: int = 24) -> float:
    params = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True)
    prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "costs")
    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine.add_request(f"c{i}", prompt, params, adapter)
    while any(not o.num_output_tokens for o in engine.step()):
        pass
    times = []
    while engine.has_unfinished:
        times.append(timed_ms(engine.step))
    return statistics.median(times)


# --- modes -----------------------------------------------------------------------------------


def modes(engine: Engine, rounds: int, console: Console) -> dict[str, Any]:
    """Tokens per second of every mode on every load, round by round; ratios within a round."""
    rates: dict[str, dict[str, list[float]]] = {
        load: {mode: [] for mode in MODES} for load in LOADS
    }
    switches: dict[str, list[int]] = {load: [] for load in LOADS}
    with progress_bar(console) as progress:
        task = progress.add_task("modes", total=rounds * len(LOADS) * len(MODES))
        for number in range(rounds):
            for load in LOADS:
                adapters = load_of(load, number)
                order = list(MODES)
                random.Random(number).shuffle(order)
                for mode in order:
                    engine.adapters.unmerge()
                    engine.adapters.set_merge_mode(adapters_named(0) if mode == "named" else mode)
                    before = engine.metrics.num_merges + engine.metrics.num_unmerges
                    rates[load][mode].append(tokens_per_s(engine, adapters))
                    after = engine.metrics.num_merges + engine.metrics.num_unmerges
                    if mode == "auto":
                        switches[load].append(after - before)
                    progress.update(task, advance=1, refresh=True)
    engine.adapters.unmerge()
    report: dict[str, Any] = {}
    for load in LOADS:
        by_mode = rates[load]

        def of_auto(other: str, by_mode: dict[str, list[float]] = by_mode) -> float:
            pairs = zip(by_mode["auto"], by_mode[other], strict=True)
            return statistics.median(ours / theirs for ours, theirs in pairs)

        report[load] = {
            "tokens_per_s": {mode: statistics.median(found) for mode, found in by_mode.items()},
            "auto_to_never": of_auto("never"),
            "auto_to_named": of_auto("named"),
            "auto_to_better_fixed": min(of_auto("never"), of_auto("named")),
            "auto_switches": switches[load],
            "rounds": by_mode,
        }
    return report


def adapters_named(number: int) -> str:
    return f"k{MODE_K}-{number}"


def load_of(load: str, seed: int) -> list[str]:
    """The adapter of every request in the order they come."""
    draw = random.Random(f"{load} {seed}")
    chosen = []
    for i in range(NUM_REQUESTS):
        favourite = 0 if load != "shifting" else i * SHIFTS // NUM_REQUESTS
        if load == "identical" or (load != "uniform" and draw.random() < POPULAR):
            chosen.append(favourite)
        else:
            chosen.append(draw.randrange(MODE_ADAPTERS))
    return [adapters_named(number) for number in chosen]


def tokens_per_s(engine: Engine, adapters: Sequence[str]) -> float:
    """All requests, a fixed number of them outstanding at any time."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "modes")
    sent = ended = num_tokens = 0
    started = time.perf_counter()
    while ended < len(adapters):
        while sent < len(adapters) and sent - ended < OUTSTANDING:
            engine.add_request(f"m{sent}", prompts[sent], params, adapters[sent])
            sent += 1
        for output in engine.step():
            assert output.error is None, output.error
            num_tokens += len(output.token_ids)
            ended += output.finished
    return num_tokens / (time.perf_counter() - started)


# --- output ----------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    ours, theirs = result["swap"]["ours_ms"], result["swap"]["peft_lora_r8_ms"]
    for name, ms in ours.items():
        times = result["swap"]["times_faster"][name]
        console.print(f"swap {name}: {ms:.2f} ms; PEFT LoRA r=8 {theirs:.0f} ms: {times:.0f} times")
    console.print("rotations bit-exact:", result["rotations"]["bit_exact"])
    console.print({k: v for k, v in result["costs"].items() if k != "rounds"})
    table = Table("load", *MODES, "auto/never", "auto/named", "switches", title="tokens per second")
    for load, row in result["modes"].items():
        rates = [f"{row['tokens_per_s'][mode]:.0f}" for mode in MODES]
        ratios = [f"{row['auto_to_never']:.3f}", f"{row['auto_to_named']:.3f}"]
        table.add_row(load, *rates, *ratios, str(row["auto_switches"]))
    console.print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    swap = result["swap"]
    names = ["ours, k=1", f"ours, k={MODE_K}", "PEFT LoRA r=8"]
    values = [*swap["ours_ms"].values(), swap["peft_lora_r8_ms"]]
    left.barh(names, values, color=["C0", "C0", "C7"])
    left.set(xscale="log", xlabel="ms to put another adapter into the weights")
    left.bar_label(left.containers[0], fmt="%.2f", padding=3)
    width = 0.27
    for i, mode in enumerate(MODES):
        rates = [result["modes"][load]["tokens_per_s"][mode] for load in LOADS]
        places = [place + i * width for place in range(len(LOADS))]
        right.bar(places, rates, width, label=mode)
    right.set_xticks([place + width for place in range(len(LOADS))], LOADS)
    right.set(ylabel="output tokens/s")
    right.legend(title="merge mode", loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
