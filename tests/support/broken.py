"""Broken adapter folders by kind: every way we know in which an adapter's files can be wrong.

Each kind takes a fresh valid folder (k=2, uint16 columns, bfloat16 values, as `save_adapter` writes
it) apart and puts it together wrongly. The files are written here byte by byte, so that anything
can be expressed, also what no library would write.
"""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.errors import AdapterError, AdapterFormatError, AdapterNotFoundError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OTHER_BASE = "f" * 64

Break = Callable[[Path, BaseSpec], Path | None]


@dataclass(frozen=True)
class Broken:
    """One kind: `apply` breaks the folder and returns the path to load; the error must match."""

    match: str
    error: type[AdapterError]
    _break: Break

    def apply(self, folder: Path, spec: BaseSpec) -> Path:
        """Break the valid adapter in `folder`. May write beside the folder's parent."""
        return self._break(folder, spec) or folder


BROKEN: dict[str, Broken] = {}


def kind(match: str, error: type[AdapterError] = AdapterFormatError) -> Callable[[Break], Break]:
    """Add the decorated function to the catalogue, under its own name."""

    def add(function: Break) -> Break:
        _add(function.__name__, match, function, error)
        return function

    return add


def _add(name: str, match: str, function: Break, error: type[AdapterError] = AdapterFormatError):
    assert name not in BROKEN
    BROKEN[name] = Broken(match, error, function)


# --- a safetensors file in parts -------------------------------------------------------------


@dataclass
class Part:
    """One tensor as it is stored."""

    dtype: str
    shape: list[Any]
    data: bytes

    @property
    def array(self) -> np.ndarray:
        """The data as numbers; bfloat16 as its 16 bits."""
        kinds = {"U16": "<u2", "BF16": "<u2", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
        return np.frombuffer(self.data, kinds[self.dtype]).reshape(self.shape).copy()


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, data: bytes) -> bytes:
    """A safetensors file; the header may be anything, also text or bytes that are no JSON."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(header).to_bytes(8, "little") + header + data


def read_parts(folder: Path) -> tuple[dict[str, Part], dict[str, str]]:
    header, data = parse((folder / WEIGHTS).read_bytes())
    metadata = header.pop("__metadata__")
    parts = {
        name: Part(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    return parts, metadata


def write_parts(folder: Path, parts: dict[str, Part], metadata: Any) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, part in parts.items():
        stop = start + len(part.data)
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, stop]}
        start = stop
    (folder / WEIGHTS).write_bytes(join(header, b"".join(p.data for p in parts.values())))


def edit_parts(folder: Path, change: Callable[[dict[str, Part], dict[str, Any]], Any]) -> None:
    parts, metadata = read_parts(folder)
    change(parts, metadata)
    write_parts(folder, parts, metadata)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = parse((folder / WEIGHTS).read_bytes())
    change(header)
    (folder / WEIGHTS).write_bytes(join(header, data))


def edit_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of adapter_config.json; the value `...` takes the key out."""
    raw = json.loads((folder / CONFIG).read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(raw))


def set_entry(
    folder: Path, name: str, row: int, column: int, value: float, dtype: str | None = None
) -> None:
    """Overwrite one number of a tensor, which is first stored as `dtype` where that is given."""

    def change(parts: dict[str, Part], metadata: dict[str, Any]) -> None:
        if dtype is not None:
            parts[name] = cast(parts[name], dtype)
        array = parts[name].array
        array[row, column] = bfloat16_bits(value) if parts[name].dtype == "BF16" else value
        parts[name] = Part(parts[name].dtype, parts[name].shape, array.tobytes())

    edit_parts(folder, change)


def cast(part: Part, dtype: str) -> Part:
    array = part.array
    if part.dtype == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    kinds = {"I32": "<i4", "F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U16": "<u2"}
    return Part(dtype, part.shape, array.astype(kinds[dtype]).tobytes())


def bfloat16_bits(value: float) -> int:
    return int(np.float32(value).view("<u4")) >> 16


def first_module(spec: BaseSpec) -> str:
    return sorted(spec.shapes)[0]


def outside(folder: Path) -> Path:
    """A directory that is not under the folder's root."""
    directory = folder.parent.parent / f"outside-{folder.parent.name}-{folder.name}"
    directory.mkdir(exist_ok=True)
    return directory


# --- the base --------------------------------------------------------------------------------


@kind("trained on another base")
def other_base(folder, spec):
    edit_config(folder, base_fingerprint=OTHER_BASE)
    edit_parts(folder, lambda parts, metadata: metadata.update(base_fingerprint=OTHER_BASE))


