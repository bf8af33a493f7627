"""Decode graphs: buckets, padding, invalidation and failure; and the fused elementwise parts.

What a GPU would record is here a list of plain calls.
"""

import logging

import pytest
import torch
from torch import Tensor

from neuroada_serve.adapters.bank import AdapterBank, Plane, ResidentAdapter
from neuroada_serve.adapters.slot_memory import Extent, SlotMemory
from neuroada_serve.adapters.values import IndexTable, Layout
from neuroada_serve.engine.cuda_graphs import DecodeGraphs, DecodeRows, buckets
from neuroada_serve.errors import DeviceError
from neuroada_serve.ops.step_plan import StepPlan, TokenRun
from tests.support.python import needs_triton, run_interpreted

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
    logits = graphs.run(rows(3, 4, 5), bank.plan([a, None, a, None], None))
    assert recorder.seen == [
        [[3, 4, 5, 0], [103, 104, 105, 0], [0, 1, 2, -1], [7, -1, 7, -1], [-1]]
    ]
    assert logits is not None
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[i] * VOCAB for i in (3.0, 4.0, 5.0)]


def test_replay_reads_the_new_step(graphs, recorder, bank):
    one = resident(0, 1)
    two = ResidentAdapter(one.plane, Extent(2, 1))
    graphs.run(rows(3, 4), bank.plan([one, two], None))
    logits = graphs.run(rows(5, 6), bank.plan([two, two], one))
    assert recorder.captures == 1
    assert recorder.seen[-1] == [[5, 6], [105, 106], [0, 1], [2, 2], [1]]
    assert logits is not None
    assert logits[:, 0].tolist() == [5, 6]


def test_another_layout_is_another_graph(graphs, recorder, bank):
    a, b = resident(0, 1), resident(1, 1)
    for residents in ([a, None], [b, None], [a, b], [None, None], [a, None]):
        graphs.run(rows(3, 4), bank.plan(residents, None))
    assert recorder.captures == len(graphs) == 4


def test_moved_memory_makes_new_graphs(graphs, recorder, bank):
    graphs.run(rows(3), bank.plan([None], None))
    bank.memory.version += 1
    graphs.run(rows(3), bank.plan([None], None))
    assert recorder.captures == 2
    assert len(graphs) == 1


def test_a_batch_has_one_graph_however_its_adapters_are_ordered(graphs, recorder, bank):
    a, b = resident(0, 1), resident(1, 1)
    for residents in ([a, b], [b, a]):
        for merged in (None, a, b):
            plan = bank.plan(residents, merged)
            assert plan.layout == bank.plan(residents[::-1], merged).layout
            graphs.run(rows(3, 4), plan)
    assert recorder.captures == 2, "b merged: its plane's values are subtracted first"


def test_least_used_graph_goes(recorder, bank):
    graphs = DecodeGraphs(recorder.forward, CPU, 20, recorder.capture, max_graphs=2)
    for num in (1, 2, 1, 4, 1, 2):  # the third takes the place of the second
        graphs.run(rows(*range(num)), bank.plan([None] * num, None))
    assert recorder.captures == 4
    assert len(graphs) == 2


class Failing:
    """Captures that fail as often as they are told, with these errors."""

    def __init__(self, recorder: Recorder, *errors: Exception) -> None:
        self._recorder = recorder
        self.errors = list(errors)

    def __call__(self, launch):
        if self.errors:
            raise self.errors.pop(0)
        return self._recorder.capture(launch)


NOT_CAPTURED = "CUDA error: operation not permitted when stream is capturing"


def failing_graphs(recorder: Recorder, *errors: Exception) -> DecodeGraphs:
    return DecodeGraphs(recorder.forward, CPU, 20, Failing(recorder, *errors))


def test_failed_capture_is_tried_again_after_pauses_that_grow(recorder, bank, caplog):
    graphs = failing_graphs(
        recorder, RuntimeError(NOT_CAPTURED), torch.AcceleratorError(NOT_CAPTURED)
    )
    plan = bank.plan([None], None)
    with caplog.at_level(logging.WARNING):
        steps = [graphs.run(rows(3), plan) is not None for _ in range(200)]
    assert steps.index(True) == 64 + 128
    assert all(steps[64 + 128 :])
    assert graphs.num_failed_captures == len(caplog.records) == 2
    assert "without" in caplog.text


def test_failed_capture_leaves_the_other_graphs_in_use(recorder, bank):
    failing = Failing(recorder)
    graphs = DecodeGraphs(recorder.forward, CPU, 20, failing)
    graphs.run(rows(3), bank.plan([None], None))
    failing.errors = [RuntimeError(NOT_CAPTURED)]
    assert graphs.run(rows(3, 4), bank.plan([None] * 2, None)) is None
    assert graphs.run(rows(3), bank.plan([None], None)) is not None
    assert recorder.captures == 1


def test_graphs_that_find_no_memory_take_that_of_the_least_used(recorder, bank):
    failing = Failing(recorder)
    graphs = DecodeGraphs(recorder.forward, CPU, 20, failing)
    for num in (1, 2, 4, 1):
        graphs.run(rows(*range(num)), bank.plan([None] * num, None))
    failing.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    assert graphs.run(rows(*range(8)), bank.plan([None] * 8, None)) is not None
    assert graphs.num_failed_captures == 0
    assert len(graphs) == 2, "those of 8 and of 1; those of 2 and 4 are gone"
    graphs.run(rows(3), bank.plan([None], None))
    assert recorder.captures == 4


@pytest.mark.parametrize("error", [RuntimeError, torch.AcceleratorError])
def test_a_device_that_works_no_more_is_not_taken_for_a_failed_capture(recorder, bank, error):
    graphs = failing_graphs(recorder, error("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceError, match="illegal memory access"):
        graphs.run(rows(3), bank.plan([None], None))


def test_warm_up_captures_every_bucket_the_largest_first(graphs, recorder, bank):
    graphs.run(rows(3), bank.plan([None], None))
    done: list[tuple[int, int]] = []
    plans: list[int] = []

    def plan_of(bucket: int) -> StepPlan:
        plans.append(bucket)
        return bank.plan([None] * bucket, None)

    assert graphs.capture_all(plan_of, lambda *numbers: done.append(numbers)) == 6
    assert plans == [20, 16, 8, 4, 2, 1]
    assert done == [(n, 6) for n in range(1, 7)]
    assert recorder.captures == len(graphs) == 6
    graphs.run(rows(*range(13)), bank.plan([None] * 16, None))
    assert recorder.captures == 6
    assert recorder.seen[-1][2] == [*range(13), -1, -1, -1]


def test_warm_up_ends_at_a_failure_and_evicts_nothing(recorder, bank):
    failing = Failing(recorder)
    graphs = DecodeGraphs(recorder.forward, CPU, 20, failing)

    def progress(done: int, total: int) -> None:
        if done == 2:
            failing.errors = [torch.OutOfMemoryError("CUDA out of memory")]

    assert graphs.capture_all(lambda bucket: bank.plan([None] * bucket, None), progress) == 2
    assert len(graphs) == 2
    assert graphs.num_failed_captures == 1


def test_values_written_into_weights_run_without_a_graph(graphs, recorder, bank):
    plan = StepPlan((0,), [], [TokenRun(0, 1, [])])
    assert graphs.run(rows(3), plan) is None
    assert recorder.captures == 0


@needs_triton
def test_replayed_steps_equal_eager_ones():
    run_interpreted("engine")
