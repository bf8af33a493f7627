"""Models and adapters with random weights, and runners that take steps with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from neuroada_serve.adapters import bank as bank_module
from neuroada_serve.adapters.format import Adapter, AdapterConfig, BaseSpec, ModuleBypass
from neuroada_serve.adapters.residency import Reading, Resident, Writing
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.adapters.store import AdapterVersion
from neuroada_serve.engine.batcher import Chunk
from neuroada_serve.engine.cuda_graphs import Capture
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.engine.sampler import sample
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.engine.sequence import Sequence as EngineSequence
from neuroada_serve.model.loader import BaseModel, adaptable_modules, matrix_shape
from neuroada_serve.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=1 << 20, ignore_eos=True)
NO_RUNS = 1 << 30


@dataclass(frozen=True)
class Filled:
    """Requests that want more room than the cache has.

    prompt_tokens: fewest and most.
    cache_memory: its bytes; None: as the engine measures.
    """

    requests: int = 320
    prompt_tokens: tuple[int, int] = (2000, 5000)
    answer_tokens: int = 256
    max_num_seqs: int = 256
    step_tokens: int = 4096
    cache_memory: int | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes that are measured. k's and batches ascend."""

    model: dict[str, Any]
    batches: tuple[int, ...] = (1, 16, 64, 256)
    distinct: tuple[int, ...] = (1, 16, 64, 256)
    ks: tuple[int, ...] = (1, 8, 20)
    context: int = 1024
    prefill_tokens: int = 4096
    residents: tuple[int, int] = (64, 10_000)  # adapters on the device, few and many
    resident_batch: int = 64
    filled: Filled = Filled()
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
        "head_dim": 16,
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
    filled=Filled(8, (20, 40), 60, max_num_seqs=6, step_tokens=64, cache_memory=9 << 13),
    samples=2,
    steps=1,
    copy_bytes=1 << 20,
)


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Build a Llama of this shape with random weights on the device."""
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
    """Serve adapters k{k}-0, k{k}-1, ... with random values.

    The first two of every k come from the host, as any adapter does, and can be merged; the others
    are made on the device.
    """
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
    """Serve adapters k{k}-{number} like k{k}-0, with values drawn on the device."""
    adapters, bank = engine.adapters, engine.adapters.bank
    first = adapters.store.get(f"k{k}-0")
    for number in numbers:
        name = f"k{k}-{number}"
        version = AdapterVersion(name, f"random-{name}", first.nnz, first.source)
        extent = bank.memory.take(bank.memory.values_bytes(first.nnz))
        if extent is None:
            raise MemoryError(f"no room for {name} in {bank.memory.size_bytes} bytes")
        resident = bank.settle(extent, adapters.tiers.resident(first).plane)
        bank.values(resident).normal_(0, 0.01)
        adapters.store.add(version)
        for state in (Reading(extent, None), Writing(resident), Resident(resident)):
            adapters.tiers.residency.move(version, state)
        adapters.tiers._room.add(version)


@contextmanager
def run_tokens(number: int) -> Iterator[None]:
    """Write an adapter's values into the weights from so many of its tokens on."""
    before = bank_module.RUN_TOKENS
    bank_module.RUN_TOKENS = dict.fromkeys(before, number)
    try:
        yield
    finally:
        bank_module.RUN_TOKENS = before


def cache_bytes(shape: Shape) -> int:
    """Bytes of keys and values of the largest batch, with the token that each gets."""
    config = shape.model
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    token = 2 * config["num_hidden_layers"] * heads * dim * 2  # bytes, of a 16-bit type
    return int(max(shape.batches) * (shape.context + CPU_BLOCK_TOKENS) * token * 1.02) + (1 << 20)


def new_runner(
    engine: Engine,
    num_seqs: int,
    num_tokens: int,
    enforce_eager: bool = False,
    capture: Capture | None = None,
) -> ModelRunner:
    """Runner of the engine's model on the engine's cache, in which every slot gets blocks for
    num_tokens in shuffled order."""
    cache = engine._cache
    blocks = -(-num_tokens // cache.block_tokens)
    assert num_seqs * blocks <= cache.num_blocks, (num_seqs, num_tokens, cache.num_blocks)
    order = torch.randperm(cache.num_blocks)[: num_seqs * blocks].view(num_seqs, blocks)
    with torch.inference_mode():
        cache.tables[:num_seqs, :blocks] = order.to(cache.tables)
    return ModelRunner(
        engine.base,
        engine.adapters.bank,
        engine._runner._context,
        cache,
        engine.adapters.tiers.resident,
        enforce_eager=enforce_eager,
        capture=capture,
    )


def sequences(
    engine: Engine, names: Sequence[str | None], prompt_tokens: int, vocab: int
) -> list[EngineSequence]:
    """One running sequence per name, with a random prompt and nothing computed yet.

    Leases are released at once: nothing else runs here that could evict an adapter.
    """
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
            end_token_ids=frozenset(),
            lease=lease,
            detokenizer=None,
            slot=i,
        )
        for i, lease in enumerate(leases)
    ]


def generate(engine: Engine, runner: ModelRunner, names: Sequence[str | None], steps: int) -> Any:
    """Generate greedily from one prompt per name: a prefill, then decode steps."""
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