@kind("__metadata__ base_fingerprint is 'f+'")
def weights_of_another_base(folder, spec):
    edit_parts(folder, lambda parts, metadata: metadata.update(base_fingerprint=OTHER_BASE))


@kind(r"trained on another base.*|__metadata__ base_fingerprint")
def config_of_another_base(folder, spec):
    edit_config(folder, base_fingerprint=OTHER_BASE)


# --- k ---------------------------------------------------------------------------------------

for _name, _k, _match in (
    ("k_below_the_tensors", 1, r"shape \[\d+, 2\], expected \[d_out, k=1\]"),
    ("k_above_the_tensors", 3, r"shape \[\d+, 2\], expected \[d_out, k=3\]"),
    ("k_zero", 0, "k must be at least 1, is 0"),
    ("k_negative", -2, "k must be at least 1, is -2"),
    ("k_true", True, "k must be of type int, not bool"),
    ("k_float", 2.0, "k must be of type int, not float"),
    ("k_text", "2", "k must be of type int, not str"),
    ("k_null", None, "k must be of type int, not NoneType"),
    ("k_huge", 2**70, "expected .d_out, k=1180591620717411303424"),
):
    _add(_name, _match, lambda folder, spec, k=_k: edit_config(folder, k=k))


@kind("adapter_config.json is not valid JSON: Exceeds the limit")
def k_of_five_thousand_digits(folder, spec):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"k": 2', f'"k": {"9" * 5000}'))


@kind(r"k=\d+ is above d_in=\d+ of ")
def k_above_d_in(folder, spec):
    k = min(d_in for _, d_in in spec.shapes.values()) + 1

    def change(parts, metadata):
        for module, (d_out, _) in spec.shapes.items():
            columns = np.tile(np.arange(k, dtype="<u2"), (d_out, 1))
            parts[f"{module}.index"] = Part("U16", [d_out, k], columns.tobytes())
            parts[f"{module}.bypass"] = Part("BF16", [d_out, k], bytes(2 * d_out * k))

    edit_config(folder, k=k)
    edit_parts(folder, change)


# --- columns and values ----------------------------------------------------------------------


@kind(r"\.index has column (\d+), the base has d_in=\1")
def column_one_too_high(folder, spec):
    module = first_module(spec)
    set_entry(folder, f"{module}.index", 0, 0, spec.shapes[module][1])


for _name, _value, _dtype, _match in (
    ("column_65535", 65535, "U16", r"\.index has column 65535, the base has d_in="),
    ("column_huge", 2**31 - 1, "I32", r"\.index has column 2147483647, the base has d_in="),
    ("column_minus_one", -1, "I32", r"\.index has column -1, columns start at 0"),
    ("column_lowest", -(2**31), "I32", r"\.index has column -2147483648, columns start at 0"),
):
    _add(
        _name,
        _match,
        lambda folder, spec, value=_value, dtype=_dtype: set_entry(
            folder, f"{first_module(spec)}.index", 1, 1, value, dtype
        ),
    )


@kind(r"\.index repeats a column in row 0")
def column_twice_in_the_first_row(folder, spec):
    _repeat_column(folder, first_module(spec), 0)


@kind(r"\.index repeats a column in row [1-9]\d*")
def column_twice_in_the_last_row(folder, spec):
    module = sorted(spec.shapes)[-1]
    _repeat_column(folder, module, spec.shapes[module][0] - 1)


def _repeat_column(folder, module, row):
    parts, _ = read_parts(folder)
    set_entry(folder, f"{module}.index", row, 1, parts[f"{module}.index"].array[row, 0])


for _name, _value, _dtype in (
    ("nan", float("nan"), "BF16"),
    ("plus_infinity", float("inf"), "BF16"),
    ("minus_infinity", float("-inf"), "BF16"),
    ("nan_float32", float("nan"), "F32"),
    ("infinity_float16", float("inf"), "F16"),
):
    _add(
        _name,
        r"\.bypass has NaN or infinite values",
        lambda folder, spec, value=_value, dtype=_dtype: set_entry(
            folder,
            f"{first_module(spec)}.bypass",
            -1,
            -1,
            value,
            None if dtype == "BF16" else dtype,
        ),
    )


# --- cut off, or too long --------------------------------------------------------------------

