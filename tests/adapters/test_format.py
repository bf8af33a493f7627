"""Adapter files: what is saved is what is loaded, byte for byte, and a crash leaves no mixture."""

import hashlib
import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters.format import (
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    make_adapter,
    save_adapter,
)
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.errors import AdapterFormatError, ShapeError
from tests.support.adapter_files import (
    CONFIG,
    FINGERPRINT,
    SHAPES,
    SPEC,
    WEIGHTS,
    assert_equal,
    data_of,
    new_adapter,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


# --- round trip -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_loaded_equals_saved(tmp_path_factory, data):
    k = data.draw(st.integers(1, 9), "k")
    sizes = st.tuples(st.integers(1, 40), st.integers(k, 70))
    names = st.from_regex(r"[a-z0-9_]{1,5}(\.[a-zA-Z0-9_]{1,5}){0,3}", fullmatch=True)
    shapes = data.draw(st.dictionaries(names, sizes, min_size=1, max_size=4), "shapes")
    json_values = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    adapter = new_adapter(
        shapes,
        k,
        data.draw(st.sampled_from(DTYPES), "dtype"),
        seed=data.draw(st.integers(0, 99), "seed"),
        column_offset=data.draw(st.sampled_from([0, 70_000]), "column_offset"),
        metadata=data.draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
    )
    folder = tmp_path_factory.mktemp("round")
    save_adapter(adapter, folder)
    assert_equal(load_adapter(folder), adapter)
    spec = BaseSpec("base", FINGERPRINT, {m: (o, i + 70_000) for m, (o, i) in shapes.items()})
    assert_equal(load_adapter(folder, spec, root=folder), adapter)
    written = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    save_adapter(load_adapter(folder), folder)
    assert [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)] == written


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_survive_bit_for_bit(dtype, tmp_path):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 2, info.eps, -1.0]
    part = ModuleBypass(torch.arange(8).int().view(1, 8), torch.tensor([values], dtype=dtype))
    config = AdapterConfig("base", FINGERPRINT, 8, ("a",))
    save_adapter(make_adapter(config, {"a": part}), tmp_path)
    loaded = load_adapter(tmp_path).modules["a"].bypass
    assert torch.equal(loaded.view(torch.uint8), part.bypass.view(torch.uint8))


