"""Failures of memory at every place: one request ends, and nothing else does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neuroada_serve import SamplingParams
from neuroada_serve.adapters.format import save_adapter
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.memory import is_out_of_memory
from neuroada_serve.engine.scheduler import Schedule
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from neuroada_serve.request import FinishReason
from tests.support.tiny import FAMILIES, adapter_for, save_tiny_model

REFUSAL = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)


class NoMemory(TorchDispatchMode):
    """Every n-th operator that takes memory gets none; num_refused counts them."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self._each = each
        self._num_asked = 0
        self.num_refused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func._schema.is_mutable or str(func).startswith("aten.view")):
            self._num_asked += 1
            if self._num_asked % self._each == 0:
                self.num_refused += 1
                raise RuntimeError(REFUSAL)
        return func(*args, **(kwargs or {}))


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


def refuse_above(engine: Engine, monkeypatch, num_tokens: int, name: str | None = None) -> list:
    """Let steps of more tokens find no memory, all or those of one request; return the sizes of
    those that do."""
    sizes: list[int] = []
    run = engine._runner.run

    def limited(schedule: Schedule, merged):
        size = len(schedule.decodes) + sum(c.num_tokens for c in schedule.prefills)
        names = {s.request_id for s in schedule.scheduled}
        if size > num_tokens and (name is None or name in names):
            raise RuntimeError(REFUSAL)
        sizes.append(size)
        return run(schedule, merged)

    monkeypatch.setattr(engine._runner, "run", limited)
    return sizes


def test_step_without_memory_runs_in_parts(new_engine, monkeypatch):
    expected = answers(new_engine())
    engine = new_engine()
    sizes = refuse_above(engine, monkeypatch, 128)
    found = answers(engine)
    assert {n: a[0] for n, a in found.items()} == {n: a[0] for n, a in expected.items()}
    assert not any(final.error for _, (final,) in found.values())
    assert 64 < max(sizes) <= 128


def test_request_that_never_finds_memory_ends_alone(new_engine, monkeypatch):
    expected = answers(new_engine())
    engine = new_engine()
    with monkeypatch.context() as short:
        refuse_above(engine, short, 0, "long")
        found = answers(engine)
    (final,) = found["long"][1]
    assert (final.finish_reason, final.may_retry) == (FinishReason.ERROR, True)
    assert "200 prompt tokens" in final.error
    assert "found no memory" in final.error
    for name in ("short", "drawn"):
        assert found[name][0] == expected[name][0]
    assert {n: a[0] for n, a in answers(engine).items()} == {n: a[0] for n, a in expected.items()}


def test_refusals_anywhere_in_a_step_end_no_more_than_its_requests(new_engine):
    """Every n-th memory is not given: tokens are right as far as they come, requests that end say
    why, and all of the next ones are right."""
    expected = {name: tokens for name, (tokens, _) in answers(new_engine()).items()}
    engine = new_engine(max_num_batched_tokens=64)
    num_failed = num_refused = 0
    for each in range(1, 51):
        with NoMemory(each) as mode:
            found = answers(engine)
        num_refused += mode.num_refused
        for name, (tokens, (final,)) in found.items():
            assert tokens == expected[name][: len(tokens)]
            assert final.may_retry if final.error else tokens == expected[name]
            num_failed += final.error is not None
        assert {name: tokens for name, (tokens, _) in answers(engine).items()} == expected
        assert engine.metrics.kv.used == 0
    assert num_refused > num_failed > 20


@pytest.mark.parametrize("how", ["end", "abort", "error", "abort of a waiting one"])
def test_memory_is_free_once_the_last_sequence_has_ended(new_engine, how, monkeypatch):
    engine = new_engine(max_num_seqs=1)
    engine.add_request("r", *REQUESTS["long"])
    engine.step()
    assert engine.metrics.kv.used == 7  # of 32 tokens each
    if how == "error":
        monkeypatch.setattr(engine._runner, "run", lambda *args: 1 / 0)
    elif how == "abort of a waiting one":
        engine.add_request("w", *REQUESTS["short"])
        engine.abort("w")
    if how.startswith("abort"):
        engine.abort("r")
    while engine.has_unfinished:
        engine.step()
    assert engine.metrics.kv.used == 0
    assert not engine._tables.blocks.take_unused(), "given back already"


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
