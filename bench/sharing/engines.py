"""Engines and parameters that all parts of the sharing benchmark use."""

from typing import Any

from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource
from neuroada_serve.request import SamplingParams

BATCH = 16
WANTED, ROOM, TURN_SLOTS = 6, 3, 64
TURN_PROMPT, TURN_OUTPUT = 24, 32


def new_engine(source: ModelSource, count: int, **config: Any) -> Engine:
    """Engine with adapters a0, a1, ... of k=1."""
    settings = EngineConfig(**{"max_num_seqs": BATCH, **config})
    base = load_base(source, settings.dtype)
    indices = magnitude_indices(base, [1])[1]
    engine = Engine(base, settings)
    for number in range(count):
        adapter = random_adapter(base.spec, indices, number)
        engine.adapters.add_resident(f"a{number}", adapter)
    return engine


def room_bytes(engine: Engine) -> int:
    """Bytes in which ROOM of the engine's adapters fit, which share one index table."""
    bank = engine.adapters.bank
    nnz = engine.adapters.store.get("a0").nnz
    return bank.memory.columns_bytes(nnz) + ROOM * bank.memory.values_bytes(nnz)


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy sampling to the full length."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
