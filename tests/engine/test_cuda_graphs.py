"""Decode graphs: buckets, padding, invalidation and failure; and the fused elementwise parts.

What a GPU would record is here a list of plain calls.
"""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import configuration_auto

from neuroada_serve.adapters.bank import AdapterBank, Plane, ResidentAdapter
from neuroada_serve.adapters.slot_memory import Extent, SlotMemory
from neuroada_serve.adapters.values import IndexTable, Layout
from neuroada_serve.engine.cuda_graphs import DecodeGraphs, DecodeRows, buckets
from neuroada_serve.engine.fused import compile_elementwise
from neuroada_serve.engine.kv_cache import KVCache
from neuroada_serve.ops.step_plan import StepPlan, TokenRun
from tests.support.python import needs_triton, run_interpreted
from tests.support.tiny import FAMILIES

CPU = torch.device("cpu")
VOCAB = 5


class Recorder:
    """Captures by calling; its forward writes down what it reads from the static tensors."""

    def __init__(self) -> None:
        self.captures = 0
        self.seen: list[list[list[int]]] = []

    def capture(self, launch):
        self.captures += 1
        launch()
        self.seen.clear()  # warming up is not a step
        return launch

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, plan: StepPlan) -> Tensor:
        tensors = [ids, positions, slots]
        for token_slots in plan.token_slots:
            tensors += token_slots.on_device
        self.seen.append([t.tolist() for t in tensors])
        return ids[:, None] * torch.ones(VOCAB, dtype=torch.bfloat16)


def rows(*ids: int) -> DecodeRows:
    return DecodeRows(ids, [i + 100 for i in ids], list(range(len(ids))))


@pytest.fixture
def bank():
    return AdapterBank(SlotMemory(CPU, torch.float32, 1 << 12))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def graphs(recorder):
    return DecodeGraphs(recorder.forward, CPU, 20, recorder.capture)


def resident(number: int, slot: int) -> ResidentAdapter:
    table = IndexTable(Layout(1, (), {}), torch.empty(0, dtype=torch.int32))
    return ResidentAdapter(Plane(number, table, Extent(0, 1)), Extent(slot, 1))


def test_buckets_are_dense_enough_and_end_at_the_largest_batch():
    assert buckets(1) == (1,)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert buckets(32) == (1, 2, 4, 8, 16, 24, 32)
    assert buckets(256)[-2:] == (248, 256)
    for size in range(1, 257):
        assert any(size <= bucket <= max(2 * size - 1, size + 7) for bucket in buckets(256))


def test_padding_rows_have_no_kv_slot_and_no_adapter(graphs, recorder, bank):
    a = resident(0, 7)
    logits = graphs.run(rows(3, 4, 5), bank.plan([a, None, a, None], None), 0)
    assert recorder.seen == [
        [[3, 4, 5, 0], [103, 104, 105, 0], [0, 1, 2, -1], [7, -1, 7, -1], [-1]]
    ]
    assert logits is not None
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[i] * VOCAB for i in (3.0, 4.0, 5.0)]


def test_replay_reads_the_new_step(graphs, recorder, bank):
    one = resident(0, 1)
    two = ResidentAdapter(one.plane, Extent(2, 1))
    graphs.run(rows(3, 4), bank.plan([one, two], None), 0)
    logits = graphs.run(rows(5, 6), bank.plan([two, two], one), 0)
    assert recorder.captures == 1
    assert recorder.seen[-1] == [[5, 6], [105, 106], [0, 1], [2, 2], [1]]
    assert logits is not None
    assert logits[:, 0].tolist() == [5, 6]


def test_another_layout_is_another_graph(graphs, recorder, bank):
    a, b = resident(0, 1), resident(1, 1)
    for residents in ([a, None], [b, None], [a, b], [None, None], [a, None]):
        graphs.run(rows(3, 4), bank.plan(residents, None), 0)
    assert recorder.captures == len(graphs) == 4


