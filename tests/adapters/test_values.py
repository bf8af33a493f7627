"""Adapters as flat vectors: read, shared, mixed."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
    save_adapter,
)
from neuroada_serve.adapters.reader import AdapterReader
from neuroada_serve.adapters.values import AdapterValues, FlatOrder, ValuesReader
from neuroada_serve.errors import AdapterFormatError

SITES = {"m.q": {"m.q": 4, "m.k": 2, "m.v": 2}}
SHAPES = {"m.q": (4, 12), "m.k": (2, 12), "m.v": (2, 12), "m.o": (5, 9)}
BASE = BaseSpec("base", "0" * 64, SHAPES)


def new_reader(dtype: torch.dtype = torch.bfloat16) -> ValuesReader:
    order = FlatOrder(SITES, {name: d_out for name, (d_out, _) in SHAPES.items()})
    return ValuesReader(order, BASE, dtype)


def new_adapter(
    seed=0, k=2, index_seed=0, modules=tuple(SHAPES), dtype=torch.bfloat16, scale=1.0
) -> Adapter:
    parts = {}
    for name in modules:
        d_out, d_in = SHAPES[name]
        columns = torch.Generator().manual_seed(index_seed)
        index = torch.rand(d_out, d_in, generator=columns).argsort(1)[:, :k].int()
        values = torch.randn(d_out, k, generator=torch.Generator().manual_seed(seed)) * scale
        parts[name] = ModuleBypass(index, values.to(dtype))
    return make_adapter(AdapterConfig("base", "0" * 64, k, tuple(modules)), parts)


def dense(values: AdapterValues) -> dict[str, torch.Tensor]:
    """Module -> [d_out, d_in] of what it adds; columns that are kept twice would be lost."""
    layout, found = values.table.layout, {}
    for name, place in layout.of_module().items():
        matrix = torch.zeros(SHAPES[name])
        index = values.table.index[place].view(-1, layout.k).long()
        assert all(len(set(row)) == len(row) for row in index.tolist())
        found[name] = matrix.scatter_(1, index, values.values[place].float().view(-1, layout.k))
    return found


def test_entries_lie_site_by_site_and_modules_in_the_order_of_their_rows():
    adapter = new_adapter()
    values = new_reader().of(adapter)
    assert list(values.table.layout.d_outs) == ["m.o", "m.q", "m.k", "m.v"]
    stretches = values.table.layout.stretches
    assert [(s.site, s.first, s.rows, s.offset) for s in stretches] == [
        ("m.o", 0, 5, 0),
        ("m.q", 0, 8, 10),
    ]
    for name, place in values.table.layout.of_module().items():
        assert torch.equal(values.values[place].view(-1, 2), adapter.modules[name].bypass)
        assert torch.equal(values.table.index[place].view(-1, 2), adapter.modules[name].index)


def test_modules_with_a_gap_between_are_two_stretches():
    layout = new_reader().of(new_adapter(modules=("m.q", "m.v"))).table.layout
    assert [(s.first, s.rows, s.modules) for s in layout.stretches] == [
        (0, 4, ("m.q",)),
        (6, 2, ("m.v",)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_from_files_equals_taken_from_memory(dtype, tmp_path):
    adapter, files, reader = new_adapter(dtype=dtype), AdapterReader(BASE), new_reader()
    save_adapter(adapter, tmp_path)
    values = reader.read(files.header(tmp_path), files)
    expected = reader.of(adapter)
    assert values.table is expected.table
    assert values.values.dtype == dtype
    assert torch.equal(values.values, expected.values)


def test_equal_columns_are_one_table_while_anybody_has_it():
    reader = new_reader()
    one, two = reader.of(new_adapter(1)), reader.of(new_adapter(2))
    other, smaller = reader.of(new_adapter(index_seed=1)), reader.of(new_adapter(k=1))
    assert one.table is two.table
    assert len({id(v.table) for v in (one, other, smaller)}) == 3
    assert len(reader._tables) == 3
    del one, two, other, smaller
    gc.collect()
    assert len(reader._tables) == 0


@pytest.mark.parametrize(
    ("column", "fault"), [(-1, "column -1"), (12, "d_in=12"), ("twice", "repeats a column")]
)
def test_bad_columns_are_refused_by_module(column, fault, tmp_path):
    adapter = new_adapter()
    index = adapter.modules["m.k"].index
    index[1, 0] = index[1, 1] if column == "twice" else column
    with pytest.raises(AdapterFormatError, match=f"m.k.index .*{fault}"):
        new_reader().of(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_module(value):
    adapter = new_adapter()
    adapter.modules["m.v"].bypass[0, 1] = value
    with pytest.raises(AdapterFormatError, match="m.v.bypass has NaN or infinite"):
        new_reader().of(adapter)


def test_damaged_file_is_refused(tmp_path):
    files = AdapterReader(BASE)
    save_adapter(new_adapter(), tmp_path)
    header = files.header(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[header.tensors["m.o.bypass"].start] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="is damaged"):
        new_reader().read(header, files)


# --- mixes -----------------------------------------------------------------------------------

KINDS = st.tuples(
    st.integers(0, 9),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 1),
    st.sampled_from([tuple(SHAPES), ("m.q",), ("m.k", "m.o")]),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KINDS, st.floats(-2, 2)), min_size=1, max_size=4))
def test_mix_is_the_weighted_sum_whatever_the_tables(parts):
    reader = new_reader(torch.float32)
    values = [(reader.of(new_adapter(*kind)), weight) for kind, weight in parts]
    mixed = dense(reader.mix(values))
    for name, shape in SHAPES.items():
        total = sum((w * dense(v).get(name, torch.zeros(shape)) for v, w in values))
        torch.testing.assert_close(mixed.get(name, torch.zeros(shape)), total)


def test_mix_on_one_table_keeps_it():
    reader = new_reader()
    one, two = reader.of(new_adapter(1)), reader.of(new_adapter(2))
    mixed = reader.mix([(one, 0.5), (two, -1.0)])
    assert mixed.table is one.table
    assert mixed.values.dtype == torch.float32


def test_mix_of_nested_tables_is_on_the_larger():
    """Magnitude selection: the index of k=1 is the beginning of that of k=5."""
    reader = new_reader()
    small, large = reader.of(new_adapter(1, k=1)), reader.of(new_adapter(2, k=5))
    assert reader.mix([(small, 1.0), (large, 1.0)]).table is large.table


def test_mix_that_could_overflow_is_refused():
    reader = new_reader(torch.float16)
    values = reader.of(new_adapter(scale=9000.0, dtype=torch.float32))
    with pytest.raises(AdapterFormatError, match="overflows torch.float16"):
        reader.mix([(values, 100.0)])
