"""Hot merge: whatever happens, the base weights come back bit for bit."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
)
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.adapters.values import AdapterValues, ValuesReader, realise
from neuroada_serve.errors import AdapterFormatError, DirtyWeightsError
from neuroada_serve.model.bypass_linear import (
    BypassContext,
    BypassLinear,
    BypassSite,
    attach_bypass,
)
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.merge import WeightMerger, weights_digest
from neuroada_serve.ops import cpu_team
from neuroada_serve.ops.weights import WeightEntries
from tests.support.tiny import adapter_for, save_tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"q": (7, 5), "up": (9, 5), "down": (5, 9)}  # d_out, d_in
BASE = BaseSpec("base", "0" * 64, SIZES)


class Model:
    """Three linear layers, one of them GPT-2's Conv1D, with a merger on top."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict()
        for name, (d_out, d_in) in SIZES.items():
            layer = Conv1D(d_out, d_in) if name == "up" else nn.Linear(d_in, d_out)
            nn.init.normal_(layer.weight, std=0.3)
            self.module[name] = layer.to(dtype).requires_grad_(False)
        self.layers = {
            name: BypassLinear(module, name, BypassSite({name: module}, BypassContext()))
            for name, module in self.module.items()
        }
        self.merger = WeightMerger(self.layers)
        self.reader = ValuesReader(self.merger.order, BASE, dtype)

    def values(self, adapter: Adapter) -> AdapterValues:
        return self.reader.of(adapter)

    def merge(self, adapter: Adapter) -> None:
        self.merger.merge(self.values(adapter))

    def realised(self, adapter: Adapter) -> torch.Tensor:
        values = self.values(adapter)
        return realise(self.merger.originals(values.table), values.values)

    def weight(self, name: str) -> torch.Tensor:
        """[d_out, d_in], a view."""
        layer = self.layers[name]
        return layer.weight.t() if name == "up" else layer.weight

    def digest(self) -> str:
        return weights_digest(self.module)