def test_moved_memory_makes_new_graphs(graphs, recorder, bank):
    graphs.run(rows(3), bank.plan([None], None), 0)
    graphs.run(rows(3), bank.plan([None], None), 1)
    bank.memory.version += 1
    graphs.run(rows(3), bank.plan([None], None), 1)
    assert recorder.captures == 3
    assert len(graphs) == 1


def test_least_used_graph_goes(recorder, bank):
    graphs = DecodeGraphs(recorder.forward, CPU, 20, recorder.capture, max_graphs=2)
    for num in (1, 2, 1, 4, 1, 2):  # the third takes the place of the second
        graphs.run(rows(*range(num)), bank.plan([None] * num, None), 0)
    assert recorder.captures == 4
    assert len(graphs) == 2


def test_failed_capture_is_logged_once_and_the_engine_goes_on(recorder, bank, caplog):
    def capture(launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(recorder.forward, CPU, 20, capture)
    with caplog.at_level(logging.WARNING):
        assert graphs.run(rows(3), bank.plan([None], None), 0) is None
        assert graphs.run(rows(3), bank.plan([None], None), 0) is None
    assert len(caplog.records) == 1
    assert "without" in caplog.text


def test_values_written_into_weights_run_without_a_graph(graphs, recorder, bank):
    plan = StepPlan((0,), [], [TokenRun(0, 1, [])])
    assert graphs.run(rows(3), plan, 0) is None
    assert recorder.captures == 0


def test_coarse_cache_moves_rarely_and_is_kept():
    cache = KVCache(100, 5000, coarse=True)
    sizes = [(1, 1), (16, 1000), (17, 900), (30, 2000), (32, 2048), (1, 5000), (100, 5000)]
    versions = []
    for num_slots, num_tokens in sizes:
        cache.reserve(num_slots, num_tokens)
        versions.append(cache.version)
    assert versions == [1, 1, 2, 3, 3, 4, 5]
    kept = torch.ones(1, 2, 4)
    cache.write(0, kept, kept, torch.tensor([99]), torch.tensor([4999]))
    cache.release()
    assert torch.equal(cache.layer(0)[0][99, :, 4999], kept[0])
    assert cache.version == 5


@needs_triton
def test_replayed_steps_equal_eager_ones():
    run_interpreted("engine")


# --- fused elementwise parts -----------------------------------------------------------------


def tiny_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = configuration_auto.AutoConfig.for_model(family, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
@torch.no_grad()
def test_fused_parts_change_nothing(family):
    model = tiny_model(family)
    expected = [model(torch.arange(n)[None]).logits for n in (1, 2, 9)]
    called: list[str] = []

    def compiler(function):
        def compiled(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        return compiled

    changed = compile_elementwise(model, compiler)
    for n, logits in zip((1, 2, 9), expected, strict=True):
        assert torch.equal(model(torch.arange(n)[None]).logits, logits)
    wanted = {"gpt2": set(), "phi3": {"forward", "apply_rotary_pos_emb"}}
    assert set(called) == wanted.get(family, {"forward", "apply_rotary_pos_emb", "gate"})
    for module in changed:
        del module.forward
    called.clear()
    assert torch.equal(model(torch.arange(9)[None]).logits, expected[2])
    assert called == []


@torch.inference_mode()
def test_layers_share_a_few_compilations():
    """The real tracer without its code generator: no layer and no new length compiles anew."""
    torch._dynamo.reset()
    model = tiny_model("llama")
    expected = {n: model(torch.arange(n)[None]).logits for n in (1, 3, 4, 8, 16, 17)}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_elementwise(model, lambda function: torch.compile(function, backend=backend))
    for n, logits in expected.items():
        torch.testing.assert_close(model(torch.arange(n)[None]).logits, logits)
    assert len(graphs) <= 9, "norm, rotary, gate: one token, first length, any length"


def test_part_that_cannot_be_compiled_runs_as_it_is(caplog):
    model = tiny_model("llama")
    expected = model(torch.arange(5)[None]).logits

    def compiler(function):
        def refuse(*args):
            raise RuntimeError("no compiler")

        return refuse

    compile_elementwise(model, compiler)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)
    assert len(caplog.records) == 3  # once each, not per layer
