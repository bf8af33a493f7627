"""Failures of memory at every place: one request ends, and nothing else does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neuroada_serve import SamplingParams
from neuroada_serve.adapters.format import save_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import kv_cache
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_cache import CacheMemoryError, KVCache
from neuroada_serve.engine.memory import is_out_of_memory
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from neuroada_serve.request import FinishReason
from tests.support.tiny import FAMILIES, adapter_for, save_tiny_model

REFUSAL = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)


class NoMemory(TorchDispatchMode):
    """The n-th operator that takes memory gets none; each is counted."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.left = fails_at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func._schema.is_mutable or str(func).startswith("aten.view")):
            self.left -= 1
            if not self.left:
                raise RuntimeError(REFUSAL)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refuse(monkeypatch):
    """refuse(n): the n-th memory that the KV cache asks for is not given, nor any after it until
    refuse(0)."""
    state = {"left": 0}
    make = kv_cache._zeros

    def zeros(shape, like):
        if state["left"]:
            state["left"] -= 1
            if state["left"] == 0:
                state["left"] = 1
                raise RuntimeError(REFUSAL)
        return make(shape, like)

    monkeypatch.setattr(kv_cache, "_zeros", zeros)
    return lambda n: state.update(left=n)


def filled_cache(num_layers: int = 3) -> KVCache:
    cache = KVCache(max_slots=4, max_tokens=512)
    for layer in range(num_layers):
        cache.add_layer(layer, kv_heads=2, head_dim=4, dtype=torch.float32)
    cache.reserve(2, 100)
    for layer in range(num_layers):
        for tensor in cache.layer(layer):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return cache


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_failed_growth_leaves_the_cache_as_it_was(refuse, n):
    cache, same = filled_cache(), filled_cache()
    refuse(n)
    with pytest.raises(CacheMemoryError, match="4 x 300 tokens.*it has 2 x 128"):
        cache.reserve(3, 300)
    refuse(0)
    assert cache.holds(1, 128)
    assert not cache.holds(2, 1)
    assert not cache.holds(0, 129)
    for layer in range(3):
        ours, before = (c.view(layer, 0, 2, 128) for c in (cache, same))
        assert torch.equal(ours[0], before[0])
        assert torch.equal(ours[1], before[1])
    cache.reserve(3, 300)
    assert all(k.shape == v.shape == (4, 2, 300, 4) for _, (k, v) in cache.layers())
    assert torch.equal(cache.view(2, 0, 2, 128)[1], same.view(2, 0, 2, 128)[1])


@pytest.mark.parametrize("n", range(1, 7))
def test_failed_first_growth_leaves_the_cache_empty(refuse, n):
    cache = KVCache(4, 512)
    for layer in range(3):
        cache.add_layer(layer, 2, 4, torch.float32)
    refuse(n)
    with pytest.raises(CacheMemoryError):
        cache.reserve(1, 500)
    refuse(0)
    assert not cache.holds(0, 1)
    assert not list(cache.layers())
    cache.reserve(1, 10)
    assert cache.view(2, 0, 1, 10)[0].shape == (1, 2, 10, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_failed_first_write_forgets_the_sizes_it_had_no_memory_for(refuse, n):
    cache, k = KVCache(4, 512), torch.ones(1, 2, 4)
    at = torch.zeros(1, dtype=torch.int64)
    cache.reserve(1, 400)
    refuse(n)

    def write() -> None:
        for layer in range(2):
            cache.write(layer, k, k, at, at)

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        write()
    refuse(0)
    assert not cache.holds(0, 1)
    cache.reserve(1, 5)
    write()
    for layer in range(2):
        assert torch.equal(cache.view(layer, 0, 1, 1)[1], k.transpose(0, 1)[None])


def test_cache_version_changes_with_a_failed_growth(refuse):
    """Layers that were given back have moved: a kernel that has addresses must ask again."""
    cache = filled_cache()
    version = cache.version
    refuse(4)
    with pytest.raises(CacheMemoryError):
        cache.reserve(4, 300)
    assert cache.version != version


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(REFUSAL), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_short(error, is_one):
    assert is_out_of_memory(error) is is_one


# --- the engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
        return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


@pytest.fixture(params=["kernel", "modules"])
def new_engine(request, source, monkeypatch):
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)

    def make(**config) -> Engine:
        dtype = {"kernel": "bfloat16", "modules": "float32"}[request.param]
        engine = Engine(load_base(source, dtype), EngineConfig(**config))
        assert (engine._runner._cpu_decoder is None) is (request.param == "modules")
        return engine

    return make


REQUESTS = {
    "long": (list(range(200)), GREEDY),
    "short": ([5, 6, 7], GREEDY),
    "drawn": ([9, 8], DRAWN),
}