def new_adapter(seed: int, k: int = 2, modules=tuple(SIZES), largest=True, scale=0.1) -> Adapter:
    """On the largest weights of `Model`, or on columns of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(torch.float32)
    parts = {}
    for name in modules:
        d_out, d_in = SIZES[name]
        own = torch.rand(d_out, d_in, generator=generator).topk(k).indices.int()
        index = magnitude_index(model.weight(name), k) if largest else own
        values = torch.randn(d_out, k, generator=generator) * scale
        parts[name] = ModuleBypass(index, values.bfloat16())
    return make_adapter(AdapterConfig("base", "0" * 64, k, tuple(modules)), parts)


def with_adapter(weight: torch.Tensor, part: ModuleBypass) -> torch.Tensor:
    """round(W0 + v) by loops: what merging must make of a weight [d_out, d_in]."""
    merged = weight.clone()
    for i, columns in enumerate(part.index.tolist()):
        for j, column in enumerate(columns):
            merged[i, column] = (weight[i, column].float() + part.bypass[i, j].float()).item()
    return merged


ADAPTERS = {
    "a": new_adapter(1),
    "same index": new_adapter(2),
    "smaller k": new_adapter(3, k=1),
    "larger k": new_adapter(4, k=5),
    "other index": new_adapter(5, k=3, largest=False),
    "fewer modules": new_adapter(6, modules=("down",)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_writes_rounded_sums_and_nothing_else(dtype, name):
    model, adapter = Model(dtype), ADAPTERS[name]
    expected = {n: model.weight(n).clone() for n in SIZES}
    for module, part in adapter.modules.items():
        expected[module] = with_adapter(expected[module], part)
    model.merge(adapter)
    for module, weight in expected.items():
        assert torch.equal(model.weight(module), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_unmerge_restores_exact_bits(dtype, name):
    model = Model(dtype)
    before = model.digest()
    model.merge(ADAPTERS[name])
    assert model.merger.is_merged
    assert model.digest() != before
    model.merger.unmerge()
    assert not model.merger.is_merged
    assert model.digest() == before


@pytest.mark.parametrize("first", ADAPTERS)
@pytest.mark.parametrize("second", ADAPTERS)
def test_swap_equals_a_fresh_merge_and_comes_back(first, second):
    model, fresh = Model(), Model()
    before = model.digest()
    model.merge(ADAPTERS[first])
    model.merge(ADAPTERS[second])
    fresh.merge(ADAPTERS[second])
    assert model.digest() == fresh.digest()
    model.merger.unmerge()
    assert model.digest() == before


def test_merge_twice_equals_once():
    model = Model()
    model.merge(ADAPTERS["a"])
    once = model.digest()
    model.merge(ADAPTERS["a"])
    assert model.digest() == once


def test_unmerge_without_a_merge_changes_nothing():
    model = Model()
    before = model.digest()
    model.merger.unmerge()
    assert model.digest() == before


def test_negative_zeros_come_back():
    model = Model()
    with torch.no_grad():
        model.weight("q").fill_(-0.0)
    before = model.digest()
    adapter = new_adapter(1, scale=0.0)
    model.merge(adapter)
    model.merger.unmerge()
    assert model.digest() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousand_rotating_merges_leave_the_digest(dtype, tmp_path):
    base = load_base(save_tiny_model(tmp_path, dtype=dtype))
    adapters = [adapter_for(base.model, base.spec, seed, k=1 + seed % 4) for seed in range(8)]
    layers = attach_bypass(base.model).layers
    merger, before = WeightMerger(layers), weights_digest(base.model)
    reader = ValuesReader(merger.order, base.spec, dtype)
    adapters = [reader.of(adapter) for adapter in adapters]
    for cycle in range(1000 if dtype == torch.bfloat16 else 50):
        merger.merge(adapters[cycle * 5 % 8])
        if cycle % 4 == 0:
            merger.unmerge()
    assert merger.is_merged
    merger.unmerge()
    assert weights_digest(base.model) == before


# --- originals, and what merging changes ------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("merged", [None, *ADAPTERS])
def test_originals_do_not_depend_on_what_is_merged(dtype, name, merged):
    model = Model(dtype)
    expected = model.merger.originals(model.values(ADAPTERS[name]).table)
    if merged is not None:
        model.merge(ADAPTERS[merged])
    before = model.digest()
    originals = model.merger.originals(model.values(ADAPTERS[name]).table)
    assert torch.equal(originals, expected)
    assert model.digest() == before


def test_originals_lie_in_the_order_of_the_table():
    model, adapter = Model(), ADAPTERS["other index"]
    table = model.values(adapter).table
    originals = model.merger.originals(table)
    for name, place in table.layout.of_module().items():
        expected = model.weight(name).gather(1, adapter.modules[name].index.long())
        assert torch.equal(originals[place].view(expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_plus_realised_value_is_the_merged_weight(dtype):
    """Exact where |v| <= |W0| / 2, by Sterbenz' lemma; the file's own values are not."""
    model, adapter = Model(dtype), new_adapter(1, k=1, scale=0.02)
    values = model.values(adapter)
    originals = model.merger.originals(values.table)
    deltas = model.realised(adapter)
    model.merge(adapter)
    merged = torch.cat(
        [
            model.weight(name).gather(1, adapter.modules[name].index.long()).flatten()
            for name in values.table.layout.of_module()
        ]
    )
    small = values.values.float().abs() <= originals.float().abs() / 2
    assert small.float().mean() > 0.9
    assert deltas.dtype == dtype
    assert torch.equal((originals.float() + deltas.float())[small], merged.float()[small])
    if dtype == torch.bfloat16:  # else this test would show nothing
        assert (deltas.float() != values.values.float()).any()


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SIZES)
def test_value_that_could_overflow_a_weight_is_refused_by_module(module):
    """Finite values that a float16 weight cannot take."""
    parts = dict(ADAPTERS["a"].modules)
    index = parts[module].index
    parts[module] = ModuleBypass(index, torch.full(index.shape, 7e4))
    overflowing = make_adapter(ADAPTERS["a"].config, parts)
    with pytest.raises(
        AdapterFormatError, match=f"value of {module}.bypass .* overflows torch.float16"
    ):
        Model(torch.float16).values(overflowing)
    Model(torch.bfloat16).values(overflowing)


@pytest.mark.parametrize("merged", [None, "a", "other index"])
def test_overflowing_merge_changes_nothing(merged):
    model = Model(torch.float16)
    with torch.no_grad():
        model.weight("q").fill_(65504.0)
    if merged is not None:
        model.merge(ADAPTERS[merged])
    before, was_merged = model.digest(), model.merger.is_merged
    parts = dict(ADAPTERS["a"].modules)
    parts["q"] = ModuleBypass(parts["q"].index, torch.full(parts["q"].index.shape, 3e4))
    with pytest.raises(AdapterFormatError, match="overflows torch.float16"):
        model.merge(make_adapter(ADAPTERS["a"].config, parts))
    assert model.merger.is_merged == was_merged
    assert model.digest() == before


class Broken(Exception):
    pass


def fail_writes(monkeypatch, failing: set[int], num_written: int) -> list[int]:
    """Make these calls of `WeightEntries.write_`, counted from 0, raise, with the first num_written
    entries written."""
    calls: list[int] = []
    real = WeightEntries.write_

    def write_(entries, values):
        calls.append(len(values))
        if len(calls) - 1 not in failing:
            real(entries, values)
            return
        partly = entries.read()
        partly[:num_written] = values[:num_written]
        real(entries, partly)
        raise Broken

    monkeypatch.setattr(WeightEntries, "write_", write_)
    return calls


@pytest.mark.parametrize("num_written", [0, 9, 1000])
@pytest.mark.parametrize("merged", [None, "a", "other index", "fewer modules"])
@pytest.mark.parametrize("name", ["same index", "larger k", "fewer modules"])
def test_exception_at_any_write_leaves_the_base(name, merged, num_written, monkeypatch):
    failed = 0
    for nth in range(5):
        model = Model()
        before = model.digest()
        if merged is not None:
            model.merge(ADAPTERS[merged])
        with monkeypatch.context() as patch:
            calls = fail_writes(patch, {nth}, num_written)
            try:
                model.merge(ADAPTERS[name])
            except Broken:
                failed += 1
                assert len(calls) > nth
                assert not model.merger.is_merged
                assert model.digest() == before
        model.merge(ADAPTERS[name])  # works again
        model.merger.unmerge()
        assert model.digest() == before
    assert failed >= 1


def test_failing_restore_makes_the_weights_dirty_for_good(monkeypatch):
    model = Model()
    model.merge(ADAPTERS["a"])
    with monkeypatch.context() as patch:
        fail_writes(patch, {0}, num_written=3)
        with pytest.raises(DirtyWeightsError, match="restart the process") as raised:
            model.merger.unmerge()
    assert isinstance(raised.value.__cause__, Broken)
    for action in (model.merger.unmerge, lambda: model.merge(ADAPTERS["a"])):
        with pytest.raises(DirtyWeightsError):
            action()


def test_failing_restore_after_a_failing_merge_is_dirty_too(monkeypatch):
    model = Model()
    fail_writes(monkeypatch, {0, 1}, num_written=3)
    with pytest.raises(DirtyWeightsError):
        model.merge(ADAPTERS["a"])


def test_interrupted_merge_leaves_the_base(monkeypatch):
    model = Model()
    before = model.digest()
    real, calls = WeightEntries.write_, []

    def write_(entries, values):
        real(entries, values)
        calls.append(values)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(WeightEntries, "write_", write_)
    with pytest.raises(KeyboardInterrupt):
        model.merge(ADAPTERS["a"])
    assert model.digest() == before


def test_without_a_kernel_the_same_is_written(monkeypatch):
    model, plain = Model(), Model()
    model.merge(ADAPTERS["larger k"])
    monkeypatch.setattr(cpu_team, "supports", lambda *tensors: False)
    plain.merge(ADAPTERS["larger k"])
    assert model.digest() == plain.digest()


def test_weights_digest_sees_names_dtypes_shapes_and_bits():
    def digest(name: str, tensor: torch.Tensor) -> str:
        module = nn.Module()
        module.register_buffer(name, tensor)
        return weights_digest(module)

    digests = [
        digest("a", torch.zeros(2, 3)),
        digest("b", torch.zeros(2, 3)),
        digest("a", torch.zeros(3, 2)),
        digest("a", torch.zeros(2, 3).int()),
        digest("a", -torch.zeros(2, 3)),
    ]
    assert len(set(digests)) == 5
    assert digest("a", torch.zeros(2, 3)) == digests[0]
