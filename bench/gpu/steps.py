"""Steps of the engine: decodes, prefills, swaps, many adapters, and LoRA beside them."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.model import NO_RUNS, Shape, add_on_device, new_runner, run_tokens, sequences
from bench.gpu.report import Report, time_ms
from neuroada_serve.engine.batcher import Chunk
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.engine.sampler import sample
from neuroada_serve.engine.scheduler import Schedule

RANK = 16  # of the LoRA beside


def floor_ms(
    engine: Engine, shape: Shape, bandwidth: float, batch: int, values: int, index: int
) -> float:
    """Milliseconds to move weights, caches, `values` values and `index` columns once."""
    model = engine.base.model
    size = engine.base.dtype.itemsize
    embedding = model.get_input_embeddings().weight.numel()
    weights = (sum(p.numel() for p in model.parameters()) - embedding) * size
    config = shape.model
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * size
    return float((weights + batch * shape.context * kv + values * size + index * 4) / bandwidth)


def decode_step(
    engine: Engine, runner: ModelRunner, names: Sequence[str | None], shape: Shape
) -> Callable[[], Any]:
    """Make a call that runs one decode step of these sequences, always at the same context."""
    context = shape.context
    running = tuple(sequences(engine, names, context - 1, int(shape.model["vocab_size"])))
    schedule = Schedule(running, running, ())
    for s in running:
        s.output_token_ids = [1 + s.slot % 50 if s.slot is not None else 0]

    def step() -> Any:
        for s in running:
            s.num_computed = context - 1
        return runner.run(schedule, engine.adapters.merging.version)

    return step


@torch.inference_mode()  # as the runner, whose tensors these are
def fill_cache(runner: ModelRunner, num_layers: int) -> None:
    """Fill the cache with random keys and values: zeros would be easier on the chip."""
    for layer in range(num_layers):
        for part in runner.cache.layer(layer):
            part.normal_()


def measure_decode(
    report: Report, engine: Engine, shape: Shape, bandwidth: float, runner: ModelRunner, batch: int
) -> None:
    """Time steps of one batch size: the base and every mix, in turn each round."""
    nnz = sum(d_out for d_out, _ in engine.base.spec.shapes.values())
    cases: dict[str, list[str | None]] = {f"{batch}/base": [None] * batch}
    sizes = {f"{batch}/base": (0, 0)}
    for k in shape.ks:
        for distinct in shape.distinct:
            if distinct <= batch:
                name = f"{batch}/k{k}/{distinct}"
                cases[name] = [f"k{k}-{i % distinct}" for i in range(batch)]
                sizes[name] = (distinct * nnz * k, nnz * k)
    steps: dict[str, Callable[[], Any]] = {}
    for name, names in cases.items():
        if report.may_start(f"decode/{name}", 15):
            steps[name] = decode_step(engine, runner, names, shape)
            steps[name]()  # records the graph
            if len(steps) == 1:
                fill_cache(runner, shape.model["num_hidden_layers"])
            steps[name]()
            report.floors_ms[f"floor/{name}"] = floor_ms(
                engine, shape, bandwidth, batch, *sizes[name]
            )
    for _ in range(shape.samples):
        for name, step in steps.items():
            ms = time_ms(step, report.device, shape.steps)
            report.samples_ms.setdefault(f"decode/{name}", []).append(ms)

    def whole() -> None:  # what the engine does per step, apart from its outputs
        logits = steps[f"{batch}/base"]()
        sample(logits.logits, logits.sequences)

    if f"{batch}/base" in steps:
        whole()
        wall = [time_ms(whole, report.device, shape.steps) for _ in range(shape.samples)]
        report.samples_ms[f"decode/{batch}/base, greedy tokens read back each step"] = wall


class Lora:
    """LoRA of rank 16 on every adapted layer, as servers batch it: gather A and B, two bmm."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.slots = torch.zeros(count, dtype=torch.int64, device=engine.base.device)
        self.num_tokens = count
        self._handles = []
        for name, (d_out, d_in) in engine.base.spec.shapes.items():
            a, b = (
                torch.randn(count, *part, device=engine.base.device, dtype=engine.base.dtype) * 0.01
                for part in ((RANK, d_in), (d_out, RANK))
            )
            layer = engine.base.model.get_submodule(name)
            self._handles.append(layer.register_forward_hook(self._hook(a, b)))

    def _hook(self, a: Tensor, b: Tensor) -> Any:
        def add(module: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
            slots = self.slots[: self.num_tokens]
            x = args[0].reshape(self.num_tokens, -1, 1)
            return y + torch.bmm(b[slots], torch.bmm(a[slots], x)).view(y.shape)

        return add

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def measure_lora(report: Report, engine: Engine, shape: Shape, runner: ModelRunner) -> None:
    """Time the base step with LoRA hooks, by batch and distinct adapters."""
    lora = Lora(engine, shape.batches[-1])
    try:
        for batch in shape.batches:
            if not report.may_start(f"lora/{batch}", 25):
                continue
            if runner.graphs is not None:
                runner.graphs.clear()
            lora.num_tokens = batch
            step = decode_step(engine, runner, [None] * batch, shape)
            step()
            for distinct in (d for d in shape.distinct if d <= batch):
                lora.slots.copy_(torch.arange(len(lora.slots), device=report.device) % distinct)
                step()
                report.samples_ms[f"lora/{batch}/{distinct}"] = [
                    time_ms(step, report.device, shape.steps) for _ in range(shape.samples)
                ]
    finally:
        lora.remove()
        if runner.graphs is not None:
            runner.graphs.clear()


def measure_prefill(report: Report, engine: Engine, shape: Shape) -> None:
    """Time all tokens in one step, of 1 and of 4 adapters; values gathered, or written into W."""
    runner = new_runner(engine, 4, shape.prefill_tokens, enforce_eager=True)
    for parts in (1, 4):
        length = shape.prefill_tokens // parts
        cases: dict[str, tuple[str | None, int]] = {f"base/{parts}": (None, NO_RUNS)}
        for k in shape.ks:
            cases[f"k{k}/{parts}/gather"] = (f"k{k}", NO_RUNS)
            cases[f"k{k}/{parts}/written"] = (f"k{k}", 2)
        calls = {}
        for name, (k_name, limit) in cases.items():
            if not report.may_start(f"prefill/{name}", 10):
                continue
            names = [None if k_name is None else f"{k_name}-{i}" for i in range(parts)]
            running = tuple(sequences(engine, names, length, int(shape.model["vocab_size"])))
            chunks = tuple(Chunk(s, length) for s in running)
            calls[name] = (running, Schedule(running, (), chunks), limit)

        def prefill(name: str, calls: dict[str, Any] = calls) -> None:
            running, schedule, limit = calls[name]
            for s in running:
                s.num_computed = 0
            with run_tokens(limit):
                runner.run(schedule, None)

        for name in calls:
            prefill(name)
        for _ in range(shape.samples):
            for name in calls:
                ms = time_ms(partial(prefill, name), report.device)
                report.samples_ms.setdefault(f"prefill/{name}", []).append(ms)
        for k in shape.ks:
            ways = [f"prefill/k{k}/{parts}/{way}" for way in ("gather", "written")]
            known = [way for way in ways if report.median(way) is not None]
            if known:
                best = min(known, key=lambda way: report.median(way) or 0.0)
                report.samples_ms[f"prefill/k{k}/{parts}/best"] = report.samples_ms[best]


def measure_residents(report: Report, engine: Engine, shape: Shape, runner: ModelRunner) -> None:
    """Time decode steps whose adapters all differ, drawn anew for every sample.

    They are drawn from few adapters on the device and from many, of which no cache holds any.
    """
    few, many = shape.residents
    for name in engine.adapters.store.names:  # of larger k: their room is wanted
        if not name.startswith("k1-"):
            engine.adapters.remove(name)
    present = sum(name.startswith("k1-") for name in engine.adapters.store.names)
    add_on_device(engine, 1, range(present, many))
    report.facts["adapters resident"] = engine.adapters.bank.num_resident
    report.facts["adapter bytes used"] = engine.adapters.bank.memory.used_bytes
    draw = random.Random(0)
    for _ in range(2 * shape.samples):
        for name, among in (("few", few), ("many", many)):
            chosen = draw.sample(range(among), shape.resident_batch)
            step = decode_step(engine, runner, [f"k1-{number}" for number in chosen], shape)
            step()
            ms = time_ms(step, report.device, shape.steps)
            report.samples_ms.setdefault(f"resident/{name}", []).append(ms)


def measure_swap(report: Report, engine: Engine, shape: Shape) -> None:
    """Time merging A, swapping to B and unmerging; check the weights afterwards."""
    weights = [p for p in engine.base.model.parameters() if p.ndim == 2]
    before = [int(p.view(torch.int16).long().sum()) for p in weights[:: max(1, len(weights) // 9)]]
    for k in shape.ks:
        for _ in range(shape.samples + 1):
            for name, call in (
                ("merge", partial(engine.adapters.merging.merge, f"k{k}-0")),
                ("swap", partial(engine.adapters.merging.merge, f"k{k}-1")),
                ("unmerge", engine.adapters.merging.unmerge),
            ):
                ms = time_ms(call, report.device)
                report.samples_ms.setdefault(f"{name}/k{k}", []).append(ms)
        for name in ("merge", "swap", "unmerge"):
            del report.samples_ms[f"{name}/k{k}"][0]  # warm-up
    after = [int(p.view(torch.int16).long().sum()) for p in weights[:: max(1, len(weights) // 9)]]
    report.checks["weights after all swaps"] = after == before
