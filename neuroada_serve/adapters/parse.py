"""A parser of adapter files: the config, and the table of tensors in a weights file's header.

Files are hostile input: JSON is read strictly, sizes are bounded, and no tensor is made of anything
here. All faults of a stage are reported together.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuroada_serve.adapters.format import (
    BYPASS_DTYPES,
    CONFIG_FILE,
    CONFIG_KEYS,
    DATA_SHA256,
    FORMAT_VERSION,
    INDEX_DTYPES,
    MAX_HEADER_BYTES,
    MODULE_NAME,
    SHA256,
    WEIGHTS_FILE,
    AdapterConfig,
    BaseSpec,
    table_faults,
    weights_metadata,
)
from neuroada_serve.errors import AdapterFormatError
from neuroada_serve.tasks import task_faults

MAX_TENSORS = 8192
SAID_SHA256 = re.compile(rb'"data_sha256": ?"([0-9a-f]{64})"')

_DTYPE_BYTES = INDEX_DTYPES | BYPASS_DTYPES


@dataclass(frozen=True)
class TensorSpan:
    """The place of one tensor in a weights file: its dtype by its safetensors name, and bytes
    start..stop - 1 of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_size(start: bytes) -> int:
    return int.from_bytes(start, "little")


def parse_config(data: bytes, source: str) -> AdapterConfig:
    raw, faults = _strict_json(data, CONFIG_FILE)
    if faults:
        raise AdapterFormatError(source, faults)
    peft_type = raw.get("peft_type")
    if isinstance(peft_type, str) and peft_type != "NEUROADA":
        # Everything else in such a file would be a fault too, and none of them would help.
        raise AdapterFormatError(
            source, [f"peft_type is {peft_type[:40]!r}; only NEUROADA adapters are served"]
        )
    for key in sorted(raw.keys() - CONFIG_KEYS.keys()):
        faults.append(f"{CONFIG_FILE} has unknown key {key[:40]!r}")
    for key, (kind, required) in CONFIG_KEYS.items():
        if key not in raw:
            if required:
                faults.append(f"{CONFIG_FILE} lacks {key!r}")
        elif not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            faults.append(f"{key} must be of type {kind.__name__}, not {type(raw[key]).__name__}")
    if faults:
        raise AdapterFormatError(source, faults)

    targets = raw["target_modules"]
    if raw["format_version"] != FORMAT_VERSION:
        faults.append(
            f"format_version is {raw['format_version']}; this version reads {FORMAT_VERSION}, "
            "a newer neuroada-serve may read it"
        )
    if not SHA256.fullmatch(raw["base_fingerprint"]):
        faults.append("base_fingerprint must be 64 hexadecimal digits")
    if raw["k"] < 1:
        faults.append(f"k must be at least 1, is {raw['k']}")
    if not targets:
        faults.append("target_modules is empty")
    for target in targets:
        if not isinstance(target, str) or not MODULE_NAME.fullmatch(target):
            faults.append(f"target_modules has {str(target)[:60]!r}, which is no module name")
    if len(set(map(str, targets))) != len(targets):
        faults.append("target_modules names a module twice")
    labels = tuple(raw.pop("labels", ()))
    faults += task_faults(raw["task_type"], labels)
    if faults:
        raise AdapterFormatError(source, faults)
    return AdapterConfig(**{**raw, "target_modules": tuple(targets), "labels": labels})