for _name, _match, _change in (
    ("empty_file", "has 0 bytes", lambda data: b""),
    ("seven_bytes", "has 7 bytes", lambda data: data[:7]),
    ("header_length_only", "cut off inside its header", lambda data: data[:8]),
    ("cut_in_the_header", "cut off inside its header", lambda data: data[:100]),
    ("cut_after_the_header", "is cut off", lambda data: join(parse(data)[0], b"")),
    ("cut_in_the_data", r"is cut off: .* \d+ are there", lambda data: data[:-1000]),
    ("cut_by_one_byte", "is cut off", lambda data: data[:-1]),
    ("one_byte_too_many", "has extra bytes", lambda data: data + b"\0"),
    ("another_file_behind", "has extra bytes|at most", lambda data: data + data),
    ("one_byte_in_front", "cut off inside its header|claims a", lambda data: b"\1" + data),
    ("all_zeros", "header .* is not valid JSON", lambda data: bytes(len(data))),
):
    _add(_name, _match, lambda folder, spec, change=_change: edit_bytes(folder, change))


@kind(r"has \d+ bytes, at most \d+ expected")
def five_gigabytes(folder, spec):
    os.truncate(folder / WEIGHTS, 5 << 30)  # sparse


# --- other formats under our name ------------------------------------------------------------


def _torch_save() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, file)
    return file.getvalue()


def _numpy_save(save: Callable[..., Any]) -> bytes:
    file = io.BytesIO()
    save(file, np.zeros(3))
    return file.getvalue()


for _name, _match, _make in (
    ("pickle", "looks like a pickle", lambda: pickle.dumps({"w": [0.0] * 9})),
    ("torch_save", "looks like a zip archive", _torch_save),
    ("npz", "looks like a zip archive", lambda: _numpy_save(np.savez)),
    ("npy", "looks like a NumPy array", lambda: _numpy_save(np.save)),
    ("gguf", "looks like a GGUF model", lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(99)),
    ("html_page", "claims a header of", lambda: b"<!doctype html><title>404</title>"),
    ("lfs_pointer", "claims a header of", lambda: b"version https://git-lfs.github.com/spec/v1\n"),
    ("shell_script", "claims a header of", lambda: b"#!/bin/sh\nexit 0\n"),
    ("gzip", "cut off inside its header", lambda: b"\x1f\x8b\x08" + bytes(5) + b"\xff" * 20),
):
    _add(
        f"{_name}_renamed",
        _match,
        lambda folder, spec, make=_make: edit_bytes(folder, lambda data: make()),
    )


# --- the header ------------------------------------------------------------------------------

for _name, _match, _header in (
    ("header_not_json", "header .* is not valid JSON", "{'single': 'quotes'}"),
    ("header_not_utf8", "header .* is not UTF-8", b'{"\xff\xfe": 1}'),
    ("header_utf16", "header .* is not (UTF-8|valid JSON)", '{"a": 1}'.encode("utf-16")),
    ("header_empty", "header .* is not valid JSON", b""),
    ("header_list", "header .* must be a JSON object, not list", "[]"),
    ("header_number", "header .* must be a JSON object, not int", "7"),
    ("header_null", "header .* must be a JSON object, not NoneType", "null"),
    ("header_twice", "header .* is not valid JSON: Extra data", "{}{}"),
    ("header_nested_too_deeply", "nested too deeply|not valid JSON", '{"a":' + "[" * 300_000),
    ("header_objects_too_deep", "nested too deeply|not valid JSON", '{"a":' * 150_000),
    ("header_nan", "header .* NaN is not JSON", '{"a": NaN}'),
    ("header_infinity", "header .* -Infinity is not JSON", '{"a": -Infinity}'),
    ("header_without_tensors", "has extra bytes", "{}"),
    ("header_key_twice", "key 'a' occurs twice", '{"a": 1, "a": 2}'),
    ("header_of_a_mebibyte_of_spaces", "claims a header of", "{}" + " " * (1 << 20)),
    ("header_far_too_long", r"has \d+ bytes, at most \d+ expected", "{}" + " " * (9 << 20)),
):
    _add(
        _name,
        _match,
        lambda folder, spec, header=_header: edit_bytes(
            folder, lambda data: join(header, parse(data)[1])
        ),
    )


@kind("key 'a[0-9]' occurs twice")
def header_of_repeated_keys(folder, spec):
    pairs = ",".join(f'"a{i % 10}":1' for i in range(120_000))
    edit_bytes(folder, lambda data: join("{" + pairs + "}", b""))


@kind("key '.+' occurs twice")
def header_of_pairs_of_keys(folder, spec):
    pairs = ",".join(f'"{i // 2:x}":1' for i in range(90_000))
    edit_bytes(folder, lambda data: join("{" + pairs + "}", b""))


@kind("occurs twice")
def header_repeats_a_tensor(folder, spec):
    def change(data):
        header, rest = parse(data)
        name = f"{first_module(spec)}.bypass"
        text = json.dumps(header)
        return join(f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}', rest)

    edit_bytes(folder, change)


