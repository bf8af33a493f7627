"""Hot merge: whatever happens, the base weights come back bit for bit."""

import pytest
import torch
from tiny import adapter_for, save_tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from neuroada_serve.adapters.format import Adapter, AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.engine.merge_policy import AutoMerge
from neuroada_serve.errors import AdapterFormatError, DirtyWeightsError
from neuroada_serve.model.bypass_linear import (
    BypassContext,
    BypassLinear,
    BypassSite,
    attach_bypass,
)
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.merge import WeightMerger, weights_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"q": (7, 5), "up": (9, 5), "down": (5, 9)}  # d_out, d_in


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
    model.merger.merge(adapter)
    for module, weight in expected.items():
        assert torch.equal(model.weight(module), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_unmerge_restores_exact_bits(dtype, name):
    model = Model(dtype)
    before = model.digest()
    model.merger.merge(ADAPTERS[name])
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
    model.merger.merge(ADAPTERS[first])
    model.merger.merge(ADAPTERS[second])
    fresh.merger.merge(ADAPTERS[second])
    assert model.digest() == fresh.digest()
    model.merger.unmerge()
    assert model.digest() == before


def test_merge_twice_equals_once():
    model = Model()
    model.merger.merge(ADAPTERS["a"])
    once = model.digest()
    model.merger.merge(ADAPTERS["a"])
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
    model.merger.merge(adapter)
    model.merger.unmerge()
    assert model.digest() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousand_rotating_merges_leave_the_digest(dtype, tmp_path):
    base = load_base(save_tiny_model(tmp_path, dtype=dtype))
    adapters = [adapter_for(base.model, base.spec, seed, k=1 + seed % 4) for seed in range(8)]
    layers = attach_bypass(base.model).layers
    merger, before = WeightMerger(layers), weights_digest(base.model)
    for cycle in range(1000 if dtype == torch.bfloat16 else 50):
        merger.merge(adapters[cycle * 5 % 8])
        if cycle % 4 == 0:
            merger.unmerge()
    assert merger.is_merged
    merger.unmerge()
    assert weights_digest(base.model) == before


# --- realise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("merged", [None, *ADAPTERS])
def test_realised_values_do_not_depend_on_what_is_merged(dtype, name, merged):
    model = Model(dtype)
    expected = model.merger.realise(ADAPTERS[name])
    if merged is not None:
        model.merger.merge(ADAPTERS[merged])
    realised = model.merger.realise(ADAPTERS[name])
    assert realised.keys() == expected.keys()
    for module, delta in expected.items():
        assert torch.equal(realised[module], delta)


def test_realise_changes_no_weight():
    model = Model()
    before = model.digest()
    model.merger.realise(ADAPTERS["a"])
    assert model.digest() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_plus_realised_value_is_the_merged_weight(dtype):
    """Exact where |v| <= |W0| / 2, by Sterbenz' lemma; the file's own values are not."""
    model, adapter = Model(dtype), new_adapter(1, k=1, scale=0.02)
    originals = {n: model.weight(n).gather(1, p.index.long()) for n, p in adapter.modules.items()}
    deltas = model.merger.realise(adapter)
    model.merger.merge(adapter)
    rounded = 0
    for name, part in adapter.modules.items():
        small = part.bypass.float().abs() <= originals[name].float().abs() / 2
        assert small.float().mean() > 0.9
        merged = model.weight(name).gather(1, part.index.long())
        total = originals[name].float() + deltas[name].float()
        assert deltas[name].dtype == dtype
        assert torch.equal(total[small], merged.float()[small])
        rounded += int((deltas[name].float() != part.bypass.float()).sum())
    if dtype == torch.bfloat16:
        assert rounded  # else this test would show nothing


# --- errors ----------------------------------------------------------------------------------


def overflowing(module: str) -> Adapter:
    """Finite values that a float16 weight cannot take."""
    parts = dict(ADAPTERS["a"].modules)
    index = parts[module].index
    parts[module] = ModuleBypass(index, torch.full(index.shape, 7e4))
    return make_adapter(ADAPTERS["a"].config, parts)


@pytest.mark.parametrize("module", SIZES)
@pytest.mark.parametrize("merged", [None, "a", "other index"])
def test_overflow_is_refused_by_module_and_leaves_the_base(module, merged):
    model = Model(torch.float16)
    before = model.digest()
    if merged is not None:
        model.merger.merge(ADAPTERS[merged])
    with pytest.raises(AdapterFormatError, match=f"value of {module} overflows torch.float16"):
        model.merger.merge(overflowing(module))
    assert not model.merger.is_merged
    assert model.digest() == before


def test_overflow_is_refused_when_realised():
    model = Model(torch.float16)
    with pytest.raises(AdapterFormatError, match="overflows torch.float16"):
        model.merger.realise(overflowing("q"))
    Model(torch.bfloat16).merger.realise(overflowing("q"))


class Broken(Exception):
    pass


def fail_writes(monkeypatch, model: Model, failing: set[int], after_writing: bool) -> list[str]:
    """Make these calls of write_entries_, counted from 0, raise; before or after their write."""
    calls: list[str] = []
    real = BypassLinear.write_entries_

    def write_entries_(layer, positions, values):
        calls.append(layer.name)
        fails = len(calls) - 1 in failing
        if not fails or after_writing:
            real(layer, positions, values)
        if fails:
            raise Broken

    monkeypatch.setattr(BypassLinear, "write_entries_", write_entries_)
    return calls


@pytest.mark.parametrize("after_writing", [False, True])
@pytest.mark.parametrize("merged", [None, "a", "other index", "fewer modules"])
@pytest.mark.parametrize("name", ["same index", "larger k", "fewer modules"])
def test_exception_at_any_write_leaves_the_base(name, merged, after_writing, monkeypatch):
    writes = 0
    for nth in range(7):
        model = Model()
        before = model.digest()
        if merged is not None:
            model.merger.merge(ADAPTERS[merged])
        with monkeypatch.context() as patch:
            calls = fail_writes(patch, model, {nth}, after_writing)
            try:
                model.merger.merge(ADAPTERS[name])
            except Broken:
                writes += 1
                assert len(calls) > nth
                assert not model.merger.is_merged
                assert model.digest() == before
        model.merger.merge(ADAPTERS[name])  # works again
        model.merger.unmerge()
        assert model.digest() == before
    assert writes >= len(ADAPTERS[name].modules)


def test_failing_restore_makes_the_weights_dirty_for_good(monkeypatch):
    model = Model()
    model.merger.merge(ADAPTERS["a"])
    with monkeypatch.context() as patch:
        fail_writes(patch, model, {1}, after_writing=False)
        with pytest.raises(DirtyWeightsError, match="restart the process") as raised:
            model.merger.unmerge()
    assert isinstance(raised.value.__cause__, Broken)
    for action in (model.merger.unmerge, lambda: model.merger.merge(ADAPTERS["a"])):
        with pytest.raises(DirtyWeightsError):
            action()


def test_failing_restore_after_a_failing_merge_is_dirty_too(monkeypatch):
    model = Model()
    fail_writes(monkeypatch, model, {1, 2}, after_writing=True)
    with pytest.raises(DirtyWeightsError):
        model.merger.merge(ADAPTERS["a"])


def test_interrupted_merge_leaves_the_base(monkeypatch):
    model = Model()
    before = model.digest()
    with monkeypatch.context() as patch:
        patch.setattr(WeightMerger, "_merged_values", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.merger.merge(ADAPTERS["a"])
    assert model.digest() == before


def _interrupt(*args):
    raise KeyboardInterrupt


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


# --- auto ------------------------------------------------------------------------------------


def choices(policy: AutoMerge, *steps: str, merged: str | None = None) -> list[str | None]:
    """What the policy has merged after each step; letters are running sequences, . the base."""
    chosen = []
    for step in steps:
        merged = policy.choose([None if s == "." else s for s in step], merged)
        chosen.append(merged)
    return chosen


def test_auto_merges_the_largest_group_after_four_steps():
    assert choices(AutoMerge(), *["aaab."] * 5) == [None, None, None, "a", "a"]


def test_auto_needs_a_clear_advantage():
    assert choices(AutoMerge(), *["aaa.."] * 9) == [None] * 9
    assert choices(AutoMerge(), *["aaabb"] * 9, merged="b") == ["b"] * 9


def test_auto_needs_the_advantage_in_a_row():
    steps = ["aaa", "aaa", "aaa", "a.", "aaa", "aaa", "aaa", "bbb", "bbb", "aaa"]
    assert choices(AutoMerge(), *steps) == [None] * 10


def test_auto_swaps_and_unmerges():
    assert choices(AutoMerge(), *["bbb"] * 4, merged="a")[-1] == "b"
    assert choices(AutoMerge(), *["...a"] * 4, merged="a")[-1] is None


def test_auto_keeps_what_is_merged_while_idle():
    assert choices(AutoMerge(), *[""] * 9, merged="a") == ["a"] * 9
