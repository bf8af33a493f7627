"""Engines with adapters made up for the merge benchmark."""

from collections.abc import Iterable

from neuroada_serve.benchmark.adapters import magnitude_indices, random_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import ModelSource

BATCH = 16
PROMPT_LEN = 16


def new_engine(source: ModelSource, names: Iterable[str]) -> Engine:
    """Engine with these adapters. k8-3 has k=8, and values of its own by the 3."""
    base = load_base(source)
    made = {name: tuple(map(int, name.removeprefix("k").split("-"))) for name in names}
    indices = magnitude_indices(base, sorted({k for k, _ in made.values()}))
    engine = Engine(base, EngineConfig(max_num_seqs=BATCH, prefix_cache_memory=0))
    for name, (k, seed) in made.items():
        engine.adapters.add_resident(name, random_adapter(base.spec, indices[k], seed))
    return engine