@kind("occurs twice")
def metadata_key_twice(folder, spec):
    edit_bytes(
        folder,
        lambda data: join(
            json.dumps(parse(data)[0]).replace('"format":', '"format": "pt", "format":'),
            parse(data)[1],
        ),
    )


for _name, _match, _length in (
    ("header_length_highest", "claims a header of 18446744073709551615 bytes", 2**64 - 1),
    ("header_length_2_63", "claims a header of 9223372036854775808 bytes", 2**63),
    ("header_length_100_mb", "claims a header of 100000000 bytes", 100_000_000),
    ("header_length_too_short", "header .* is not valid JSON", 50),
    ("header_length_zero", "header .* is not valid JSON", 0),
):
    _add(
        _name,
        _match,
        lambda folder, spec, length=_length: edit_bytes(
            folder, lambda data: length.to_bytes(8, "little") + data[8:]
        ),
    )

for _name, _match, _num in (
    ("thirty_thousand_empty_tensors", "claims a header of|at most", 30_000),
    ("nine_thousand_empty_tensors", "9000 tensors, at most 8192", 9_000),
    ("eight_thousand_empty_tensors", "unexpected tensor", 8_000),
):
    _add(
        _name,
        _match,
        lambda folder, spec, num=_num: write_parts(
            folder, {f"{i:x}": Part("F32", [0], b"") for i in range(num)}, {}
        ),
    )


# --- metadata --------------------------------------------------------------------------------

for _name, _match, _changes in (
    ("metadata_other_format", "__metadata__ format is 'pt'", {"format": "pt"}),
    ("metadata_future_version", "__metadata__ format_version is '2'", {"format_version": "2"}),
    ("metadata_with_a_number", "__metadata__ must map strings", {"format_version": 1}),
    ("metadata_with_an_object", "__metadata__ must map strings", {"more": {"nested": "yes"}}),
    ("metadata_with_null", "__metadata__ must map strings", {"format": None}),
    ("metadata_fingerprint_cut", "__metadata__ base_fingerprint", {"base_fingerprint": "ab"}),
    (
        "metadata_with_control_characters",
        "__metadata__ format is ",
        {"format": "\x1b[31m\n[INFO] all is well\u202e"},
    ),
):
    _add(
        _name,
        _match,
        lambda folder, spec, changes=_changes: edit_parts(
            folder, lambda parts, metadata: metadata.update(changes)
        ),
    )


@kind("__metadata__ format is 'None'")
def metadata_missing(folder, spec):
    edit_header(folder, lambda header: header.pop("__metadata__"))


@kind("__metadata__ must map strings to strings")
def metadata_list(folder, spec):
    edit_header(folder, lambda header: header.update(__metadata__=["format", "neuroada"]))


# --- header entries --------------------------------------------------------------------------


def _edit_entry(**changes: Any) -> Break:
    """Change the first module's bypass entry in the header; the data stay."""

    def edit(folder: Path, spec: BaseSpec) -> None:
        def change(header: dict[str, Any]) -> None:
            entry = header[f"{first_module(spec)}.bypass"] | changes
            header[f"{first_module(spec)}.bypass"] = {
                key: value for key, value in entry.items() if value is not ...
            }

        edit_header(folder, change)

    return edit


_MALFORMED = r"header entry of tensor '.*\.bypass' is malformed"
for _name, _match, _changes in (
    ("dtype_unknown", r"\.bypass'? has dtype '?F8_E4M3'?, allowed", {"dtype": "F8_E4M3"}),
    ("dtype_not_ours", r"\.bypass'? has dtype '?F64'?, allowed", {"dtype": "F64"}),
    ("dtype_lower_case", r"\.bypass'? has dtype '?bf16'?, allowed", {"dtype": "bf16"}),
    ("dtype_of_control_characters", r"\.bypass'? has dtype .*, allowed", {"dtype": "\x1b[2J\nF32"}),
    ("dtype_number", _MALFORMED, {"dtype": 7}),
    ("dtype_missing", _MALFORMED, {"dtype": ...}),
    ("shape_missing", _MALFORMED, {"shape": ...}),
    ("offsets_missing", _MALFORMED, {"data_offsets": ...}),
    ("entry_with_another_key", _MALFORMED, {"stride": [1, 2]}),
    ("dim_negative", _MALFORMED, {"shape": [-32, -2]}),
    ("dim_float", _MALFORMED, {"shape": [32.0, 2]}),
    ("dim_true", _MALFORMED, {"shape": [32, True]}),
    ("dim_text", _MALFORMED, {"shape": ["32", 2]}),
    ("dim_2_63", _MALFORMED, {"shape": [2**63, 2]}),
    ("dim_of_many_digits", _MALFORMED, {"shape": [10**4000, 2]}),
    ("shape_number", _MALFORMED, {"shape": 64}),
    ("shape_null", _MALFORMED, {"shape": None}),
    ("shape_overflows_when_multiplied", "its shape needs", {"shape": [2**40, 2**40]}),
    ("shape_of_zero_and_huge", "its shape needs 0", {"shape": [0, 2**47]}),
    ("shape_of_a_thousand_dims", _MALFORMED, {"shape": [1] * 1000}),
    ("offsets_negative", _MALFORMED, {"data_offsets": [-8, 120]}),
    ("offsets_float", _MALFORMED, {"data_offsets": [0.0, 128.0]}),
    ("offsets_one", _MALFORMED, {"data_offsets": [0]}),
    ("offsets_three", _MALFORMED, {"data_offsets": [0, 64, 128]}),
    ("offsets_2_62", _MALFORMED, {"data_offsets": [2**62, 2**62 + 128]}),
    ("offsets_reversed", "occupies bytes 128..0, its shape needs", {"data_offsets": [128, 0]}),
    ("offsets_beyond_the_file", "occupies bytes", {"data_offsets": [10**9, 10**9 + 128]}),
):
    _add(_name, _match, _edit_entry(**_changes))


