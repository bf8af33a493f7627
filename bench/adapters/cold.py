"""Cold adapters: time to first token by where the adapter is."""

import asyncio
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.adapters.files import BATCH, PROMPT_LEN, new_engine
from neuroada_serve.adapters.format import WEIGHTS_FILE
from neuroada_serve.benchmark.measure import percentile
from neuroada_serve.benchmark.report import progress_bar
from neuroada_serve.benchmark.workload import random_prompts
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.worker import Worker

COLD_PLACES = ("device", "host", "disk, cached", "disk")


def cold(source: ModelSource, folder: Path, probes: int, console: Console) -> dict[str, Any]:
    """Time first tokens by where the adapter is, alternating."""
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
    """Probe an idle engine, then one that runs 15 requests."""
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
    """Read a stream to its end."""
    async for _ in stream:
        pass


def prepare(engine: Engine, folder: Path, name: str, place: str) -> None:
    """Bring an adapter that has not been used yet to a place."""
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
    """Median decode step of one request alone."""
    engine.add_request("single", prompt, SamplingParams(max_tokens=32, ignore_eos=True), None)
    engine.step()
    times = []
    while engine.has_unfinished:
        started = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
