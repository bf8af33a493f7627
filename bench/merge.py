"""Merging: how fast one adapter takes another's place, whether the weights survive, when it pays.

    swap       one merged adapter taking the place of another (k=1 and k=8, all projections), beside
               PEFT's merge_adapter + unmerge_adapter of a LoRA r=8 of the same modules, which is
               what a swap takes there; round by round in one process
    rotations  --rotations swaps over 64 adapters of two sizes, then unmerged: is the digest of all
               weights what it was
    costs      a decode step of 16 requests that differ, with nothing merged, with an adapter merged
               that none of them uses, and on the base with it merged: the constants of
               engine/merge_policy.py; an engine for each, in turn
    modes      never, one adapter kept merged, and auto, on loads of five adapters of one k: all
               requests for one (identical), nearly all (skewed), as often each (uniform), and
               nearly all for one that changes (shifting); 20 requests outstanding at all times.
               Three engines take a step each in turn, and each has the time of its own steps, so
               that all see the same machine

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
from neuroada_serve.plots import BLUE, GREY, legend_beside, new_panels, png
from neuroada_serve.request import SamplingParams

BATCH = 16
NUM_ROTATING = 64
PROMPT_LEN, OUTPUT_LEN = 16, 48
NUM_REQUESTS = 144
OUTSTANDING = BATCH + 4
LARGE_K = 8
MODE_KS = (8, 20)
MODE_ADAPTERS = 5
MODES = ("never", "named", "auto")
LOADS = ("identical", "skewed", "uniform", "shifting")
POPULAR = 0.9  # share of the popular adapter in skewed and shifting
SHIFTS = 3


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
    indices = magnitude_indices(base, [1, LARGE_K])
    engine = Engine(base, EngineConfig(max_num_seqs=BATCH, prefix_cache_memory=0))
    for k, count in ((1, NUM_ROTATING), (LARGE_K, BATCH + 1)):
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
        "costs": {f"k={k}": costs(source, k, args.rounds, console) for k in MODE_KS},
        "modes": {f"k={k}": modes(source, k, args.rounds, console) for k in MODE_KS},
    }
    engine.adapters.merging.unmerge()
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
    ours: dict[str, list[float]] = {"k1": [], f"k{LARGE_K}": []}
    theirs: list[float] = []
    with progress_bar(console) as progress:
        task = progress.add_task("swap", total=rounds)
        for number in range(rounds + 1):
            for name, times in ours.items():
                engine.adapters.merging.merge(f"{name}-0")
                swaps = [partial(engine.adapters.merging.merge, f"{name}-{i}") for i in range(1, 9)]
                eight = [timed_ms(action) for action in swaps]
                times.append(statistics.median(eight))
            engine.adapters.merging.unmerge()
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
            k = LARGE_K if number % 97 == 0 else 1
            engine.adapters.merging.merge(
                f"k{k}-{number % (BATCH if k == LARGE_K else NUM_ROTATING)}"
            )
            if number % 500 == 0:
                progress.update(task, completed=number, refresh=True)
    duration_s = time.perf_counter() - started
    while_merged = engine.base_digest()
    engine.adapters.merging.unmerge()
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


def costs(source: ModelSource, k: int, rounds: int, console: Console) -> dict[str, Any]:
    """Median decode steps of an engine for each case, a step of each in turn, and what they say of
    one entry."""
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
        base = load_base(source)
        indices = magnitude_indices(base, [1, k])
        engine = engines[case] = Engine(
            base, EngineConfig(max_num_seqs=BATCH, prefix_cache_memory=0)
        )
        for name in {*adapters, merged} - {None}:
            assert name is not None
            kind, _, number = name.partition("-")
            adapter = random_adapter(base.spec, indices[int(kind[1:])], int(number))
            engine.adapters.add_resident(name, adapter)
        if merged is not None:
            engine.adapters.merging.merge(merged)
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
        """ns for one entry of an adapter of this k, of one token."""
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
    """Requests that have all had their first token."""
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "costs")
    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine.add_request(f"c{i}", prompt, params, adapter)
    started: set[str] = set()
    while len(started) < len(adapters):
        started |= {output.request_id for output in engine.step()}


# --- modes -----------------------------------------------------------------------------------


def modes(source: ModelSource, k: int, rounds: int, console: Console) -> dict[str, Any]:
    """Tokens per second of every mode on every load; ratios within a round."""
    engines: dict[str, Engine] = {}
    for mode in MODES:
        base = load_base(source)
        indices = magnitude_indices(base, [k])[k]
        engines[mode] = Engine(base, EngineConfig(max_num_seqs=BATCH, prefix_cache_memory=0))
        for number in range(MODE_ADAPTERS):
            adapter = random_adapter(base.spec, indices, number)
            engines[mode].adapters.add_resident(f"a{number}", adapter)
    rates: dict[str, dict[str, list[float]]]
    rates = {load: {mode: [] for mode in MODES} for load in LOADS}
    switches: dict[str, list[int]] = {load: [] for load in LOADS}
    with progress_bar(console) as progress:
        task = progress.add_task(f"modes, k={k}", total=rounds * len(LOADS))
        for number in range(rounds):
            for load in LOADS:
                for mode, engine in engines.items():
                    engine.adapters.merging.unmerge()
                    engine.adapters.set_merge_mode("a0" if mode == "named" else mode)
                metrics = engines["auto"].metrics
                before = metrics.num_merges + metrics.num_unmerges
                for mode, rate in side_by_side(engines, load_of(load, number)).items():
                    rates[load][mode].append(rate)
                switches[load].append(metrics.num_merges + metrics.num_unmerges - before)
                progress.update(task, advance=1, refresh=True)

    def of_auto(by_mode: dict[str, list[float]], other: str) -> float:
        pairs = zip(by_mode["auto"], by_mode[other], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    return {
        load: {
            "tokens_per_s": {mode: statistics.median(found) for mode, found in by_mode.items()},
            "auto_to_never": of_auto(by_mode, "never"),
            "auto_to_named": of_auto(by_mode, "named"),
            "auto_to_better_fixed": min(of_auto(by_mode, "never"), of_auto(by_mode, "named")),
            "auto_switches": switches[load],
            "rounds": by_mode,
        }
        for load, by_mode in rates.items()
    }


class ClosedLoop:
    """An engine that answers a list of requests, a fixed number of them outstanding."""

    def __init__(self, engine: Engine, adapters: Sequence[str]) -> None:
        self.engine = engine
        self.num_tokens = self.seconds = 0.0
        self._adapters = adapters
        self._prompts = random_prompts(len(adapters), PROMPT_LEN, range(1000), "modes")
        self._sent = self._ended = 0

    @property
    def has_ended(self) -> bool:
        return self._ended == len(self._adapters)

    def step(self) -> None:
        params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
        started = time.perf_counter()
        while self._sent < len(self._adapters) and self._sent - self._ended < OUTSTANDING:
            name, prompt = self._adapters[self._sent], self._prompts[self._sent]
            self.engine.add_request(f"m{self._sent}", prompt, params, name)
            self._sent += 1
        outputs = self.engine.step()
        self.seconds += time.perf_counter() - started
        for output in outputs:
            assert output.error is None, output.error
            self.num_tokens += len(output.token_ids)
            self._ended += output.finished


def side_by_side(engines: dict[str, Engine], adapters: Sequence[str]) -> dict[str, float]:
    """Tokens per second of every engine, a step of each in turn."""
    loops = {mode: ClosedLoop(engine, adapters) for mode, engine in engines.items()}
    while not all(loop.has_ended for loop in loops.values()):
        for loop in loops.values():
            if not loop.has_ended:
                loop.step()
    return {mode: loop.num_tokens / loop.seconds for mode, loop in loops.items()}


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
    return [f"a{number}" for number in chosen]


# --- output ----------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    ours, theirs = result["swap"]["ours_ms"], result["swap"]["peft_lora_r8_ms"]
    for name, ms in ours.items():
        times = result["swap"]["times_faster"][name]
        console.print(f"swap {name}: {ms:.2f} ms; PEFT LoRA r=8 {theirs:.0f} ms: {times:.0f} times")
    console.print("rotations bit-exact:", result["rotations"]["bit_exact"])
    for k, found in result["costs"].items():
        console.print(k, {name: value for name, value in found.items() if name != "steps"})
    table = Table("load", *MODES, "auto/never", "auto/named", "switches", title="tokens per second")
    for k, loads in result["modes"].items():
        for load, row in loads.items():
            rates = [f"{row['tokens_per_s'][mode]:.0f}" for mode in MODES]
            ratios = [f"{row['auto_to_never']:.3f}", f"{row['auto_to_named']:.3f}"]
            table.add_row(f"{load}, {k}", *rates, *ratios, str(row["auto_switches"]))
    console.print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_panels(1, 1 + len(MODE_KS), 17, 3.8)
    left = axes[0]
    swap = result["swap"]
    names = ["ours, k=1", f"ours, k={LARGE_K}", "PEFT LoRA r=8"]
    values = [*swap["ours_ms"].values(), swap["peft_lora_r8_ms"]]
    left.barh(names, values, color=[BLUE, BLUE, GREY])
    left.set(xscale="log", xlabel="ms to put another adapter into the weights")
    left.set_xlim(right=8 * max(values))  # room for the label
    left.grid(visible=False, axis="y")
    left.bar_label(left.containers[0], fmt="%.2f", padding=3)
    width = 0.27
    for right, (k, loads) in zip(axes[1:], result["modes"].items(), strict=True):
        for i, mode in enumerate(MODES):
            rates = [loads[load]["tokens_per_s"][mode] for load in LOADS]
            places = [place + i * width for place in range(len(LOADS))]
            right.bar(places, rates, width, label=mode)
        right.set_xticks([place + width for place in range(len(LOADS))], LOADS)
        right.set(ylabel="output tokens/s", title=k)
    legend_beside(axes[-1], "merge mode")
    path.write_bytes(png(figure))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