@kind(_MALFORMED)
def entry_not_an_object(folder, spec):
    edit_header(folder, lambda header: header.update({f"{first_module(spec)}.bypass": [1, 2]}))


@kind("occupies bytes")
def two_tensors_share_their_bytes(folder, spec):
    def change(header):
        name = first_module(spec)
        header[f"{name}.index"]["data_offsets"] = header[f"{name}.bypass"]["data_offsets"]

    edit_header(folder, change)


@kind("occupies bytes")
def tensors_overlap(folder, spec):
    def change(header):
        for entry in list(header.values())[2:]:
            entry["data_offsets"] = [offset - 2 for offset in entry["data_offsets"]]

    edit_header(folder, change)


@kind("occupies bytes")
def hole_between_tensors(folder, spec):
    def change(data):
        header, rest = parse(data)
        for entry in list(header.values())[2:]:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
        return join(header, rest + bytes(8))

    edit_bytes(folder, change)


@kind("occupies bytes")
def hole_in_front(folder, spec):
    def change(data):
        header, rest = parse(data)
        for entry in list(header.values())[1:]:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
        return join(header, bytes(8) + rest)

    edit_bytes(folder, change)


# --- tensors ---------------------------------------------------------------------------------


def _edit_module(change: Callable[[dict[str, Part], str], Any]) -> Break:
    """Change the tensors of the first module; the file is laid out correctly afterwards."""
    return lambda folder, spec: edit_parts(
        folder, lambda parts, metadata: change(parts, first_module(spec))
    )


def _recast(tensor: str, dtype: str) -> Break:
    def change(parts: dict[str, Part], module: str) -> None:
        parts[f"{module}.{tensor}"] = cast(parts[f"{module}.{tensor}"], dtype)

    return _edit_module(change)


def _reshape(tensor: str, shape: Callable[[list[int]], list[int]]) -> Break:
    """Another shape, and as many zero bytes as it needs."""

    def change(parts: dict[str, Part], module: str) -> None:
        part = parts[f"{module}.{tensor}"]
        part.shape = shape(part.shape)
        part.data = bytes(2 * int(np.prod(part.shape)))

    return _edit_module(change)


for _name, _match, _break in (
    ("index_float32", r"\.index'? has dtype '?F32'?, allowed: U16, I32", _recast("index", "F32")),
    ("index_float16", r"\.index'? has dtype '?F16'?, allowed: U16, I32", _recast("index", "F16")),
    ("index_int64", r"\.index'? has dtype '?I64'?, allowed", _recast("index", "I64")),
    ("bypass_int32", r"\.bypass'? has dtype '?I32'?, allowed: BF16", _recast("bypass", "I32")),
    ("bypass_float64", r"\.bypass'? has dtype '?F64'?, allowed", _recast("bypass", "F64")),
    ("bypass_uint16", r"\.bypass'? has dtype '?U16'?, allowed: BF16", _recast("bypass", "U16")),
    ("index_transposed", r"shape \[2, \d+\], expected", _reshape("index", lambda s: s[::-1])),
    ("bypass_transposed", r"shape \[2, \d+\], expected", _reshape("bypass", lambda s: s[::-1])),
    ("bypass_1d", r"shape \[\d+\], expected", _reshape("bypass", lambda s: [s[0] * s[1]])),
    ("bypass_3d", r"shape \[\d+, 2, 1\], expected", _reshape("bypass", lambda s: [*s, 1])),
    ("bypass_scalar", r"shape \[\], expected", _reshape("bypass", lambda s: [])),
    ("bypass_no_rows", r"shape \[0, 2\], expected", _reshape("bypass", lambda s: [0, s[1]])),
    ("bypass_no_columns", r"shape \[\d+, 0\], expected", _reshape("bypass", lambda s: [s[0], 0])),
    ("bypass_row_too_few", r"has \d+ rows, the base", _reshape("bypass", lambda s: [s[0] - 1, 2])),
    ("bypass_row_too_many", r"has \d+ rows, the base", _reshape("bypass", lambda s: [s[0] + 1, 2])),
    ("index_row_too_few", "differ in rows", _reshape("index", lambda s: [s[0] - 1, 2])),
    ("index_missing", r"\.index is missing", _edit_module(lambda p, m: p.pop(f"{m}.index"))),
    ("bypass_missing", r"\.bypass is missing", _edit_module(lambda p, m: p.pop(f"{m}.bypass"))),
):
    _add(_name, _match, _break)


