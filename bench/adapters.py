"""What it costs to have many adapters: start, throughput, memory, the first token of a cold one.

Makes --counts adapters (k=1, all projections, random values) in a folder and measures

    start        a server process, from its call to the first answer, with each number of adapters
    throughput   requests at Poisson arrivals, faster than they can be served, adapters drawn by
                 Zipf-1.5 from all that are registered, which are read from disk when they are first
                 asked for; beside them one adapter for all, and 16 on the device, each request its
                 own. Every round runs all cases; a round's ratio is to its own cases
    memory       of the process, per adapter on the device
    cold         time to first token of one request whose adapter is on the device, in host memory
                 or on disk (once in the page cache, once not), on an idle engine and beside 15
                 requests that run; through the worker thread that serves HTTP, without HTTP

Writes adapters.json and adapters.png to --out; the last line of stdout is the JSON. Not measured: a
GPU, HTTP, other sizes of k.

    python bench/adapters.py [MODEL] [--counts 1,10,1000,10000] [--folder DIR] [--rounds 5]
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE, adapter_files
from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.report import environment, plain, progress_bar
from neuroada_serve.benchmark.workload import arrivals, assign, random_prompts
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource, resolve_model
from neuroada_serve.plots import GREY, RED, legend_beside, new_panels, png
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.worker import Worker

POPULARITY = "zipf:1.5"
BATCH = 16
PROMPT_LEN, OUTPUT_LEN = 32, 32
OVERLOAD = 1.5  # arrivals per request that can be served
DEVICE_BYTES = 4 << 30
COLD_PLACES = ("device", "host", "disk, cached", "disk")
BESIDE = "distinct"  # the case that the others are compared with


@dataclass(frozen=True)
class Load:
    """Requests with their adapters and the seconds at which they come."""

    adapters: Sequence[str]
    prompts: Sequence[Sequence[int]]
    due_s: Sequence[float]


@dataclass(frozen=True)
class Served:
    """What came of a load."""

    tokens_per_s: float
    ttft_ms: list[float]
    num_read: int  # adapters that came from disk
    num_distinct: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--counts", default="1,10,1000,10000")
    parser.add_argument("--folder", type=Path, help="keep the adapters there; default: nowhere")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--probes", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    console = Console(stderr=True)
    counts = sorted(int(count) for count in args.counts.split(","))
    source = resolve_model(args.model)

    with tempfile.TemporaryDirectory(prefix="neuroada-bench-") as scratch:
        root = args.folder or Path(scratch)
        make_adapters(source, root, max(counts), console)
        folders = {count: subset(root, count) for count in counts}
        result: dict[str, Any] = {
            "schema": "neuroada-bench/1",
            "benchmark": "adapters",
            **environment(),
            "settings": {
                "model": args.model,
                "counts": counts,
                "popularity": POPULARITY,
                "batch": BATCH,
                "prompt_len": PROMPT_LEN,
                "output_len": OUTPUT_LEN,
                "requests": args.requests,
                "rounds": args.rounds,
            },
            "start": [start(args.model, folders[count], count) for count in counts],
            "throughput": throughput(source, folders, args.rounds, args.requests, console),
            "memory": memory(source, folders[max(counts)], max(counts), console),
            "cold": cold(source, folders[max(counts)], args.probes, console),
        }
    show(result, console)
    args.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps(plain(result), allow_nan=False)
    (args.out / "adapters.json").write_text(document + "\n")
    plot(result, args.out / "adapters.png")
    print(document)


# --- adapters on disk ------------------------------------------------------------------------


def make_adapters(source: ModelSource, root: Path, count: int, console: Console) -> None:
    """Adapters 0..count - 1 in root/all, those that are not there yet."""
    missing = [n for n in range(count) if not (root / "all" / name_of(n) / CONFIG_FILE).exists()]
    if not missing:
        return
    base = load_base(source)
    indices = magnitude_indices(base, [1])[1]
    with progress_bar(console) as progress:
        task = progress.add_task("making adapters", total=len(missing))
        for done, number in enumerate(missing):
            folder = root / "all" / name_of(number)
            folder.mkdir(parents=True, exist_ok=True)
            weights, config = adapter_files(random_adapter(base.spec, indices, number))
            (folder / WEIGHTS_FILE).write_bytes(weights)  # in haste: save_adapter waits for disk
            (folder / CONFIG_FILE).write_bytes(config)
            progress.update(task, completed=done + 1, refresh=done % 100 == 0)


def subset(root: Path, count: int) -> Path:
    """A folder of the first `count` adapters: links to the same files."""
    folder = root / str(count)
    for number in range(count):
        own = folder / name_of(number)
        own.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (own / file).exists():
                os.link(root / "all" / name_of(number) / file, own / file)
    return folder


def name_of(number: int) -> str:
    return f"a{number:05}"


def new_engine(source: ModelSource, folder: Path, **config: Any) -> Engine:
    settings = {"adapter_memory": DEVICE_BYTES, "prefix_cache_memory": 0} | config
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=BATCH, **settings))
    failed = engine.adapters.open_directory(folder).failed
    assert not failed, failed
    return engine


# --- start -----------------------------------------------------------------------------------


def start(model: str, folder: Path, count: int) -> dict[str, float]:
    """Seconds until a server listens, and until it has given a token of its last adapter."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "neuroada_serve", "serve", model, "--port", "0"]
    command += ["--adapter-dir", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving .* on (http://\S+)/v1", line):
                break
        else:
            raise SystemExit("the server did not start: " + "".join(said[-5:]))
        listening_s = time.perf_counter() - started
        body = {"model": name_of(count - 1), "prompt": "Hello", "max_tokens": 1}
        request = urllib.request.Request(
            f"{found[1]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.status == 200
        answered_s = time.perf_counter() - started
        process.terminate()
    return {"adapters": count, "listening_s": listening_s, "first_token_s": answered_s}


# --- throughput ------------------------------------------------------------------------------


def throughput(
    source: ModelSource, folders: dict[int, Path], rounds: int, num_requests: int, console: Console
) -> dict[str, Any]:
    """Every case in every round."""
    engines = {count: new_engine(source, folder) for count, folder in folders.items()}
    largest = engines[max(engines)]
    vocab = range(int(largest.base.model.config.get_text_config().vocab_size))
    own = [name_of(number) for number in range(BATCH)]
    for name in own:
        largest.adapters.bring_in(name)
    cases: dict[str, tuple[Engine, int | None]] = {BESIDE: (largest, None)}
    cases |= {str(count): (engine, count) for count, engine in engines.items()}

    def load(case: str, number: int, rate: float) -> Load:
        _, count = cases[case]
        seed = f"{number}"
        if count is None:
            chosen: list[int | None] = assign("distinct", num_requests, BATCH, seed)
        else:
            chosen = assign(POPULARITY, num_requests, count, seed)
        return Load(
            [name_of(n or 0) for n in chosen],
            random_prompts(num_requests, PROMPT_LEN, vocab, seed),
            arrivals(num_requests, rate, 1.0, seed),
        )

    for case, (engine, _) in cases.items():  # kernels compiled, memory touched
        serve(engine, load(case, -1, float("inf")))
    capacity = serve(largest, load(BESIDE, -2, float("inf"))).tokens_per_s / OUTPUT_LEN
    rate = OVERLOAD * capacity
    served: dict[str, list[Served]] = {case: [] for case in cases}
    with progress_bar(console) as progress:
        task = progress.add_task("throughput", total=rounds * len(cases))
        for number in range(rounds):
            order = list(cases)
            random.Random(number).shuffle(order)
            for case in order:
                served[case].append(serve(cases[case][0], load(case, number, rate)))
                progress.update(task, advance=1, refresh=True)
    beside = [one.tokens_per_s for one in served[BESIDE]]
    return {
        "requests_per_s": rate,
        "cases": [
            {
                "case": case,
                "tokens_per_s": statistics.median(one.tokens_per_s for one in ran),
                "ratio_to_distinct": statistics.median(
                    one.tokens_per_s / other for one, other in zip(ran, beside, strict=True)
                ),
                "ratio_to_one": statistics.median(
                    one.tokens_per_s / other.tokens_per_s
                    for one, other in zip(ran, served[str(min(engines))], strict=True)
                ),
                "ttft_ms_p50": statistics.median(t for one in ran for t in one.ttft_ms),
                "adapters_read": [one.num_read for one in ran],
                "distinct_adapters": [one.num_distinct for one in ran],
                "rounds_tokens_per_s": [one.tokens_per_s for one in ran],
            }
            for case, ran in served.items()
        ],
    }


def serve(engine: Engine, load: Load) -> Served:
    """Hand requests in when they are due; tokens per second until the last has ended."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    read_before = engine.adapters.tiers.metrics.num_disk_reads
    started, sent = time.perf_counter(), 0
    sent_at: dict[str, float] = {}
    ttft_ms: list[float] = []
    num_tokens = 0
    while sent < len(load.due_s) or engine.has_unfinished:
        now = time.perf_counter() - started
        while sent < len(load.due_s) and load.due_s[sent] <= now:
            engine.adapters.prefetch(load.adapters[sent])
            engine.add_request(f"r{sent}", load.prompts[sent], params, load.adapters[sent])
            sent_at[f"r{sent}"] = time.perf_counter()
            sent += 1
        for output in engine.step():
            assert output.error is None, output.error
            num_tokens += len(output.token_ids)
            if output.request_id in sent_at and output.num_output_tokens == 1:
                ttft_ms.append(1000 * (time.perf_counter() - sent_at.pop(output.request_id)))
    return Served(
        num_tokens / (time.perf_counter() - started),
        ttft_ms,
        engine.adapters.tiers.metrics.num_disk_reads - read_before,
        len(set(load.adapters)),
    )


# --- memory ----------------------------------------------------------------------------------


def memory(source: ModelSource, folder: Path, count: int, console: Console) -> dict[str, Any]:
    """Resident memory of this process as adapters are registered, and then brought in."""
    engine = Engine(
        load_base(source),
        EngineConfig(adapter_memory=DEVICE_BYTES, adapter_host_memory=0, prefix_cache_memory=0),
    )
    before = resident_bytes()
    engine.adapters.open_directory(folder)
    registered = resident_bytes()
    first = min(count // 10, 100)
    at_first = registered
    nnz = 0
    with progress_bar(console) as progress:
        task = progress.add_task("bringing adapters in", total=count)
        for number in range(count):
            if number == first:
                at_first = resident_bytes()
            engine.adapters.bring_in(name_of(number))
            progress.update(task, completed=number + 1, refresh=number % 100 == 0)
    end = resident_bytes()
    assert engine.adapters.bank.num_resident == count
    nnz = engine.adapters.store.get(name_of(0)).nnz
    each = (end - at_first) / max(1, count - first)
    header = (registered - before) / count
    return {
        "adapters": count,
        "nnz": nnz,
        "values_bytes": 2 * nnz,
        "process_bytes_per_registered_adapter": header,
        "process_bytes_per_resident_adapter": each + header,
        "overhead_bytes_per_resident_adapter": each + header - 2 * nnz,
        "device_used_bytes": engine.adapters.bank.used_bytes,
    }


def resident_bytes() -> int:
    """Of this process, without what it has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- cold ------------------------------------------------------------------------------------


def cold(source: ModelSource, folder: Path, probes: int, console: Console) -> dict[str, Any]:
    """Time to first token by where the adapter is, alternating."""
    engine = new_engine(source, folder, adapter_host_memory=1 << 30)
    names = [info.name for info in engine.adapters.describe()]
    random.Random(0).shuffle(names)
    engine.adapters.bring_in(names.pop())  # its index, once for all
    vocab = range(int(engine.base.model.config.get_text_config().vocab_size))
    prompts = random_prompts(len(COLD_PLACES) * probes * 2 + BATCH, PROMPT_LEN, vocab, "cold")
    return asyncio.run(probe_all(engine, folder, names, prompts, probes, console))


async def probe_all(
    engine: Engine,
    folder: Path,
    names: list[str],
    prompts: list[list[int]],
    probes: int,
    console: Console,
) -> dict[str, Any]:
    long = SamplingParams(temperature=0, max_tokens=1 << 20, ignore_eos=True)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    results: dict[str, Any] = {}
    async with Worker(engine) as worker:
        for load, running in (("idle", 0), ("beside 15 requests", BATCH - 1)):
            streams = [
                await worker.submit(f"long-{load}-{i}", [prompts.pop()], long, None)
                for i in range(running)
            ]
            readers = [asyncio.create_task(drain(stream)) for stream in streams]
            await asyncio.sleep(1.0 if running else 0)
            ttft: dict[str, list[float]] = {place: [] for place in COLD_PLACES}
            with progress_bar(console) as progress:
                task = progress.add_task(f"cold, {load}", total=probes)
                for number in range(probes):
                    for place in COLD_PLACES:
                        name = names.pop()
                        prepare(engine, folder, name, place)
                        started = time.perf_counter()
                        stream = await worker.submit(
                            f"{load}-{place}-{number}", [prompts.pop()], one, name
                        )
                        async for _, output in stream:
                            assert output.error is None, output.error
                        ttft[place].append(1000 * (time.perf_counter() - started))
                        await asyncio.sleep(random.uniform(0, 0.03))
                    progress.update(task, completed=number + 1, refresh=True)
            before = engine.metrics.num_steps, time.perf_counter()
            step_ms = None
            if running:
                await asyncio.sleep(1.0)
                steps = engine.metrics.num_steps - before[0]
                step_ms = 1000 * (time.perf_counter() - before[1]) / steps
            for stream in streams:
                stream.close()
            for reader in readers:
                reader.cancel()
            while engine.has_unfinished:
                await asyncio.sleep(0.05)
            device = statistics.median(ttft["device"])
            results[load] = {
                "decode_step_ms": step_ms,
                "ttft_ms": {place: statistics.median(times) for place, times in ttft.items()},
                "ttft_ms_p99": {place: percentile(times, 99) for place, times in ttft.items()},
                "added_ms": {
                    place: statistics.median(times) - device for place, times in ttft.items()
                },
                "all_ttft_ms": ttft,
            }
    # The step of a single request, which an idle engine would make of it.
    results["idle"]["decode_step_ms"] = single_step_ms(engine, prompts.pop())
    return results


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


def prepare(engine: Engine, folder: Path, name: str, place: str) -> None:
    """Have an adapter, which has not been used yet, at a place."""
    version = engine.adapters.store.get(name)
    if place in ("device", "host"):
        engine.adapters.tiers.host.read(version)
    if place == "device":
        engine.adapters.prefetch(name)
        while not engine.adapters.tiers.is_ready(version):
            time.sleep(0.001)
    path = folder / name / WEIGHTS_FILE
    if place == "disk, cached":
        path.read_bytes()
    if place == "disk":
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert engine.adapters.tiers.tier_of(version) == place.partition(",")[0]


def single_step_ms(engine: Engine, prompt: list[int]) -> float:
    engine.add_request("single", prompt, SamplingParams(max_tokens=32, ignore_eos=True), None)
    engine.step()
    times = []
    while engine.has_unfinished:
        started = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


# --- output ----------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("adapters", "listening s", "first token s", title="start")
    for row in result["start"]:
        table.add_row(
            f"{row['adapters']}", f"{row['listening_s']:.1f}", f"{row['first_token_s']:.1f}"
        )
    console.print(table)
    table = Table("adapters", "tokens/s", "of distinct", "of one", "read", title="throughput")
    for row in result["throughput"]["cases"]:
        table.add_row(
            row["case"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio_to_distinct']:.3f}",
            f"{row['ratio_to_one']:.3f}",
            f"{row['adapters_read']}",
        )
    console.print(table)
    console.print("memory", result["memory"])
    for load, row in result["cold"].items():
        said = {place: f"{ms:.2f}" for place, ms in row["added_ms"].items()}
        console.print(f"cold, {load}: added ms {said}; a step {row['decode_step_ms']:.1f} ms")


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, middle, right) = new_panels(1, 3, 17, 3.6)
    cases = {row["case"]: row for row in result["throughput"]["cases"]}
    counts = [str(count) for count in result["settings"]["counts"]]
    spread = [cases[count]["rounds_tokens_per_s"] for count in counts]
    left.boxplot(
        spread,
        tick_labels=[f"{int(count):,}" for count in counts],
        medianprops={"color": RED},
    )
    beside = cases[BESIDE]["tokens_per_s"]
    left.axhline(beside, linestyle="--", color=GREY, label="16 on the device,\nall distinct")
    left.set(xlabel="adapters registered", ylabel="output tokens/s", ylim=(0, None))
    legend_beside(left)
    started = result["start"]
    middle.plot(counts, [row["first_token_s"] for row in started], "o-", label="first token")
    middle.plot(counts, [row["listening_s"] for row in started], "o-", label="listening")
    middle.set(xlabel="adapters registered", ylabel="seconds from the call", ylim=(0, None))
    legend_beside(middle)
    loads = list(result["cold"])
    width = 0.8 / len(COLD_PLACES)
    for i, place in enumerate(COLD_PLACES):
        values = [result["cold"][load]["ttft_ms"][place] for load in loads]
        right.bar([j + i * width for j in range(len(loads))], values, width, label=place)
    right.set(ylabel="time to first token, ms")
    right.set_xticks([j + 1.5 * width for j in range(len(loads))], loads)
    legend_beside(right, "adapter is on")
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
