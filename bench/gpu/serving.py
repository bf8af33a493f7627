"""Costs of serving beside single steps: launches, warm-up, chunks beside decodes, a full card."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.model import (
    Filled,
    Shape,
    add_adapters,
    new_runner,
    random_base,
    sequences,
)
from bench.gpu.report import Report, time_ms
from bench.gpu.steps import decode_step
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.batcher import Chunk
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.request import SamplingParams

# Of a mixed step, at most; prompts each of an adapter of its own.
NUM_DECODES, NUM_PROMPTS = 64, 4
TEXT_STEPS = 8  # timed together


def count_launches(call: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Count what a call launches on the device, by kernel; on the CPU, its operators."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = [event.name for event in found.events() if event.device_type == kind]
    return Counter(name for name in names if not name.startswith(("Mem", "[")))


def note_launches(report: Report, name: str, call: Callable[[], Any], num_layers: int) -> None:
    """Note launches a layer, and the kernels that are launched most."""
    launches = count_launches(call, report.device)
    most = {kernel[:80]: number for kernel, number in launches.most_common(16)}
    report.facts.setdefault("launches", {})[name] = {
        "a layer": launches.total() / num_layers,
        "most": most,
    }


def mixed_step(
    engine: Engine,
    runner: ModelRunner,
    shape: Shape,
    k: int | None,
    num_decodes: int,
    num_prompts: int,
) -> Callable[[], Any]:
    """Make a call that runs decodes, and beside them chunks of prompts half of whose context is in
    the cache already."""
    half = shape.context // 2
    names = [None if k is None else f"k{k}-{i % 4}" for i in range(num_decodes + num_prompts)]
    running = sequences(engine, names, shape.context - 1, int(shape.model["vocab_size"]))
    decodes, prompts = tuple(running[:num_decodes]), running[num_decodes:]
    for s in decodes:
        s.output_token_ids = [1]
    schedule = Schedule(tuple(running), decodes, tuple(Chunk(s, half) for s in prompts))

    def step() -> None:
        for s in decodes:
            s.num_computed = shape.context - 1
        for s in prompts:
            s.num_computed = shape.context - 1 - half
        runner.run(schedule, None)

    return step


def measure_mixed(report: Report, engine: Engine, shape: Shape, runner: ModelRunner) -> None:
    """Time decodes, chunks of prompts, and both in one step, of the base and of four adapters."""
    if not report.may_start("mixed", 40):
        return
    prompts = min(NUM_PROMPTS, max(shape.batches) // 2)
    decodes = min(NUM_DECODES, max(shape.batches) - prompts)
    for name, k in (("base", None), ("k1", 1)):
        ways = {
            "decodes": mixed_step(engine, runner, shape, k, decodes, 0),
            "chunks": mixed_step(engine, runner, shape, k, 0, prompts),
            "both": mixed_step(engine, runner, shape, k, decodes, prompts),
        }
        for step in ways.values():
            step()
            step()
        for way in ("decodes", "both"):
            note_launches(
                report, f"mixed/{name}/{way}", ways[way], shape.model["num_hidden_layers"]
            )
        for _ in range(shape.samples):
            samples = {way: time_ms(step, report.device) for way, step in ways.items()}
            samples["one after the other"] = samples["decodes"] + samples["chunks"]
            for way, ms in samples.items():
                report.samples_ms.setdefault(f"mixed/{name}/{way}", []).append(ms)


def stand_in(launch: Callable[[], None]) -> Callable[[], None]:
    """Capture nothing: a graph on a device without any."""
    launch()
    return launch


def measure_warm_up(report: Report, engine: Engine, shape: Shape) -> None:
    """Time the capture of every bucket's graph, and note the memory that they take."""
    if not report.may_start("warm-up", 60):
        return
    on_gpu = report.device.type == "cuda"
    capture = None if on_gpu else stand_in
    runner = new_runner(engine, max(shape.batches), shape.context, capture=capture)
    assert runner.graphs is not None
    begun = time.perf_counter()
    runner.warm_up_prompts()
    prompts_s = time.perf_counter() - begun
    free = torch.cuda.mem_get_info()[0] if on_gpu else 0
    started = time.perf_counter()
    bank = engine.adapters.bank
    with torch.inference_mode():
        number = runner.graphs.capture_all(
            lambda bucket: bank.plan([None] * bucket, None, runs=False)
        )
    report.facts["warm-up"] = {
        "graphs": number,
        "seconds": time.perf_counter() - started,
        "seconds of prompts' kernels": prompts_s,
        "bytes": free - torch.cuda.mem_get_info()[0] if on_gpu else None,
    }
    captured = len(runner.graphs)
    decode_step(engine, runner, [None] * max(shape.batches), shape)()
    report.checks["the warm-up has captured what a step needs"] = (
        len(runner.graphs) == captured and not runner.graphs.num_failed_captures
    )