@kind("module '.*' of the base has no tensors")
def module_missing(folder, spec):
    def change(parts, metadata):
        for tensor in ("index", "bypass"):
            del parts[f"{first_module(spec)}.{tensor}"]

    edit_parts(folder, change)


@kind("module '.*' of the base has no tensors")
def target_covers_more_modules_than_the_file(folder, spec):
    module = first_module(spec)
    edit_parts(
        folder,
        lambda parts, metadata: [parts.pop(n) for n in list(parts) if not n.startswith(module)],
    )
    edit_config(folder, target_modules=[module.rpartition(".")[2]])


@kind("is not among target_modules")
def module_not_targeted(folder, spec):
    edit_config(folder, target_modules=[first_module(spec)])


@kind("target module 'lm_head' has no tensors")
def target_without_tensors(folder, spec):
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    edit_config(folder, target_modules=[*targets, "lm_head"])


@kind("the base has no adaptable module 'lm_head'")
def module_that_the_base_lacks(folder, spec):
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    edit_config(folder, target_modules=[*targets, "lm_head"])
    _rename_copy(folder, first_module(spec), "lm_head")


@kind("the base has no adaptable module 'model.layers.99")
def layer_that_the_base_lacks(folder, spec):
    module = first_module(spec)
    _rename_copy(folder, module, f"model.layers.99.{module.rpartition('.')[2]}")


@kind("differ in rows|has \\d+ rows, the base")
def two_modules_swapped(folder, spec):
    """Tensors of one module under the name of another with other rows."""
    module = first_module(spec)
    other = next(m for m, shape in spec.shapes.items() if shape[0] != spec.shapes[module][0])

    def change(parts, metadata):
        for tensor in ("index", "bypass"):
            one, two = f"{module}.{tensor}", f"{other}.{tensor}"
            parts[one], parts[two] = parts[two], parts[one]

    edit_parts(folder, change)


def _rename_copy(folder: Path, module: str, name: str) -> None:
    def change(parts: dict[str, Part], metadata: dict[str, Any]) -> None:
        for tensor in ("index", "bypass"):
            parts[f"{name}.{tensor}"] = parts[f"{module}.{tensor}"]

    edit_parts(folder, change)


for _name, _tensor in (
    ("extra_tensor", "bias"),
    ("tensor_without_module", ".index"),
    ("tensor_named_index", "index"),
    ("tensor_name_empty", ""),
    ("tensor_name_climbs", "../../../etc/passwd.index"),
    ("tensor_name_absolute", "/etc/passwd.index"),
    ("tensor_name_with_newline", "model.a\n[INFO] adapter accepted.index"),
    ("tensor_name_with_escapes", "\x1b[31mmodel.index"),
    ("tensor_name_with_nul", "model\0.index"),
    ("tensor_name_right_to_left", "model.\u202exedni.index"),
    ("tensor_name_of_other_letters", "mod\u0435l.layers.index"),  # a Cyrillic e
    ("tensor_name_ends_in_newline", "model.layers\n.index"),
    ("tensor_name_double_dot", "model..layers.index"),
    ("tensor_name_long", "a" * 100_000 + "-.index"),
):
    _add(
        _name,
        "unexpected tensor",
        _edit_module(lambda p, m, name=_tensor: p.update({name: p[f"{m}.index"]})),
    )


@kind(r"has dtype '?F64'?, allowed")
def tensor_name_with_newline_and_wrong_dtype(folder, spec):
    part = Part("F64", [1], bytes(8))
    edit_parts(folder, lambda parts, metadata: parts.update({"a\n\x1b[31m[INFO] fine": part}))