def test_safetensors_library_reads_our_files(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == {f"{m}.{part}" for m in SHAPES for part in ("index", "bypass")}
    for name, part in adapter.modules.items():
        assert torch.equal(tensors[f"{name}.index"].int(), part.index)
        assert torch.equal(tensors[f"{name}.bypass"], part.bypass)
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {
            "format": "neuroada",
            "format_version": "1",
            "base_fingerprint": FINGERPRINT,
            "data_sha256": hashlib.sha256(data_of(tmp_path)).hexdigest(),
        }


def test_files_of_the_safetensors_library_load(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    del metadata["data_sha256"]  # their tensors lie in another order
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, metadata)
    loaded = load_adapter(tmp_path, SPEC)
    for name, part in adapter.modules.items():
        assert torch.equal(loaded.modules[name].bypass, part.bypass)


@pytest.mark.parametrize(("highest", "dtype"), [(65_535, "U16"), (65_536, "I32")])
def test_columns_are_uint16_where_they_fit(highest, dtype, tmp_path):
    part = ModuleBypass(torch.tensor([[0, highest]]).int(), torch.ones(1, 2))
    config = AdapterConfig("base", FINGERPRINT, 2, ("a",))
    save_adapter(make_adapter(config, {"a": part}), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["a.index"]["dtype"] == dtype
    spec = BaseSpec("base", FINGERPRINT, {"a": (1, highest + 1)})
    assert load_adapter(tmp_path, spec).modules["a"].index.tolist() == [[0, highest]]


def test_tensors_in_the_file_are_aligned(tmp_path):
    part = ModuleBypass(torch.zeros(3, 1).int(), torch.ones(3, 1, dtype=torch.float32))
    config = AdapterConfig("base", FINGERPRINT, 1, ("a", "b"))
    save_adapter(make_adapter(config, {"a": part, "b": part}), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name in ("a.bypass", "b.bypass"):
        assert header[name]["data_offsets"][0] % 4 == 0


# --- digest ---------------------------------------------------------------------------------------


def test_equal_adapters_have_equal_files_and_digests(tmp_path):
    one, two = new_adapter(SHAPES), new_adapter(SHAPES)
    assert one.digest == two.digest
    for name, adapter in (("one", one), ("two", two)):
        save_adapter(adapter, tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_order_of_modules_does_not_change_the_digest():
    adapter = new_adapter(SHAPES)
    modules = dict(reversed(adapter.modules.items()))
    assert make_adapter(adapter.config, modules).digest == adapter.digest


def test_digest_changes_with_values_columns_and_base():
    digests = {
        new_adapter(SHAPES).digest,
        new_adapter(SHAPES, seed=1).digest,
        new_adapter(SHAPES, column_offset=1).digest,
        new_adapter(SHAPES, dtype=torch.float16).digest,
        new_adapter(SHAPES, base_fingerprint="1" * 64).digest,
    }
    assert len(digests) == 5


def test_strided_tensors_are_saved_as_what_they_show(tmp_path):
    index = torch.arange(12).int().view(2, 6)[:, ::2]
    bypass = torch.arange(12.0).view(6, 2).t()[:, ::2]
    config = AdapterConfig("base", FINGERPRINT, 3, ("a",))
    save_adapter(make_adapter(config, {"a": ModuleBypass(index, bypass)}), tmp_path)
    loaded = load_adapter(tmp_path).modules["a"]
    assert torch.equal(loaded.index, index)
    assert torch.equal(loaded.bypass, bypass)


def test_loaded_adapter_does_not_depend_on_its_files(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    for file in (CONFIG, WEIGHTS):
        size = (tmp_path / file).stat().st_size
        (tmp_path / file).write_bytes(bytes(size))
        os.truncate(tmp_path / file, 0)
    assert_equal(loaded, adapter)


# --- in memory ------------------------------------------------------------------------------------


def test_index_and_bypass_of_other_shapes_name_both():
    with pytest.raises(ShapeError, match=r"index \(3, 2\) and bypass \(3, 1\)"):
        ModuleBypass(torch.zeros(3, 2).int(), torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"\[d_out, k\]"):
        ModuleBypass(torch.zeros(3).int(), torch.zeros(3))


@pytest.mark.parametrize(
    ("index", "bypass", "match"),
    [
        ([[0, 0]], [[1.0, 1.0]], "repeats a column in row 0"),
        ([[0, -1]], [[1.0, 1.0]], "column -1"),
        ([[0, 1]], [[1.0, float("nan")]], "NaN"),
        ([[0]], [[1.0]], "k=1, the config says 2|expected .d_out, k=2"),
    ],
)
def test_make_adapter_refuses_what_load_would(index, bypass, match):
    part = ModuleBypass(torch.tensor(index).int(), torch.tensor(bypass))
    with pytest.raises(AdapterFormatError, match=match):
        make_adapter(AdapterConfig("base", FINGERPRINT, 2, ("a",)), {"a": part})


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        ({"a": (torch.int32, torch.float64)}, "dtype"),
        ({"b": (torch.int32, torch.float32)}, "not among target_modules"),
        ({"a b": (torch.int32, torch.float32)}, "unexpected tensor"),
        ({}, "has no tensors"),
    ],
)
def test_make_adapter_refuses_what_could_not_be_loaded_again(modules, match):
    parts = {
        name: ModuleBypass(torch.zeros(2, 1, dtype=i), torch.zeros(2, 1, dtype=v))
        for name, (i, v) in modules.items()
    }
    with pytest.raises(AdapterFormatError, match=match):
        make_adapter(AdapterConfig("base", FINGERPRINT, 1, ("a",)), parts)
