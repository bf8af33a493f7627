"""Prefixes shared, graphs recorded, prompts cut off, blocks taken from others, memory refused: in
any order, answers are what they are alone, and nothing is held that nobody has."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neuroada_serve import SamplingParams
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.block_tables import Changes
from neuroada_serve.engine.cuda_graphs import DecodeGraphs
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from neuroada_serve.request import FinishReason
from tests.support.tiny import FAMILIES, save_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=90)
START = [(7 * i) % 250 for i in range(67)]
PROMPTS = [START, [*START, 9, 8, 7], START[:37], [*START[:32], *[5] * 40]]
PROMPTS += [[1, 2, 3], list(range(150))]
TOKEN_BYTES = {"float32": 1024, "bfloat16": 512}
FEW_BLOCKS = 8  # as many as the longest prompt and answer need


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
        return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


def record_graphs(engine: Engine, replays: list[int]) -> None:
    """Have decode steps recorded and replayed. A replay reads memory where it was when it was
    recorded: that must be where the cache is."""
    runner, cache = engine._runner, engine._cache

    def places() -> list[int]:
        tensors = [tensor for layer in range(2) for tensor in cache.layer(layer)]
        return [tensor.data_ptr() for tensor in [cache.tables, *tensors]]

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        recorded = places()

        def replay() -> None:
            assert places() == recorded
            launch()
            replays.append(1)

        return replay

    runner.graphs = DecodeGraphs(runner._decode, torch.device("cpu"), cache.max_slots, capture)


@pytest.fixture(params=["kernel", "modules", "graphs"])
def new_engine(request, source, monkeypatch):
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    replays: list[int] = []

    def make(num_blocks: int | None = None, **config) -> Engine:
        dtype = "bfloat16" if request.param == "kernel" else "float32"
        settings = {"max_num_seqs": 3, "max_num_batched_tokens": 48, **config}
        if num_blocks is not None:
            settings["kv_cache_memory"] = num_blocks * CPU_BLOCK_TOKENS * TOKEN_BYTES[dtype]
        engine = Engine(load_base(source, dtype), EngineConfig(**settings))
        assert num_blocks in (None, engine.metrics.kv.blocks)
        assert (engine._runner._cpu_decoder is None) is (request.param != "kernel")
        if request.param == "graphs":
            record_graphs(engine, replays)
        return engine

    yield make
    assert bool(replays) is (request.param == "graphs")


def run(
    engine: Engine, prompt: list[int], params: SamplingParams = GREEDY
) -> tuple[list[int], int]:
    """The answer to a prompt alone, and how many tokens of the prompt were cached."""
    engine.add_request("one", prompt, params)
    tokens: list[int] = []
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
            assert output.error is None
    return tokens, output.num_cached_tokens


def check_nothing_is_held(engine: Engine) -> None:
    assert not engine._scheduler.running
    assert sorted(engine._scheduler._free_slots) == [0, 1, 2]
    assert (engine.metrics.kv.used, engine.metrics.kv.shared) == (0, 0)
    tables = engine._tables
    assert tables.changes == Changes()
    assert not tables._coming._owners
    assert not tables._coming._announced
    assert not tables.blocks.take_unused(), "given back already"


def test_prefix_is_found_in_the_pool_after_all_have_left(new_engine):
    engine = new_engine()
    expected, num_cached = run(engine, START)
    assert num_cached == 0
    for _ in range(3):
        check_nothing_is_held(engine)
        assert run(engine, START) == (expected, len(START) - 1)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("is_cached", [False, True])
def test_prompt_that_is_aborted_on_its_way_leaves_nothing(new_engine, num_steps, is_cached):
    engine = new_engine()
    expected, _ = run(new_engine(), PROMPTS[1])
    if is_cached:
        run(engine, START)
    for prompt in (PROMPTS[5], PROMPTS[1], PROMPTS[3]):
        engine.add_request(f"of {len(prompt)}", prompt, GREEDY)
    for _ in range(num_steps):
        engine.step()
    for prompt in (PROMPTS[1], PROMPTS[3], PROMPTS[5]):
        engine.abort(f"of {len(prompt)}")
    finals = engine.step()
    assert [output.finish_reason for output in finals] == [FinishReason.ABORT] * 3
    check_nothing_is_held(engine)
    assert run(engine, PROMPTS[1])[0] == expected


class Shortage(TorchDispatchMode):
    """While `share` is above 0, such a share of the operators that take memory gets none."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self.share = 0.0
        self.num_refused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        takes_memory = not (func._schema.is_mutable or str(func).startswith("aten.view"))
        if takes_memory and self._chance.random() < self.share:
            self.num_refused += 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return func(*args, **(kwargs or {}))