@kind("occupies bytes")
def tensor_name_with_newline_and_wrong_size(folder, spec):
    part = Part("F32", [9], bytes(8))
    edit_parts(folder, lambda parts, metadata: parts.update({"a\n\x1b[31m[INFO] fine": part}))


# --- the config ------------------------------------------------------------------------------

for _name, _match, _changes in (
    ("config_auto_map", "unknown key 'auto_map'", {"auto_map": {"AutoModel": "evil.Model"}}),
    ("config_chat_template", "unknown key 'chat_template'", {"chat_template": "{{ x }}"}),
    ("config_code_revision", "unknown key 'code_revision'", {"code_revision": "main"}),
    ("config_key_with_newline", "unknown key", {"a\n[INFO] fine": 1}),
    ("config_key_long", "unknown key", {"a" * 100_000: 1}),
    ("config_of_lora", "only NEUROADA adapters are served", {"peft_type": "LORA", "r": 8}),
    ("config_peft_type_long", "only NEUROADA adapters", {"peft_type": "X\n" * 100_000}),
    ("config_peft_type_number", "peft_type must be of type str, not int", {"peft_type": 1}),
    ("config_future_version", "format_version is 2; this version reads 1", {"format_version": 2}),
    ("config_version_zero", "format_version is 0; this version reads 1", {"format_version": 0}),
    ("config_version_text", "format_version must be of type int", {"format_version": "1"}),
    ("config_version_true", "format_version must be of type int", {"format_version": True}),
    ("config_targets_text", "target_modules must be of type list", {"target_modules": "q_proj"}),
    ("config_targets_object", "target_modules must be of type list", {"target_modules": {}}),
    ("config_metadata_list", "metadata must be of type dict, not list", {"metadata": []}),
    ("config_selection_null", "selection must be of type str", {"selection": None}),
    ("config_base_name_list", "base_model_name_or_path", {"base_model_name_or_path": []}),
    ("fingerprint_number", "base_fingerprint must be of type str", {"base_fingerprint": 7}),
    ("fingerprint_short", "must be 64 hexadecimal", {"base_fingerprint": "ab"}),
    ("fingerprint_no_hex", "must be 64 hexadecimal", {"base_fingerprint": "g" * 64}),
    ("fingerprint_upper_case", "must be 64 hexadecimal", {"base_fingerprint": "A" * 64}),
    ("fingerprint_and_newline", "must be 64 hexadecimal", {"base_fingerprint": "a" * 64 + "\n"}),
    ("targets_empty", "target_modules is empty", {"target_modules": []}),
    ("targets_twice", "target_modules names a module twice", {"target_modules": ["a", "a"]}),
    ("targets_number", "target_modules has '7', which is no module", {"target_modules": [7]}),
    ("targets_nested", "which is no module name", {"target_modules": [["q_proj"]]}),
    ("targets_null", "which is no module name", {"target_modules": [None]}),
    ("targets_climb", "which is no module name", {"target_modules": ["../../etc/passwd"]}),
    ("targets_absolute", "which is no module name", {"target_modules": ["/etc/passwd"]}),
    ("targets_pattern", "which is no module name", {"target_modules": [".*"]}),
    ("targets_empty_name", "which is no module name", {"target_modules": [""]}),
    ("targets_newline", "which is no module name", {"target_modules": ["q_proj\n"]}),
    ("targets_dot", "which is no module name", {"target_modules": [".q_proj"]}),
    ("targets_long", "which is no module name", {"target_modules": ["-" * 100_000]}),
):
    _add(_name, _match, lambda folder, spec, changes=_changes: edit_config(folder, **changes))

for _key in (
    "peft_type",
    "format_version",
    "base_model_name_or_path",
    "base_fingerprint",
    "k",
    "selection",
    "target_modules",
    "task_type",
):
    _add(
        f"config_without_{_key}",
        f"adapter_config.json lacks '{_key}'",
        lambda folder, spec, key=_key: edit_config(folder, **{key: ...}),
    )

for _name, _match, _text in (
    ("config_empty", "adapter_config.json is not valid JSON", b""),
    ("config_not_json", "adapter_config.json is not valid JSON", b"k: 2\n"),
    ("config_not_utf8", "adapter_config.json is not UTF-8", b'{"k": "\xff"}'),
    ("config_pickle", "adapter_config.json is not UTF-8.*looks like a pickle", pickle.dumps({})),
    ("config_byte_order_mark", "adapter_config.json is not valid JSON", b"\xef\xbb\xbf{}"),
    ("config_list", "must be a JSON object, not list", b"[]"),
    ("config_nothing", "adapter_config.json lacks 'peft_type'", b"{}"),
    ("config_key_twice", "key 'k' occurs twice", b'{"k": 1, "k": 2}'),
    ("config_nan", "NaN is not JSON", b'{"k": NaN}'),
    ("config_nested_too_deeply", "nested too deeply|not valid JSON", b"[" * 500_000),
    ("config_of_two_mebibytes", "adapter_config.json has 2097154 bytes", b"{}" + b" " * (2 << 20)),
):
    _add(_name, _match, lambda folder, spec, text=_text: _write(folder / CONFIG, text))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@kind("key 'k+.* occurs twice")
