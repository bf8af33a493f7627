"""The KV cache given back, prefixes restored, graphs recorded, prompts cut off, memory refused: in
any order, answers are what they are alone, and nothing is held that nobody has."""

import random
from collections.abc import Callable

import pytest
import torch

from neuroada_serve import SamplingParams
from neuroada_serve.config import PROMPT_BLOCK, EngineConfig
from neuroada_serve.engine import kv_cache
from neuroada_serve.engine.attention import PackedStep
from neuroada_serve.engine.cuda_graphs import DecodeGraphs
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from neuroada_serve.request import FinishReason
from tests.support.tiny import FAMILIES, save_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
START = [(7 * i) % 250 for i in range(2 * PROMPT_BLOCK + 3)]
PROMPTS = [START, [*START, 9, 8, 7], START[: PROMPT_BLOCK + 5], [*START[:PROMPT_BLOCK], *[5] * 40]]
PROMPTS += [[1, 2, 3], list(range(200))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
        return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


def record_graphs(engine: Engine) -> None:
    """Have decode steps recorded and replayed. A replay reads memory where it was when it was
    recorded: that must be where the cache is."""
    runner, cache = engine._runner, engine._cache

    def places() -> list[int]:
        return [tensor.data_ptr() for _, pair in cache.layers() for tensor in pair]

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        recorded = places()

        def replay() -> None:
            assert places() == recorded
            launch()

        return replay

    def forward(ids, positions, slots, batch):
        real = slots >= 0
        num = int(real.sum())
        length = int(positions[real].max()) + 1
        at = slots[:num].tolist()
        step = PackedStep(cache, slots[:num].long(), positions[:num].long(), at, length, ())
        with runner._context.applying(batch):
            output = runner._base.model(
                input_ids=ids[None, :num].long(),
                position_ids=positions[None, :num].long(),
                use_cache=False,
                step=step,
            )
        logits = output.logits[0]
        return torch.cat([logits, logits.new_zeros(len(ids) - num, logits.shape[-1])])

    runner.graphs = DecodeGraphs(forward, torch.device("cpu"), cache.max_slots, capture)


@pytest.fixture(params=["kernel", "modules", "graphs", "coarse graphs"])
def new_engine(request, source, monkeypatch):
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)

    def make(**config) -> Engine:
        dtype = "bfloat16" if request.param == "kernel" else "float32"
        settings = {"max_num_seqs": 3, "max_num_batched_tokens": 48, "prefix_cache_memory": 1 << 20}
        engine = Engine(load_base(source, dtype), EngineConfig(**settings | config))
        assert (engine._runner._cpu_decoder is None) is (request.param != "kernel")
        engine._cache._coarse = request.param == "coarse graphs"
        if "graphs" in request.param:
            record_graphs(engine)
        return engine

    return make


def run(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """The answer to a prompt alone, and how many tokens of the prompt were cached."""
    engine.add_request("one", prompt, GREEDY)
    tokens: list[int] = []
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
            assert output.error is None
    return tokens, output.num_cached_tokens


def check_nothing_is_held(engine: Engine) -> None:
    assert not engine._scheduler.running
    assert sorted(engine._scheduler._free_slots) == [0, 1, 2]
    assert engine._cache._coarse or not list(engine._cache.layers())
    if engine._prefixes.cache is not None:
        assert not any(block.num_readers for block in engine._prefixes.cache._blocks.values())


def test_prefix_is_restored_into_memory_that_was_given_back(new_engine):
    engine = new_engine()
    expected, num_cached = run(engine, START)
    assert num_cached == 0
    for _ in range(3):
        check_nothing_is_held(engine)
        assert run(engine, START) == (expected, 2 * PROMPT_BLOCK)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("is_cached", [False, True])
def test_prompt_that_is_aborted_on_its_way_leaves_nothing(new_engine, num_steps, is_cached):
    engine = new_engine()
    expected, _ = run(new_engine(), PROMPTS[1])
    if is_cached:
        run(engine, START)
    for prompt in (PROMPTS[5], PROMPTS[1], PROMPTS[3]):  # the first takes all tokens of two steps
        engine.add_request(f"of {len(prompt)}", prompt, GREEDY)
    for _ in range(num_steps):
        engine.step()
    for prompt in (PROMPTS[1], PROMPTS[3], PROMPTS[5]):
        engine.abort(f"of {len(prompt)}")
    finals = engine.step()
    assert [output.finish_reason for output in finals] == [FinishReason.ABORT] * 3
    check_nothing_is_held(engine)
    assert run(engine, PROMPTS[1])[0] == expected


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_requests_aborts_and_refused_memory(new_engine, seed, monkeypatch):
    chance, make = random.Random(seed), kv_cache._zeros
    expected = [run(new_engine(prefix_cache_memory=0), prompt)[0] for prompt in PROMPTS]
    engine = new_engine()
    is_short = [False]

    def zeros(shape, like):
        if is_short[0] and chance.random() < 0.3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(shape, like)

    monkeypatch.setattr(kv_cache, "_zeros", zeros)
    asked: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}
    endings: dict[str, FinishReason] = {}
    for turn in range(40):
        is_short[0] = chance.random() < 0.3
        for _ in range(chance.choice((0, 0, 1, 2))):
            name = f"{turn}.{len(asked)}"
            asked[name], tokens[name] = chance.randrange(len(PROMPTS)), []
            engine.add_request(name, PROMPTS[asked[name]], GREEDY)
        open_ones = [name for name in asked if name not in endings]
        if open_ones and chance.random() < 0.2:
            engine.abort(chance.choice(open_ones))
        if chance.random() < 0.05:  # everybody leaves
            for name in open_ones:
                engine.abort(name)
        for _ in range(chance.choice((1, 1, 2, 12))):
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
                if output.finished:
                    endings[output.request_id] = output.finish_reason
            if not engine._scheduler.running and not engine.has_unfinished:
                check_nothing_is_held(engine)
    is_short[0] = False
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finished:
                endings[output.request_id] = output.finish_reason
    check_nothing_is_held(engine)

    assert endings.keys() == asked.keys()
    assert len(set(endings.values())) >= 2
    num_other = 0
    for name, prompt in asked.items():
        whole = expected[prompt]
        num_other += tokens[name] != whole[: len(tokens[name])]
        assert endings[name] is not FinishReason.LENGTH or len(tokens[name]) == len(whole)
    # bfloat16 rounds by the size of a batch.
    assert num_other <= (len(asked) // 4 if engine._runner._cpu_decoder is not None else 0)
    assert engine.metrics.num_cached_tokens > 0