class Letters:
    """A tokenizer of a model that has no words."""

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        """Return a letter for each token."""
        return "".join(chr(97 + number % 26) for number in ids)


def measure_filled(report: Report, shape: Shape) -> None:
    """Serve more requests than the cache has room for, on an engine with all the memory it may
    take: all of them end, and nothing stays behind."""
    filled = shape.filled
    if not report.may_start("filled card", 120):
        return
    base = replace(random_base(shape, report.device, torch.bfloat16), tokenizer=Letters())
    config = EngineConfig(
        max_num_seqs=filled.max_num_seqs,
        max_num_batched_tokens=filled.step_tokens,
        kv_cache_memory=filled.cache_memory,
        prefix_cache_memory=0,
    )
    engine = Engine(base, config)
    try:
        add_adapters(engine, shape.ks[:1], 4)
        report.facts["filled card"] = serve_filled(report, engine, filled, f"k{shape.ks[0]}")
        measure_text(report, engine, shape)
    finally:
        engine.adapters.tiers.close()


def serve_filled(report: Report, engine: Engine, filled: Filled, k: str) -> dict[str, Any]:
    """Serve the requests, of four adapters and the base, and return what was found."""
    draw, on_gpu = random.Random(0), report.device.type == "cuda"
    vocab = int(engine.base.model.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=filled.answer_tokens, ignore_eos=True)
    num_wanted = 0
    for number in range(filled.requests):
        prompt = draw.choices(range(vocab), k=draw.randint(*filled.prompt_tokens))
        num_wanted += len(prompt) + filled.answer_tokens
        adapter = None if number % 5 == 4 else f"{k}-{number % 5}"
        engine.add_request(str(number), prompt, params, adapter)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    tokens: Counter[str] = Counter()
    errors, most_used, gaps = [], 0, []
    started = last = time.perf_counter()
    while engine.has_unfinished and report.may_start("the rest of the filled card", 5):
        for output in engine.step():
            tokens[output.request_id] += len(output.token_ids)
            errors += [output.error] if output.error is not None else []
        most_used = max(most_used, engine._tables.blocks.num_used)
        now = time.perf_counter()
        gaps.append((now - last) * 1000)
        last = now
    report.samples_ms["steps of the filled card"] = gaps
    wanted = {str(number): filled.answer_tokens for number in range(filled.requests)}
    report.checks["all requests of the filled card end"] = tokens == wanted and not errors
    report.checks["nothing of them stays in the cache"] = engine._tables.blocks.num_used == 0
    seconds = time.perf_counter() - started
    return {
        "cache": engine.kv_budget.describe(engine.max_model_len),
        "tokens wanted, of those that fit": num_wanted / engine.kv_budget.num_tokens,
        "most blocks used, of all": most_used / engine.kv_budget.num_blocks,
        "preemptions": engine.metrics.num_preemptions,
        "seconds": seconds,
        "answered tokens a second": tokens.total() / seconds,
        "errors": [str(error) for error in errors[:5]],
        "peak bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "card bytes": torch.cuda.mem_get_info()[1] if on_gpu else None,
    }


def measure_text(report: Report, engine: Engine, shape: Shape) -> None:
    """Time steps whose text is made while the device computes the next one, and in between."""
    if not report.may_start("text", 20):
        return
    # Longer than they are needed, and no more than there are blocks for.
    length = min(engine.max_model_len, 4 * shape.samples * (TEXT_STEPS + 1))
    number = min(NUM_DECODES, engine.config.max_num_seqs, engine.kv_budget.num_tokens // length)
    params = SamplingParams(temperature=0, max_tokens=length - 1, ignore_eos=True)
    names = [f"text{i}" for i in range(number)]
    for name in names:
        engine.add_request(name, [1], params)
    while engine.num_waiting:
        engine.step()
    for _ in range(shape.samples):
        for way, defers in (("meanwhile", True), ("in between", False)):
            engine._outputs._defers = defers
            engine.step()
            started = time.perf_counter()
            for _ in range(TEXT_STEPS):
                engine.step()
            ms = (time.perf_counter() - started) * 1000 / TEXT_STEPS
            report.samples_ms.setdefault(f"text/{way}", []).append(ms)
    for name in names:
        engine.abort(name)
    engine.step()