def _parse_header(
    header_bytes: bytes, file_size: int
) -> tuple[dict[str, TensorSpan], dict[str, str], list[str]]:
    """Return the tensor table and metadata of a safetensors file, or the faults that keep it
    unread.

    Args:
        header_bytes: the start of the file, up to where its tensors begin.
    """
    if len(header_bytes) < 8:
        fault = f"{WEIGHTS_FILE} has {file_size} bytes, no safetensors file is that short"
        return {}, {}, [fault]
    size = header_size(header_bytes[:8])
    if size > MAX_HEADER_BYTES:
        other = _other_format(header_bytes) or f", at most {MAX_HEADER_BYTES} are read"
        return {}, {}, [f"{WEIGHTS_FILE} claims a header of {size} bytes{other}"]
    if 8 + size > len(header_bytes):
        return {}, {}, [f"{WEIGHTS_FILE} is cut off inside its header"]
    raw, faults = _strict_json(header_bytes[8:], f"the header of {WEIGHTS_FILE}")
    if faults:
        return {}, {}, faults

    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        faults.append("__metadata__ must map strings to strings")
        metadata = {}
    if len(raw) > MAX_TENSORS:
        return {}, {}, [*faults, f"{len(raw)} tensors, at most {MAX_TENSORS} are read"]

    tensors: dict[str, TensorSpan] = {}
    expected_start = 0
    for name, entry in sorted(raw.items(), key=_data_start):
        if not _is_tensor_entry(entry):
            faults.append(f"the header entry of tensor {name[:80]!r} is malformed")
            continue
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _DTYPE_BYTES:
            allowed = ", ".join(_DTYPE_BYTES)
            faults.append(f"{name[:80]!r} has dtype {dtype[:20]!r}, allowed: {allowed}")
            continue
        needed = _DTYPE_BYTES[dtype]
        for dim in shape:
            needed *= dim
        if start != expected_start or stop - start != needed:
            faults.append(f"{name[:80]!r} occupies bytes {start}..{stop}, its shape needs {needed}")
        expected_start = stop
        tensors[name] = TensorSpan(dtype, tuple(shape), 8 + size + start, 8 + size + stop)
    if not faults and 8 + size + expected_start != file_size:
        kind = "is cut off" if 8 + size + expected_start > file_size else "has extra bytes"
        faults.append(
            f"{WEIGHTS_FILE} {kind}: the header describes {expected_start} bytes of data, "
            f"{file_size - 8 - size} are there"
        )
    return tensors, metadata, faults


def _data_start(item: tuple[str, Any]) -> int:
    entry = item[1]
    return entry["data_offsets"][0] if _is_tensor_entry(entry) else -1


def _is_tensor_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)

    offsets = entry["data_offsets"]
    return (
        isinstance(entry["dtype"], str)
        and naturals(entry["shape"])
        and len(entry["shape"]) <= 4
        and naturals(offsets)
        and len(offsets) == 2
    )


def check_header(
    config: AdapterConfig,
    header_bytes: bytes,
    file_size: int,
    base: BaseSpec | None,
    source: str,
) -> Mapping[str, TensorSpan]:
    """Return the tensors that a weights file holds, by its header.

    Raises:
        AdapterFormatError
    """
    tensors, metadata, faults = _parse_header(header_bytes, file_size)
    if faults:
        raise AdapterFormatError(source, faults)
    said = SAID_SHA256.search(header_bytes)
    if metadata.get(DATA_SHA256) != (None if said is None else said[1].decode()):
        faults.append(f"__metadata__ {DATA_SHA256} must be 64 hexadecimal digits, and stand once")
    for key, value in weights_metadata(config).items():
        if metadata.get(key) != value:
            found = str(metadata.get(key))[:80]
            faults.append(f"__metadata__ {key} is {found!r}, {CONFIG_FILE} implies {value!r}")
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    faults += table_faults(table, config, base)
    if faults:
        raise AdapterFormatError(source, faults)
    return tensors


def _strict_json(data: bytes, what: str) -> tuple[dict[str, Any], list[str]]:
    """Parse a JSON object that can be written again: no key twice, finite numbers, Unicode text.
    Returns an empty dict and the fault otherwise."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"key {repeated[:40]!r} occurs twice")
        return parsed

    def no_constants(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text[:40]} is not finite")
        return number

    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constants,
            parse_float=finite,
        )
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return {}, [f"{what} has half of a surrogate pair, which is no Unicode text"]
    except UnicodeDecodeError:
        return {}, [f"{what} is not UTF-8 text{_other_format(data)}"]
    except RecursionError:
        return {}, [f"{what} is nested too deeply"]
    except ValueError as error:
        return {}, [f"{what} is not valid JSON: {error}"]
    if not isinstance(parsed, dict):
        return {}, [f"{what} must be a JSON object, not {type(parsed).__name__}"]
    return parsed, []


def _other_format(data: bytes) -> str:
    """Name the format of a file that is not the expected one, if its first bytes tell."""
    known = {
        b"PK": "a zip archive, such as torch.save or np.savez write",
        b"\x80": "a pickle",
        b"\x93NUMPY": "a NumPy array",
        b"GGUF": "a GGUF model",
        b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
        b"<": "a web page",
    }
    for magic, name in known.items():
        if data.startswith(magic):
            return f" (it looks like {name}; only safetensors is read)"
    return ""
