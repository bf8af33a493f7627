"""What adapters cost on a GPU: Llama-3-8B's shape with random bf16 weights, in the real engine.

First the kernels are checked against the reference, replayed decode steps against eager ones and
unmerging against the bits it must restore. Then, each beside the floor (bytes that must move over
the measured copy bandwidth): decode steps by batch, distinct adapters and k; the same steps with a
batched LoRA r=16; prefill by gather and with the values written into the weights; the swap of a
merged adapter; batches drawn from 10,000 adapters on the device; and the kernels' tiles. Every part
stops at the time limit and says what it left out. Needs torch, transformers, triton and rich.
Prints tables; the last line is JSON.

    python -m bench.gpu [--minutes 8.5] [--out FILE] [--tiny --device cpu]

Not measured: HTTP, sampling other than greedy, other models.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from neuroada_serve import __version__
from neuroada_serve.adapters import bank as bank_module
from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
)
from neuroada_serve.adapters.residency import Reading, Resident, Writing
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.engine.sampler import sample
from neuroada_serve.engine.scheduler import Chunk, Schedule
from neuroada_serve.engine.sequence import Sequence as EngineSequence
from neuroada_serve.model.loader import BaseModel, adaptable_modules, matrix_shape
from neuroada_serve.ops.bypass import (
    BypassTable,
    TokenSlots,
    bypass_add_,
    bypass_add_reference,
)
from neuroada_serve.ops.triton_bypass import (
    BypassTile,
    add_entries_,
    bypass_add_triton_,
    bypass_tile,
    restore_entries_,
)
from neuroada_serve.request import SamplingParams
from neuroada_serve.tasks import Classify

ROOT = Path(__file__).resolve().parent.parent

GREEDY = SamplingParams(temperature=0, max_tokens=1 << 20, ignore_eos=True)
NO_RUNS = 1 << 30
RANK = 16  # of the LoRA beside


@dataclass(frozen=True)
class Shape:
    """What is measured. k's and batches ascend."""

    model: dict[str, Any]
    batches: tuple[int, ...] = (1, 16, 64, 256)
    distinct: tuple[int, ...] = (1, 16, 64, 256)
    ks: tuple[int, ...] = (1, 8, 20)
    context: int = 1024
    prefill_tokens: int = 4096
    residents: tuple[int, int] = (64, 10_000)  # adapters on the device, few and many
    resident_batch: int = 64
    samples: int = 5
    steps: int = 5  # per sample, launched without waiting in between
    copy_bytes: int = 4 << 30


LLAMA_8B = Shape(
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
)
TINY = Shape(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    },
    batches=(1, 4),
    distinct=(1, 4),
    ks=(1, 2),
    context=20,
    prefill_tokens=64,
    residents=(4, 40),
    resident_batch=4,
    samples=2,
    steps=1,
    copy_bytes=1 << 20,
)

# name -> (most allowed, numerator, denominator)
TARGETS: dict[str, tuple[float, str, str]] = {
    "base step at batch 1, of the floor": (1.4, "decode/1/base", "floor/1/base"),
    "64 distinct k=1, of the base step": (1.03, "decode/64/k1/64", "decode/64/base"),
    "256 distinct k=1, of the base step": (1.08, "decode/256/k1/256", "decode/256/base"),
    "64 distinct k=8, of the base step": (1.15, "decode/64/k8/64", "decode/64/base"),
    "prefill k=1, of the base": (1.05, "prefill/k1/1/best", "prefill/base/1"),
    "batch of 10,000 resident k=1, of one of 64": (1.05, "resident/many", "resident/few"),
    "swap of the merged adapter k=1, of 1 ms": (1.0, "swap/k1", "one millisecond"),
}