class Visitors:
    """Requests that come and go by chance; each one's prompt, tokens and ending by its name."""

    def __init__(self, engine: Engine, chance: random.Random) -> None:
        self.engine = engine
        self.asked: dict[str, tuple[int, SamplingParams]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, FinishReason] = {}
        self._chance = chance

    def ask(self, prompt: int, params: SamplingParams) -> None:
        name = str(len(self.asked))
        self.asked[name], self.tokens[name] = (prompt, params), []
        self.engine.add_request(name, PROMPTS[prompt], params)

    def come_and_go(self) -> None:
        chance = self._chance
        for _ in range(chance.choice((0, 1, 1, 2))):
            self.ask(chance.randrange(len(PROMPTS)), chance.choice((GREEDY, LONG)))
        open_ones = [name for name in self.asked if name not in self.endings]
        if open_ones and chance.random() < 0.2:
            self.engine.abort(chance.choice(open_ones))
        if chance.random() < 0.03:  # everybody leaves
            for name in open_ones:
                self.engine.abort(name)

    def step(self) -> None:
        for output in self.engine.step():
            self.tokens[output.request_id] += output.token_ids
            if output.finished:
                assert output.request_id not in self.endings
                self.endings[output.request_id] = output.finish_reason
        if not self.engine.has_unfinished:
            check_nothing_is_held(self.engine)


@pytest.mark.parametrize("num_blocks", [None, FEW_BLOCKS])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_requests_aborts_preemptions_and_refused_memory(new_engine, seed, num_blocks):
    alone = new_engine(prefix_cache_memory=0)
    expected = [run(alone, prompt, LONG)[0] for prompt in PROMPTS]
    engine, chance = new_engine(num_blocks), random.Random(seed)
    visitors = Visitors(engine, chance)
    for prompt in (0, 3, 4):  # too long for the small pool, once they have answered a while
        visitors.ask(prompt, LONG)
    for _ in range(60):
        visitors.step()
    with Shortage(chance) as shortage:
        for _ in range(40):
            visitors.come_and_go()
            shortage.share = chance.choice((0, 0, 0, 0, 0.002, 0.02))
            for _ in range(chance.choice((1, 1, 2, 12))):
                visitors.step()
        shortage.share = 0
        while engine.has_unfinished:
            visitors.step()
    check_nothing_is_held(engine)

    assert visitors.endings.keys() == visitors.asked.keys()
    num_other = 0
    for name, (prompt, params) in visitors.asked.items():
        tokens = visitors.tokens[name]
        num_other += tokens != expected[prompt][: len(tokens)]
        is_whole = visitors.endings[name] is FinishReason.LENGTH
        assert is_whole is (len(tokens) == params.max_tokens)
    # bfloat16 rounds by the size of a batch.
    is_rounded = engine._runner._cpu_decoder is not None
    assert num_other <= (len(visitors.asked) // 2 if is_rounded else 0)
    assert len(set(visitors.endings.values())) >= 2
    assert shortage.num_refused
    assert engine.metrics.num_cached_tokens > 0
    assert num_blocks is None or engine.metrics.num_preemptions > 0
