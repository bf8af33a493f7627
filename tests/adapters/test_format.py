"""Adapter files: what is saved is what is loaded, byte for byte, and a crash leaves no mixture."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.adapters import durable
from neuroada_serve.adapters.format import (
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    file_digest,
    make_adapter,
    save_adapter,
)
from neuroada_serve.adapters.reader import AdapterReader, load_adapter
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError, ShapeError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "0123456789abcdef" * 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def new_adapter(shapes, k=2, dtype=torch.bfloat16, seed=0, column_offset=0, **config):
    """A random adapter for modules name -> (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (d_out, d_in) in shapes.items():
        index = torch.rand(d_out, d_in, generator=generator).topk(k).indices.int() + column_offset
        values = torch.randn(d_out, k, generator=generator)
        parts[name] = ModuleBypass(index, values.to(dtype))
    fields = {
        "base_model_name_or_path": "base",
        "base_fingerprint": FINGERPRINT,
        "k": k,
        "target_modules": tuple(shapes),
    }
    return make_adapter(AdapterConfig(**fields | config), parts)


def assert_equal(adapter, other):
    assert adapter.config == other.config
    assert adapter.digest == other.digest
    assert adapter.modules.keys() == other.modules.keys()
    for name, part in adapter.modules.items():
        assert torch.equal(part.index, other.modules[name].index)
        assert part.bypass.dtype == other.modules[name].bypass.dtype
        assert torch.equal(part.bypass, other.modules[name].bypass)


SHAPES = {"a.q_proj": (3, 5), "a.up_proj": (7, 4)}
SPEC = BaseSpec("base", FINGERPRINT, SHAPES)


# --- round trip ------------------------------------------------------------------------------


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


def data_of(folder: Path) -> bytes:
    """Return the bytes behind the header of a weights file."""
    file = (folder / WEIGHTS).read_bytes()
    return file[8 + int.from_bytes(file[:8], "little") :]


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


# --- header ----------------------------------------------------------------------------------


def test_header_tells_what_an_adapter_is_without_its_values(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    size = len((tmp_path / WEIGHTS).read_bytes()) - len(data_of(tmp_path))
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.seek(size)
        file.write(b"\0" * len(data_of(tmp_path)))
    header = AdapterReader(SPEC).header(tmp_path)
    assert (header.digest, header.nnz) == (adapter.digest, adapter.nnz)
    assert header.config == adapter.config
    assert header.modules == sorted(SHAPES)
    with pytest.raises(AdapterFormatError, match="repeats a column"):  # of zeros
        AdapterReader(SPEC).adapter(header)


def test_digest_is_the_same_whether_the_header_says_it_or_the_data_is_read(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "one")
    tensors = safetensors.torch.load_file(tmp_path / "one" / WEIGHTS)
    metadata = {"format": "neuroada", "format_version": "1", "base_fingerprint": FINGERPRINT}
    safetensors.torch.save_file(tensors, tmp_path / "one" / WEIGHTS, metadata)
    header = AdapterReader(SPEC).header(tmp_path / "one")
    whole, data = (tmp_path / "one" / WEIGHTS).read_bytes(), data_of(tmp_path / "one")
    start = whole[: len(whole) - len(data)]
    assert header.digest == file_digest(start, hashlib.sha256(data).hexdigest())
    assert AdapterReader(SPEC).adapter(header).digest == header.digest


def test_every_flipped_byte_is_noticed(tmp_path):
    """T16: in the header it is an error or another adapter, in the data always an error."""
    save_adapter(new_adapter(SHAPES), tmp_path)
    good = AdapterReader(SPEC).adapter(AdapterReader(SPEC).header(tmp_path))
    reader, file = AdapterReader(SPEC), tmp_path / WEIGHTS
    whole = file.read_bytes()
    first_of_data = len(whole) - len(data_of(tmp_path))
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            adapter = reader.adapter(reader.header(tmp_path))
        except AdapterFormatError:
            continue
        assert at < first_of_data
        assert adapter.digest != good.digest


def test_known_header_does_not_vouch_for_another(tmp_path):
    """A reader that has checked a header once looks no further at equal ones, but at all others."""
    reader = AdapterReader(SPEC)
    for seed in (1, 2):
        save_adapter(new_adapter(SHAPES, seed=seed), tmp_path / "a")
        header = reader.header(tmp_path / "a")
        assert reader.adapter(header).digest == new_adapter(SHAPES, seed=seed).digest
    for kind in ({"k": 3}, {"base_fingerprint": "1" * 64}):
        save_adapter(new_adapter(SHAPES, **kind), tmp_path / "b")
        (tmp_path / "b" / WEIGHTS).write_bytes((tmp_path / "a" / WEIGHTS).read_bytes())
        with pytest.raises(AdapterFormatError):
            reader.header(tmp_path / "b")


def test_file_replaced_after_its_header_was_read_is_not_taken_for_it(tmp_path):
    reader = AdapterReader(SPEC)
    save_adapter(new_adapter(SHAPES, seed=1), tmp_path)
    header = reader.header(tmp_path)
    save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    with pytest.raises(AdapterFormatError, match="has changed; load it again"):
        reader.adapter(header)


# --- digest ----------------------------------------------------------------------------------


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


# --- the base --------------------------------------------------------------------------------


def test_other_base_is_refused_by_name_with_the_fix(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path)
    other = BaseSpec("other", "f" * 64, SHAPES)
    with pytest.raises(AdapterFormatError, match=r"\('base', .* one \('other', .*; serve it on"):
        load_adapter(tmp_path, other)


def test_allow_other_base_accepts_the_fingerprint_but_not_the_shapes(tmp_path):
    adapter = new_adapter(SHAPES)
    save_adapter(adapter, tmp_path)
    assert_equal(
        load_adapter(tmp_path, BaseSpec("o", "f" * 64, SHAPES), allow_other_base=True), adapter
    )
    narrower = {name: (d_out, 2) for name, (d_out, _) in SHAPES.items()}
    with pytest.raises(AdapterFormatError, match="the base has d_in=2"):
        load_adapter(tmp_path, BaseSpec("o", "f" * 64, narrower), allow_other_base=True)


def test_targets_match_whole_name_parts(tmp_path):
    """'proj' is no ending of 'q_proj', and 'a' names the module a, not b.a.q_proj."""
    save_adapter(new_adapter({"x.q_proj": (2, 3)}, target_modules=("q_proj",)), tmp_path)
    wide = {"x.q_proj": (2, 3), "x.my_q_proj": (2, 3), "q_proj.x": (2, 3)}
    assert load_adapter(tmp_path, BaseSpec("base", FINGERPRINT, wide)).nnz == 4
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": ["proj"]}))
    with pytest.raises(AdapterFormatError, match="not among target_modules"):
        load_adapter(tmp_path)


def test_adapter_without_a_base_is_checked_but_for_the_base(tmp_path):
    save_adapter(new_adapter(SHAPES, column_offset=60_000), tmp_path)
    assert load_adapter(tmp_path).nnz == 20
    with pytest.raises(AdapterFormatError, match="column 6000., the base has d_in="):
        load_adapter(tmp_path, SPEC)


# --- folders ---------------------------------------------------------------------------------


def test_links_within_the_root_are_followed(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert load_adapter(tmp_path / "current", SPEC, root=tmp_path).nnz == 20


def test_links_are_followed_anywhere_without_a_root(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "v1")
    (tmp_path / "link").mkdir()
    for file in (CONFIG, WEIGHTS):
        (tmp_path / "link" / file).symlink_to(tmp_path / "v1" / file)
    assert load_adapter(tmp_path / "link", SPEC).nnz == 20
    with pytest.raises(AdapterFormatError, match="link out of the adapter directory"):
        load_adapter(tmp_path / "link", SPEC, root=tmp_path / "link")


def test_missing_folder_says_what_it_must_hold(tmp_path):
    with pytest.raises(AdapterNotFoundError, match=f"must hold {CONFIG} and {WEIGHTS}"):
        load_adapter(tmp_path / "absent")


def test_files_can_be_read_by_others(tmp_path):
    save_adapter(new_adapter(SHAPES), tmp_path / "deep" / "er")
    for file in (tmp_path / "deep" / "er").iterdir():
        assert file.stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- crashes ---------------------------------------------------------------------------------


def fail_at(monkeypatch, name: str, nth: int, error: BaseException) -> None:
    """Make the nth call of os.NAME in `durable` raise."""
    calls, real = [], getattr(os, name)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(durable.os, name, failing)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_before_the_first_rename_leaves_the_old_adapter(name, error, monkeypatch, tmp_path):
    old = new_adapter(SHAPES, seed=1)
    save_adapter(old, tmp_path)
    fail_at(monkeypatch, name, 1, error)
    with pytest.raises(type(error)):
        save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    monkeypatch.undo()
    assert_equal(load_adapter(tmp_path, SPEC), old)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("change", ["k", "base", "modules"])
def test_crash_between_the_two_files_of_unlike_adapters_is_refused(change, monkeypatch, tmp_path):
    new = {
        "k": new_adapter(SHAPES, k=3),
        "base": new_adapter(SHAPES, base_fingerprint="1" * 64),
        "modules": new_adapter({"a.q_proj": (3, 5)}),
    }[change]
    save_adapter(new_adapter(SHAPES, seed=1), tmp_path)
    fail_at(monkeypatch, "replace", 2, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new, tmp_path)
    monkeypatch.undo()
    with pytest.raises(AdapterFormatError):
        load_adapter(tmp_path)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


def test_crash_between_the_two_files_of_like_adapters_gives_values_of_one(monkeypatch, tmp_path):
    """Same base, k and modules: the config in place describes the new values as well."""
    old, new = new_adapter(SHAPES, seed=1), new_adapter(SHAPES, seed=2)
    save_adapter(old, tmp_path)
    fail_at(monkeypatch, "replace", 2, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert_equal(load_adapter(tmp_path, SPEC), new)
    assert files_in(tmp_path) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("nth", [1, 2])
def test_crash_in_the_first_save_leaves_no_adapter(nth, monkeypatch, tmp_path):
    fail_at(monkeypatch, "replace", nth, OSError(errno.EIO, "I/O error"))
    with pytest.raises(OSError, match="I/O error"):
        save_adapter(new_adapter(SHAPES), tmp_path)
    monkeypatch.undo()
    with pytest.raises(AdapterNotFoundError):
        load_adapter(tmp_path)
    assert not [name for name in files_in(tmp_path) if name.startswith(".")]


def test_data_is_on_disk_before_it_gets_its_name(monkeypatch, tmp_path):
    """fsync the file, rename it, fsync the directory; for the weights, then for the config."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            durable.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))
        )
    save_adapter(new_adapter(SHAPES), tmp_path)
    assert calls == ["fsync", "replace", "fsync"] * 2


def test_reader_beside_a_writer_sees_an_old_or_a_new_file(monkeypatch, tmp_path):
    """The adapter loads just before each rename: nothing is written in place."""
    old = new_adapter(SHAPES, seed=1)
    save_adapter(old, tmp_path)
    real, seen = os.replace, []

    def reading(source, target):
        seen.append(load_adapter(tmp_path, SPEC))
        real(source, target)

    monkeypatch.setattr(durable.os, "replace", reading)
    save_adapter(new_adapter(SHAPES, seed=2), tmp_path)
    assert_equal(seen[0], old)
    assert len(seen) == 2


# --- in memory -------------------------------------------------------------------------------


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