@dataclass
class Report:
    """Everything measured, raw; and the clock that ends it."""

    deadline: float
    device: torch.device
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    floors_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def may_start(self, name: str, seconds: float) -> bool:
        """Whether there is time for this; otherwise it is noted as left out."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.skipped.append(name)
        return False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that may fail without taking the others along."""
        started = time.monotonic()
        try:
            yield
        except Exception:
            self.errors[name] = traceback.format_exc(limit=-6)
            print(f"{name} failed\n{self.errors[name]}", file=sys.stderr)
        seconds = time.monotonic() - started
        self.facts.setdefault("seconds", {})[name] = round(seconds, 1)
        Console(stderr=True).print(f"{name}: {seconds:.0f} s")

    def median(self, name: str) -> float | None:
        if name in self.floors_ms:
            return self.floors_ms[name]
        values = self.samples_ms.get(name)
        return statistics.median(values) if values else None


# --- time ------------------------------------------------------------------------------------


def time_ms(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Milliseconds per call: CUDA events around `repeats` calls that follow without waiting."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) * 1000 / repeats
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per millisecond of a copy on the device, read and written counted."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [time_ms(lambda: target.copy_(source), device, 3) for _ in range(6)][1:]
    return 2 * num_bytes / statistics.median(times)


# --- the model and its adapters ----------------------------------------------------------------


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """A Llama of this shape with random weights, built on the device."""
    config = AutoConfig.for_model("llama", **shape.model)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    shapes = {name: matrix_shape(m) for name, m in adaptable_modules(model).items()}
    return BaseModel(
        model=model,
        tokenizer=None,
        spec=BaseSpec("random", "0" * 64, shapes),
        path=Path(),
        dtype=dtype,
        device=device,
        eos_token_ids=frozenset(),
        max_model_len=int(shape.model["max_position_embeddings"]),
        vocab_size=int(shape.model["vocab_size"]),
    )


def add_adapters(engine: Engine, ks: Sequence[int], count: int) -> None:
    """Serve adapters k{k}-0, k{k}-1, ... with random values. The first two of every k come from the
    host, as any adapter does, and can be merged; the others are made on the device."""
    layers = {name: engine.base.model.get_submodule(name) for name in engine.base.spec.shapes}
    widest = {name: magnitude_index(layer.weight, max(ks)).cpu() for name, layer in layers.items()}
    for k in ks:
        index = {name: table[:, :k].contiguous() for name, table in widest.items()}
        targets = tuple(sorted({name.rpartition(".")[2] for name in index}))
        config = AdapterConfig("random", "0" * 64, k, targets)
        for number in range(min(count, 2)):
            parts = {
                name: ModuleBypass(table, (torch.randn(table.shape) * 0.01).to(engine.base.dtype))
                for name, table in index.items()
            }
            adapter = Adapter(config, parts, f"random-k{k}-{number}")
            engine.adapters.add_resident(f"k{k}-{number}", adapter)
        add_on_device(engine, k, range(2, count))


def add_on_device(engine: Engine, k: int, numbers: Sequence[int]) -> None:
    """Adapters k{k}-{number} like k{k}-0, with values drawn on the device."""
    plane, bank = engine.adapters, engine.adapters.bank
    first = plane.store.get(f"k{k}-0")
    for number in numbers:
        name = f"k{k}-{number}"
        version = AdapterVersion(name, f"random-{name}", first.nnz, first.source)
        extent = bank.reserve(bank.values_bytes(first.nnz))
        if extent is None:
            raise MemoryError(f"no room for {name} in {bank.size_bytes} bytes")
        resident = bank.settle(extent, plane.tiers.resident(first).plane)
        bank.values(resident).normal_(0, 0.01)
        plane.store.add(version)
        for state in (Reading(extent, None), Writing(resident), Resident(resident)):
            plane.tiers.residency.move(version, state)
        plane.tiers._room.add(version)


@contextmanager
def run_tokens(number: int) -> Iterator[None]:
    """From so many tokens of one adapter on, its values are written into the weights."""
    before = bank_module.RUN_TOKENS
    bank_module.RUN_TOKENS = dict.fromkeys(before, number)
    try:
        yield
    finally:
        bank_module.RUN_TOKENS = before


def new_runner(
    engine: Engine, num_seqs: int, num_tokens: int, enforce_eager: bool = False
) -> ModelRunner:
    """A runner of the engine's model with a cache of its own."""
    cache = KVCache(num_seqs, num_tokens, coarse=True)
    return ModelRunner(
        engine.base,
        engine.adapters.bank,
        engine._runner._context,
        cache,
        engine.adapters.tiers.resident,
        enforce_eager=enforce_eager,
    )


def sequences(
    engine: Engine, names: Sequence[str | None], prompt_tokens: int, vocab: int
) -> list[EngineSequence]:
    """One running sequence per name, random prompt, nothing computed yet. They keep no adapter from
    going: nothing else runs here."""
    tokens = torch.randint(0, vocab, (len(names), prompt_tokens)).tolist()
    leases = [None if name is None else engine.adapters.store.acquire(name) for name in names]
    for lease in leases:
        if lease is not None:
            lease.release()
    return [
        EngineSequence(
            request_id=str(i),
            index=0,
            prompt_token_ids=tokens[i],
            params=GREEDY,
            max_tokens=1 << 20,
            end_token_ids=(),
            lease=lease,
            detokenizer=None,
            slot=i,
        )
        for i, lease in enumerate(leases)
    ]


def generate(engine: Engine, runner: ModelRunner, names: Sequence[str | None], steps: int) -> Any:
    """Greedy tokens of one prompt per name: a prefill, then decode steps."""
    torch.manual_seed(1)
    running = sequences(engine, names, 7, int(engine.base.model.config.vocab_size))
    merged = engine.adapters.merging.version
    chunks = tuple(Chunk(s, len(s.prompt_token_ids)) for s in running)
    step = runner.run(Schedule(tuple(running), (), chunks), merged)
    for _ in range(steps):
        for s, chosen in zip(running, sample(step.logits, step.sequences), strict=True):
            assert chosen is not None
            s.output_token_ids.append(chosen.token_id)
        step = runner.run(Schedule(tuple(running), tuple(running), ()), merged)
    return [s.output_token_ids for s in running]


# --- correctness -------------------------------------------------------------------------------


def check_kernels(report: Report) -> None:
    """The op, way by way, against its reference on fresh random shapes."""
    device = report.device
    tiles: list[BypassTile | None] = [None]
    if device.type == "cuda":
        tiles += [BypassTile("direct", 128), BypassTile("staged", 256, warps=8)]
        tiles += [BypassTile("lanes", 64, lanes=32)]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-3)):
        for tile in tiles:
            name = f"kernel {tile.way if tile else 'table'} {dtype}"
            errors = []
            for d_out, d_in, k, num in ((133, 17, 3, 7), (576, 576, 8, 64), (1000, 4096, 20, 133)):
                slots = TokenSlots(tuple(torch.randint(-1, 9, (num,)).tolist()), device, 4)
                y, x = (torch.randn(num, d, device=device).to(dtype) for d in (d_out, d_in))
                index = torch.rand(d_out, d_in, device=device).topk(k).indices.int()
                bypass = torch.randn(9, d_out, k, device=device).to(dtype)
                table = BypassTable(index, bypass)
                expected = bypass_add_reference(y.float(), x, table, slots)
                if device.type == "cuda":
                    bypass_add_triton_(y, x, index, bypass, *slots.on_device, tile)
                else:
                    bypass_add_(y, x, table, slots)
                errors.append(float((y.float() - expected).norm() / expected.norm()))
            report.facts.setdefault("relative_error", {})[name] = max(errors)
            report.checks[name] = all(error < bound for error in errors)  # nan never passes
        slots = TokenSlots((0, -1, 4, 7, 4), device, 4)
        y = torch.randn(5, 33, device=device).to(dtype)
        bias = torch.randn(9, 33, device=device).to(dtype)
        expected = y.float() - bias[4].float()
        for token in (0, 2, 3, 4):
            expected[token] += bias[slots.slots[token]].float()
        x = torch.zeros(5, 1, device=device, dtype=dtype)
        bypass_add_(y, x, BypassTable(None, bias.unsqueeze(2)), slots)
        error = float((y.float() - expected).norm() / expected.norm())
        report.checks[f"biases {dtype}"] = error < bound