def answers(engine: Engine, names=tuple(REQUESTS)) -> dict[str, tuple[list[int], list]]:
    """Return the tokens of each request, and its final outputs."""
    for name in names:
        engine.add_request(name, *REQUESTS[name])
    found: dict = {name: ([], []) for name in names}
    while engine.has_unfinished:
        for output in engine.step():
            tokens, finals = found[output.request_id]
            tokens += output.token_ids
            finals += [output] if output.finished else []
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_prompt_without_room_ends_alone(new_engine, refuse, n):
    engine = new_engine(max_num_batched_tokens=64)
    expected = answers(engine)
    for name in ("short", "drawn"):
        engine.add_request(name, *REQUESTS[name])
    engine.step()
    engine.add_request("long", *REQUESTS["long"])
    found: dict = {name: ([], []) for name in REQUESTS}
    found["short"][0].append(expected["short"][0][0])
    found["drawn"][0].append(expected["drawn"][0][0])
    refuse(n)  # slots are doubled for the third, then tokens: all fail
    while engine.has_unfinished:
        for output in engine.step():
            tokens, finals = found[output.request_id]
            tokens += output.token_ids
            finals += [output] if output.finished else []
    refuse(0)
    (final,) = found["long"][1]
    assert (final.finish_reason, final.may_retry) == (FinishReason.ERROR, True)
    assert "200 prompt tokens" in final.error
    assert "KV cache of" in final.error
    for name in ("short", "drawn"):
        assert found[name][0] == expected[name][0]
    assert {n: a[0] for n, a in answers(engine).items()} == {n: a[0] for n, a in expected.items()}


def test_failure_anywhere_in_a_step_ends_one_request_and_nothing_else(new_engine):
    """Whatever memory of any step is not given: one request ends, the others' tokens are right,
    and so are all of the next ones."""
    expected = {name: tokens for name, (tokens, _) in answers(new_engine()).items()}
    engine = new_engine(max_num_batched_tokens=64)
    n, num_failed, in_a_row = 1, 0, 0
    while in_a_row < 2:
        with NoMemory(n) as mode:
            found = answers(engine)
        failed = [name for name, (_, (final,)) in found.items() if final.error]
        for name, (tokens, _) in found.items():
            assert tokens == expected[name][: len(tokens)]
            assert name in failed or tokens == expected[name]
        assert len(failed) <= 1
        num_failed += len(failed)
        in_a_row = in_a_row + 1 if mode.left > 0 else 0
        n += 1 + n // 12
    assert num_failed > 20
    assert {name: tokens for name, (tokens, _) in answers(engine).items()} == expected


@pytest.mark.parametrize("how", ["end", "abort", "error", "abort of a waiting one"])
def test_memory_is_free_once_the_last_sequence_has_ended(new_engine, how, monkeypatch):
    engine = new_engine(max_num_seqs=1)
    engine.add_request("r", *REQUESTS["long"])
    engine.step()
    assert engine._cache.holds(0, 100)
    if how == "error":
        monkeypatch.setattr(engine._runner, "run", lambda *args: 1 / 0)
    elif how == "abort of a waiting one":
        engine.add_request("w", *REQUESTS["short"])
        engine.abort("w")
    if how.startswith("abort"):
        engine.abort("r")
    while engine.has_unfinished:
        engine.step()
    assert not engine._cache.holds(0, 1)
    assert not list(engine._cache.layers())


def test_prefix_cache_without_memory_is_none_and_comes_later(new_engine, monkeypatch):
    engine = new_engine()
    expected = answers(engine, ["long"])["long"][0]
    engine = new_engine()
    with monkeypatch.context() as short:
        short.setattr(kv_cache.KVBlocks, "_new", lambda *args: torch.empty(1 << 60))
        assert answers(engine, ["long"])["long"][0] == expected
    assert engine._prefixes.cache is None
    for num_cached in (0, 192):
        tokens, (final,) = answers(engine, ["long"])["long"]
        assert (tokens, final.num_cached_tokens) == (expected, num_cached)


def test_block_that_could_not_be_filled_is_never_found(new_engine, monkeypatch):
    engine = new_engine()
    expected = answers(engine, ["short", "long"])["long"][0]
    engine = new_engine()
    answers(engine, ["short"])
    with monkeypatch.context() as short:
        short.setattr(kv_cache.KVBlocks, "keep", lambda *args: torch.empty(1 << 60))
        assert answers(engine, ["long"])["long"][0] == expected
    tokens, (final,) = answers(engine, ["long"])["long"]
    assert (tokens, final.num_cached_tokens) == (expected, 0)


@pytest.mark.parametrize("place", ["_originals", "add_plane"])
def test_adapter_that_finds_no_memory_ends_its_own_request_only(
    source, place, monkeypatch, tmp_path
):
    base = load_base(source, "float32")
    adapter = adapter_for(base.model, base.spec, seed=1)
    engine = Engine(base, EngineConfig())
    save_adapter(adapter, tmp_path / "a")
    engine.adapters.load("a", tmp_path / "a")
    owner = engine.adapters.tiers if place == "_originals" else engine.adapters.bank

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(owner, place, fail)
    engine.add_request("base", *REQUESTS["short"])
    engine.add_request("adapter", *REQUESTS["short"], "a")
    finals = {}
    while engine.has_unfinished:
        finals |= {o.request_id: o for o in engine.step() if o.finished}
    assert finals["base"].error is None
    assert finals["adapter"].may_retry
    assert not engine.adapters.tiers._loaders.needs_index
    assert not engine.adapters.tiers.residency.num_writing