def config_long_key_repeats(folder, spec):
    key = b"k" * 400_000
    (folder / CONFIG).write_bytes(b'{"%b": 1, "%b": 2}' % (key, key))


@kind("key '0' occurs twice")
def config_of_pairs_of_keys(folder, spec):
    pairs = ",".join(f'"{i // 2:x}":1' for i in range(90_000))
    (folder / CONFIG).write_text("{" + pairs + "}")


@kind("1e999|finite|infinite")
def config_number_overflows(folder, spec):
    """JSON has no infinity, but its numbers can round to one; saving it again would fail."""
    text = (folder / CONFIG).read_text()
    assert '"metadata": {}' in text
    (folder / CONFIG).write_text(text.replace('"metadata": {}', '"metadata": {"loss": 1e999}'))


@kind("UTF-8|surrogate|Unicode")
def config_text_is_no_unicode(folder, spec):
    """Half of a surrogate pair: JSON allows it, UTF-8 has no bytes for it."""
    edit_config(folder, task_type="\ud800")


# --- files and paths -------------------------------------------------------------------------


@kind("has no adapter_config.json", AdapterNotFoundError)
def config_absent(folder, spec):
    (folder / CONFIG).unlink()


@kind("has no adapter_model.safetensors", AdapterNotFoundError)
def weights_absent(folder, spec):
    (folder / WEIGHTS).unlink()


@kind("no adapter directory", AdapterNotFoundError)
def folder_absent(folder, spec):
    return folder.with_name(f"{folder.name}-absent")


@kind("no adapter directory", AdapterNotFoundError)
def folder_is_a_file(folder, spec):
    return folder / CONFIG


@kind("no adapter|cannot be read|outside|not a path", AdapterError)
def name_with_nul(folder, spec):
    return folder.parent / "adapter\0"


@kind("no adapter|cannot be read|too long", AdapterError)
def name_too_long(folder, spec):
    return folder.parent / ("a" * 5000)


@kind("no adapter|cannot be read|outside", AdapterError)
def folder_links_to_itself(folder, spec):
    loop = folder.with_name(f"{folder.name}-loop")
    loop.symlink_to(loop.name)
    return loop


@kind("leads outside the adapter directory")
def folder_links_outside(folder, spec):
    target = outside(folder) / "adapter"
    folder.rename(target)
    folder.symlink_to(target)


@kind("leads outside the adapter directory")
def path_climbs_outside(folder, spec):
    target = outside(folder) / "adapter"
    folder.rename(target)
    return folder.parent / ".." / target.parent.name / target.name


@kind("leads outside the adapter directory")
def path_is_outside(folder, spec):
    target = outside(folder) / "adapter"
    folder.rename(target)
    return target


@kind("leads outside the adapter directory")
def path_is_the_system(folder, spec):
    return Path("/etc")


for _file in (CONFIG, WEIGHTS):
    _stem = _file.partition(".")[0].removeprefix("adapter_")

    def _replace_file(folder: Path, spec: BaseSpec, file: str, make: Callable[[Path], Any]) -> None:
        (folder / file).unlink()
        make(folder / file)

    def _link_outside(folder: Path, spec: BaseSpec, file: str) -> None:
        target = outside(folder) / file
        (folder / file).rename(target)
        (folder / file).symlink_to(target)

    def _loop(path: Path) -> None:
        path.symlink_to(path.name)

    _add(
        f"{_stem}_links_outside",
        f"{_file} is a link out of the adapter directory",
        lambda folder, spec, file=_file: _link_outside(folder, spec, file),
    )
    for _name, _match, _make in (
        ("links_to_dev_zero", "is a link out of", lambda path: path.symlink_to("/dev/zero")),
        ("links_to_itself", "cannot be read|link", _loop),
        ("is_a_fifo", "is not a regular file", os.mkfifo),
        ("is_a_directory", "is not a regular file|cannot be read", os.mkdir),
    ):
        _add(
            f"{_stem}_{_name}",
            f"{_file} .*({_match})",
            lambda folder, spec, file=_file, make=_make: _replace_file(folder, spec, file, make),
        )


@kind("has no adapter_model.safetensors", AdapterNotFoundError)
def weights_link_to_nothing(folder, spec):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("absent.safetensors")