def check_entries(report: Report) -> None:
    """Values written into a weight equal rounded sums, and come out exactly."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(1000, 512, device=report.device).to(dtype)
        before, index = weight.clone(), magnitude_index(weight, 8)
        values = torch.randn(index.shape, device=report.device).to(dtype)
        originals = before.gather(1, index.long())
        merged = (originals.float() + values.float()).to(dtype)
        saved = add_entries_(weight, index, values)
        right = torch.equal(weight, before.scatter(1, index.long(), merged))
        restore_entries_(weight, index, saved)
        report.checks[f"entries {dtype}"] = right and torch.equal(weight, before)


def check_engine(report: Report) -> None:
    """A tiny model in float32: replayed tokens are eager tokens, merged or not."""
    engine = Engine(random_base(TINY, report.device, torch.float32), EngineConfig(max_num_seqs=8))
    digest = engine.base_digest()
    add_adapters(engine, TINY.ks, 4)
    names = [None, "k1-0", "k2-1", "k1-3", "k2-0", "k1-0"]
    with run_tokens(NO_RUNS):
        eager = generate(engine, new_runner(engine, 8, 64, enforce_eager=True), names, 12)
        runner = new_runner(engine, 8, 64)
        report.checks["replayed tokens equal eager ones"] = (
            generate(engine, runner, names, 12) == eager
        )
        report.facts["graphs of the tiny engine"] = (
            0 if runner.graphs is None else len(runner.graphs)
        )
        for name in ("k1-0", "k2-1", "k1-1"):
            engine.adapters.merging.merge(name)
            same = generate(engine, runner, names, 12) == eager
            report.checks[f"tokens with {name} merged"] = same
    with run_tokens(2):
        engine.adapters.merging.unmerge()
        written = generate(engine, new_runner(engine, 8, 64, enforce_eager=True), names, 12)
        report.checks["tokens with values written into the weights"] = written == eager
    report.checks["unmerging restores every bit"] = engine.base_digest() == digest
    report.checks["steps were replayed"] = report.device.type != "cuda" or (
        runner.graphs is not None and len(runner.graphs) > 0
    )


@torch.no_grad()
def check_classifier(report: Report) -> None:
    """What a classifier's head sees in a mixed batch is what it sees in a plain float32 model whose
    weights hold the adapter; and texts beside it stay the same."""
    base = random_base(TINY, report.device, torch.float32)
    plain = copy.deepcopy(base.model)
    engine = Engine(base, EngineConfig(max_num_seqs=8))
    add_adapters(engine, TINY.ks, 2)
    names = [None, "k1-0", "k2-1", "k1-1"]
    torch.manual_seed(1)
    running = sequences(engine, names, 7, int(plain.config.vocab_size))
    chunks = tuple(Chunk(s, len(s.prompt_token_ids)) for s in running)
    schedule = Schedule(tuple(running), (), chunks)
    texts = new_runner(engine, 8, 64).run(schedule, None).logits.clone()
    for sequence in running:
        sequence.num_computed = 0
    running[2].task = Classify(("no", "yes"))
    step = new_runner(engine, 8, 64).run(schedule, None)
    assert step.hidden is not None
    source = engine.adapters.store.get("k2-1").source
    assert isinstance(source, Adapter)
    for name, part in source.modules.items():
        weight = plain.get_submodule(name).weight
        index = part.index.long().to(report.device)
        weight.scatter_add_(1, index, part.bypass.float().to(report.device))
    ids = torch.tensor([running[2].prompt_token_ids], device=report.device)
    expected = plain.base_model(ids).last_hidden_state[0, -1]
    error = float((step.hidden[2].float() - expected).norm() / expected.norm())
    report.facts.setdefault("relative_error", {})["classifier"] = error
    report.checks["what a classifier's head sees"] = error < 1e-3  # TF32 where it is allowed
    report.checks["texts beside a classifier"] = torch.equal(step.logits, texts)


# --- decode ------------------------------------------------------------------------------------


def floor_ms(
    engine: Engine, shape: Shape, bandwidth: float, batch: int, values: int, index: int
) -> float:
    """Milliseconds to move once: weights, caches, this many values, and an index of `index`."""
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
    """A call that runs one decode step of these sequences, always at the same context."""
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
    """Random keys and values: attention over zeros would be the same, and easier on the chip."""
    for layer in range(num_layers):
        for part in runner.cache.layer(layer):
            part.normal_()


def measure_decode(
    report: Report, engine: Engine, shape: Shape, bandwidth: float, runner: ModelRunner, batch: int
) -> None:
    """Steps of one batch size: the base and every mix, in turn each round."""
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
        for handle in self._handles:
            handle.remove()


def measure_lora(report: Report, engine: Engine, shape: Shape, runner: ModelRunner) -> None:
    """The base step with LoRA hooks, by batch and distinct adapters."""
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


# --- prefill and merge -------------------------------------------------------------------------


def measure_prefill(report: Report, engine: Engine, shape: Shape) -> None:
    """All tokens in one step, of 1 and of 4 adapters; values gathered, or written into W."""
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
    """Decode steps whose adapters all differ, drawn anew for every sample from few on the device
    and from many: what it costs that there are thousands, none of them in a cache."""
    few, many = shape.residents
    for name in engine.adapters.names:  # of larger k: their room is wanted
        if not name.startswith("k1-"):
            engine.adapters.remove(name)
    present = sum(name.startswith("k1-") for name in engine.adapters.names)
    add_on_device(engine, 1, range(present, many))
    report.facts["adapters resident"] = engine.adapters.bank.num_resident
    report.facts["adapter bytes used"] = engine.adapters.bank.used_bytes
    draw = random.Random(0)
    for _ in range(2 * shape.samples):
        for name, among in (("few", few), ("many", many)):
            chosen = draw.sample(range(among), shape.resident_batch)
            step = decode_step(engine, runner, [f"k1-{number}" for number in chosen], shape)
            step()
            ms = time_ms(step, report.device, shape.steps)
            report.samples_ms.setdefault(f"resident/{name}", []).append(ms)


def measure_swap(report: Report, engine: Engine, shape: Shape) -> None:
    """Merge A, swap to B, unmerge; and the weights afterwards."""
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


# --- tiles -------------------------------------------------------------------------------------

SITES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def candidates(num_tokens: int) -> list[BypassTile]:
    """Ways to cut a launch that might be fast for so many tokens."""
    tiles = [BypassTile("direct", rows, warps=4) for rows in (128, 256, 512)]
    if num_tokens > 1:
        for rows, warps in ((256, 4), (512, 4), (512, 8), (1024, 8), (2048, 8)):
            tiles.append(BypassTile("staged", rows, warps=warps))
        for rows, lanes, warps in ((64, 16, 4), (64, 64, 8), (128, 32, 8)):
            tiles.append(BypassTile("lanes", rows, lanes=lanes, warps=warps))
    tiles += [
        BypassTile(t.way, t.rows, warps=t.warps, early=True)
        for t in tiles
        if t.way != "lanes" and t.rows == 512
    ]
    return tiles


class Layer:
    """One layer's four launches, over `copies` sets of values so that no cache holds them."""

    def __init__(self, num_tokens: int, k: int, device: torch.device) -> None:
        self.k = k
        rows = sum(d_out for d_out, _ in SITES.values())
        self.copies = max(1, min(64, (256 << 20) // (num_tokens * rows * k * 2)))
        size = (num_tokens, self.copies * rows * k)
        self.pool = torch.randn(size, device=device, dtype=torch.bfloat16)
        self.where = TokenSlots(tuple(range(num_tokens)), device).on_device
        self.parts = []  # y, x, index of each site
        for d_out, d_in in SITES.values():
            y, x = (torch.randn(num_tokens, d, device=device).bfloat16() for d in (d_out, d_in))
            index = torch.rand(d_out, d_in, device=device).topk(k).indices.int()
            self.parts.append((y, x, index))

    def run(self, tile: BypassTile) -> None:
        start = 0
        for _ in range(self.copies):
            for y, x, index in self.parts:
                size = index.numel()
                values = self.pool[:, start : start + size].view(-1, *index.shape)
                bypass_add_triton_(y, x, index, values, *self.where, tile)
                start += size


def measure_tiles(report: Report) -> None:
    """Every tile that might be fast, by tokens and k; milliseconds per layer."""
    for num_tokens in (64, 16, 256, 1):
        for k in (1, 8, 20):
            layer = Layer(num_tokens, k, report.device)
            chosen = bypass_tile(num_tokens, k, 4096, 2)
            report.facts.setdefault("tiles", {})[f"{num_tokens}/k{k}"] = asdict(chosen)
            for tile in candidates(num_tokens):
                name = f"tile/{num_tokens}/k{k}/{tile.way} {tile.rows}x{tile.lanes} w{tile.warps}"
                name += " early" if tile.early else ""
                if not report.may_start(name, 8):
                    continue
                try:
                    replay = recorded(partial(layer.run, tile))
                    times = [time_ms(replay, report.device) / layer.copies for _ in range(5)]
                except Exception as error:  # a tile that the chip cannot hold
                    report.errors[name] = repr(error)[:300]
                    continue
                report.samples_ms[name] = times


def recorded(launch: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of these launches."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    return graph.replay


def check_early(report: Report) -> None:
    """Early launches right after the GEMM that writes y give the same bits as late ones."""
    device = report.device
    x, weight = (torch.randn(n, 4096, device=device).bfloat16() for n in (64, 28672))
    index = magnitude_index(weight, 1)
    bypass = torch.randn(64, 28672, 1, device=device).bfloat16()
    slots = TokenSlots(tuple(range(64)), device).on_device
    results = []
    for early in (False, True):
        y = torch.empty(64, 28672, device=device, dtype=torch.bfloat16)

        def layer(y: Tensor = y, early: bool = early) -> None:
            torch.mm(x, weight.t(), out=y)
            bypass_add_triton_(
                y, x, index, bypass, *slots, BypassTile("staged", 512, warps=8, early=early)
            )

        replay = recorded(layer)
        outputs = []
        for _ in range(20):
            y.fill_(float("nan"))
            replay()
            outputs.append(y.clone())
        results.append(outputs)
        report.samples_ms[f"gate_up GEMM with op, {'early' if early else 'late'}"] = [
            time_ms(replay, device, 10) for _ in range(5)
        ]
    report.checks["early launches"] = all(
        torch.equal(late, early) for late, early in zip(*results, strict=True)
    )


# --- output ------------------------------------------------------------------------------------


def met_targets(report: Report) -> dict[str, dict[str, Any]]:
    """Per target the measured ratio, what is allowed, and whether it is met; None unmeasured."""
    found: dict[str, dict[str, Any]] = {}
    for name, (most, numerator, denominator) in TARGETS.items():
        a, b = report.samples_ms.get(numerator), report.samples_ms.get(denominator)
        ratio: float | None = None
        if a and b and len(a) == len(b):  # of one round each, so that drift hits both
            ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        elif a and denominator in report.floors_ms:
            ratio = statistics.median(a) / report.floors_ms[denominator]
        found[name] = {
            "ratio": ratio,
            "at_most": most,
            "met": None if ratio is None else ratio <= most,
        }
    return found


def show(report: Report, targets: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table("measured", "ms (median)", "of base", "floor ms", "of floor")
    for name in report.samples_ms:
        ms = report.median(name)
        assert ms is not None
        storey, batch, *_ = [*name.split("/"), "", ""]
        base = {"decode": f"decode/{batch}/base", "lora": f"decode/{batch}/base"}.get(storey)
        if storey == "prefill":
            base = f"prefill/base/{name.split('/')[2]}" if name.count("/") > 1 else None
        base_ms = None if base is None else report.median(base)
        floor = report.floors_ms.get(name.replace("decode/", "floor/"))
        table.add_row(
            name,
            f"{ms:.3f}",
            "" if base_ms is None else f"{ms / base_ms:.3f}",
            "" if floor is None else f"{floor:.3f}",
            "" if floor is None else f"{ms / floor:.2f}",
        )
    console.print(table)
    goals = Table("target", "measured", "at most", "met")
    for name, goal in targets.items():
        ratio = "not measured" if goal["ratio"] is None else f"{goal['ratio']:.3f}"
        goals.add_row(name, ratio, f"{goal['at_most']}", str(goal["met"]))
    console.print(goals)
    for name, passed in report.checks.items():
        console.print(f"{'pass' if passed else '[red]FAIL[/red]'}  {name}")
    if report.skipped:
        console.print(f"left out for time: {len(report.skipped)} parts")


def hardware(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()} CPU"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.multi_processor_count} SMs, {facts.total_memory >> 30} GiB"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def adapter_bytes(shape: Shape) -> int:
    """Device memory for the adapters of the mixes, or for the many of k=1, whichever is more."""
    config = AutoConfig.for_model("llama", **shape.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rows = sum(matrix_shape(module)[0] for module in adaptable_modules(model).values())
    mixes = max(4, *shape.distinct) * sum(shape.ks)
    indexes = 2 * sum(shape.ks)  # an index takes what two adapters do
    return int(1.02 * 2 * rows * (max(mixes, shape.residents[1]) + indexes)) + (1 << 20)


def measure(report: Report, shape: Shape) -> None:
    device = report.device
    on_gpu = device.type == "cuda"

    # 1. Is it right?
    with report.part("check kernels"):
        check_kernels(report)
    if on_gpu:
        with report.part("check entries"):
            check_entries(report)
    with report.part("check engine"):
        check_engine(report)
    with report.part("check classifier"):
        check_classifier(report)
    torch._dynamo.reset()  # a process serves one model: nothing is compiled for two sizes

    # 2. Is it fast, in the engine?
    report.floors_ms["one millisecond"] = 1.0
    bandwidth = copy_bandwidth(device, shape.copy_bytes)
    report.facts["copy_bytes_per_s"] = bandwidth * 1000
    engine: Engine | None = None
    with report.part("build model"), run_tokens(NO_RUNS):
        largest = max(shape.batches)
        config = EngineConfig(
            max_num_seqs=largest,
            max_num_batched_tokens=shape.prefill_tokens,
            adapter_memory=adapter_bytes(shape),
            adapter_host_memory=1 << 30,
            prefix_cache_memory=0,
        )
        engine = Engine(random_base(shape, device, torch.bfloat16), config)
        add_adapters(engine, shape.ks, max(4, *shape.distinct))
    if engine is None:
        return
    runner = new_runner(engine, largest, shape.context + 8)
    runner.cache.reserve(largest, shape.context)
    for batch in shape.batches:
        with report.part(f"decode, batch {batch}"), run_tokens(NO_RUNS):
            measure_decode(report, engine, shape, bandwidth, runner, batch)
    with report.part("prefill"):
        measure_prefill(report, engine, shape)
    with report.part("swap"):
        measure_swap(report, engine, shape)
    with report.part("residents"), run_tokens(NO_RUNS):
        measure_residents(report, engine, shape, runner)
    with report.part("lora"), run_tokens(NO_RUNS):
        measure_lora(report, engine, shape, runner)

    # 3. Which tiles?
    if on_gpu:
        with report.part("check early launches"):
            check_early(report)
        with report.part("tiles"):
            measure_tiles(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a check failed or a part broke."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting parts then")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu.json")
    args = parser.parse_args(argv)

    torch.manual_seed(int(time.time()))
    report = Report(time.monotonic() + args.minutes * 60, torch.device(args.device))
    shape = TINY if args.tiny else LLAMA_8B
    measure(report, shape)
    targets = met_targets(report)
    show(report, targets, Console(stderr=True, width=110))
    result = {
        "benchmark": "gpu",
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(report.device),
        "versions": {
            "neuroada_serve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "shape": asdict(shape),
        "targets": targets,
        "checks": report.checks,
        "samples_ms": report.samples_ms,
        "floors_ms": report.floors_ms,
        "facts": report.facts,
        "skipped": report.skipped,
        "errors": report.errors,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if all(report.checks.values()) and not report.errors else 1


if __name__ == "__main__":
    raise SystemExit(main())
