"""Adapter files: the only place that reads, checks and writes them.

An adapter is a directory of two files.

adapter_config.json
    peft_type "NEUROADA", format_version 1, base_model_name_or_path, base_fingerprint (64 hex
    digits), k, selection, target_modules (module names or their endings), task_type, metadata.
adapter_model.safetensors
    per target module M: M.index [d_out, k] uint16 or int32, the input columns each neuron keeps,
    distinct within a row; M.bypass [d_out, k] bfloat16, float16 or float32, their values.
    `__metadata__` repeats format, format_version and base_fingerprint.

Files are hostile input. They are opened without following a link out of `root`, read once into
memory, and checked in full before a tensor is made of them. The config, the header, the table of
tensors and the values are checked one after the other; all faults of a stage are reported together.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError, ShapeError

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TENSORS = 8192
MAX_FAULTS = 20
UINT16_COLUMNS = 1 << 16

_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_INDEX_DTYPES = {"U16": 2, "I32": 4}
_BYPASS_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
_DTYPE_BYTES = _INDEX_DTYPES | _BYPASS_DTYPES
_DTYPE_NAMES = {
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class BaseSpec:
    """What an adapter must fit: the base's name, fingerprint and adaptable modules."""

    name: str
    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]  # module name -> (d_out, d_in)


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of adapter_config.json."""

    base_model_name_or_path: str
    base_fingerprint: str
    k: int
    target_modules: tuple[str, ...]
    selection: str = "magnitude"
    task_type: str = "CAUSAL_LM"
    peft_type: str = "NEUROADA"
    format_version: int = FORMAT_VERSION
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleBypass:
    """One module's part: index [d_out, k] int32, bypass [d_out, k] float, both on the CPU."""

    index: Tensor
    bypass: Tensor

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape != self.bypass.shape:
            raise ShapeError(
                f"index {tuple(self.index.shape)} and bypass {tuple(self.bypass.shape)} must both "
                "be [d_out, k]"
            )


@dataclass(frozen=True)
class Adapter:
    """One adapter in memory. Immutable; digest is the sha256 of its weights file's bytes."""

    config: AdapterConfig
    modules: Mapping[str, ModuleBypass]
    digest: str

    @property
    def nnz(self) -> int:
        """Values in all modules together."""
        return sum(m.bypass.numel() for m in self.modules.values())


def is_target(module: str, targets: tuple[str, ...]) -> bool:
    """Whether a module's name equals one of the targets or ends with '.' and one of them."""
    return any(module == t or module.endswith(f".{t}") for t in targets)


# --- reading ---------------------------------------------------------------------------------


def load_adapter(
    path: str | os.PathLike[str],
    base: BaseSpec | None = None,
    *,
    root: Path | None = None,
    allow_other_base: bool = False,
) -> Adapter:
    """Read and check the adapter in directory `path`.

    Args:
        path: the adapter's directory.
        base: check it against this base too: fingerprint, modules, shapes, column ranges.
        root: refuse a path, or a file in it, that leads outside this directory.
        allow_other_base: accept another base's fingerprint; shapes must agree all the same.

    Raises:
        AdapterNotFoundError: no such directory, or one of the two files is not there.
        AdapterFormatError: anything wrong with them; `.faults` lists what was found.
    """
    directory = Path(path)
    source = repr(directory.name)
    if root is not None and _resolved_within(directory, root) is None:
        raise AdapterFormatError(source, ["its path leads outside the adapter directory"])
    if not os.path.isdir(directory):  # unlike Path.is_dir, False for a name that is too long
        raise AdapterNotFoundError(
            f"no adapter directory {str(directory)!r}; it must hold {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    config_bytes = _read_file(directory / CONFIG_FILE, MAX_CONFIG_BYTES, root, source)
    config = _parse_config(config_bytes, source)
    limit = MAX_WEIGHTS_BYTES if base is None else _most_bytes(config, base)
    data = _read_file(directory / WEIGHTS_FILE, limit, root, source)
    return _parse_adapter(config, data, base, allow_other_base, source)


def _resolved_within(path: Path, root: Path) -> Path | None:
    """The path without links; None where it leads out of root, or nowhere."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, a NUL in the name
        return None
    return resolved if resolved.is_relative_to(root.resolve()) else None


def _read_file(path: Path, limit: int, root: Path | None, source: str) -> bytes:
    """The bytes of one regular file; opened once, so what is checked is what is used."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if root is None:
            fd = os.open(path, flags)
        else:
            resolved = _resolved_within(path, root)
            if resolved is None:
                fault = f"{path.name} is a link out of the adapter directory"
                raise AdapterFormatError(source, [fault])
            fd = os.open(resolved, flags | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise AdapterNotFoundError(f"adapter {source} has no {path.name}") from None
    except OSError as error:
        raise AdapterFormatError(
            source, [f"{path.name} cannot be read: {error.strerror}"]
        ) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise AdapterFormatError(source, [f"{path.name} is not a regular file"])
    with open(fd, "rb") as file:
        if status.st_size > limit:
            raise AdapterFormatError(
                source, [f"{path.name} has {status.st_size} bytes, at most {limit} expected"]
            )
        data = file.read(limit + 1)
    if len(data) != status.st_size:
        raise AdapterFormatError(source, [f"{path.name} changed while it was read; load it again"])
    return data


def _strict_json(data: bytes, what: str) -> tuple[dict[str, Any], list[str]]:
    """A JSON object that can be written again: keys once, finite numbers, Unicode text. Else
    empty, and the fault."""

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
    """Names the format of a file that is not what it should be, where its first bytes tell."""
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


# name -> (type, required). bool is an int to Python, so it is refused apart.
_CONFIG_KEYS: dict[str, tuple[type, bool]] = {
    "peft_type": (str, True),
    "format_version": (int, True),
    "base_model_name_or_path": (str, True),
    "base_fingerprint": (str, True),
    "k": (int, True),
    "selection": (str, True),
    "target_modules": (list, True),
    "task_type": (str, True),
    "metadata": (dict, False),
}


def _parse_config(data: bytes, source: str) -> AdapterConfig:
    raw, faults = _strict_json(data, CONFIG_FILE)
    if faults:
        raise AdapterFormatError(source, faults)
    peft_type = raw.get("peft_type")
    if isinstance(peft_type, str) and peft_type != "NEUROADA":
        # Everything else in such a file would be a fault too, and none of them would help.
        raise AdapterFormatError(
            source, [f"peft_type is {peft_type[:40]!r}; only NEUROADA adapters are served"]
        )
    for key in sorted(raw.keys() - _CONFIG_KEYS.keys()):
        faults.append(f"{CONFIG_FILE} has unknown key {key[:40]!r}")
    for key, (kind, required) in _CONFIG_KEYS.items():
        if key not in raw:
            if required:
                faults.append(f"{CONFIG_FILE} lacks {key!r}")
        elif not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            faults.append(f"{key} must be of type {kind.__name__}, not {type(raw[key]).__name__}")
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])

    targets = raw["target_modules"]
    if raw["format_version"] != FORMAT_VERSION:
        faults.append(
            f"format_version is {raw['format_version']}; this version reads {FORMAT_VERSION}, "
            "a newer neuroada-serve may read it"
        )
    if not _FINGERPRINT.fullmatch(raw["base_fingerprint"]):
        faults.append("base_fingerprint must be 64 hexadecimal digits")
    if raw["k"] < 1:
        faults.append(f"k must be at least 1, is {raw['k']}")
    if not targets:
        faults.append("target_modules is empty")
    for target in targets:
        if not isinstance(target, str) or not _MODULE_NAME.fullmatch(target):
            faults.append(f"target_modules has {str(target)[:60]!r}, which is no module name")
    if len(set(map(str, targets))) != len(targets):
        faults.append("target_modules names a module twice")
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])
    return AdapterConfig(**{**raw, "target_modules": tuple(targets)})


def _most_bytes(config: AdapterConfig, base: BaseSpec) -> int:
    """No valid weights file for this base is larger: the header, and 8 bytes an entry."""
    rows = sum(d_out for d_out, _ in base.shapes.values())
    widest = max(d_in for _, d_in in base.shapes.values())
    return 8 + MAX_HEADER_BYTES + rows * min(config.k, widest) * 8


@dataclass(frozen=True)
class _TensorInfo:
    dtype: str
    shape: tuple[int, ...]


def _parse_header(data: bytes) -> tuple[dict[str, _TensorInfo], dict[str, str], list[str]]:
    """Tensor table and metadata of a safetensors file, or the faults that keep it unread."""
    if len(data) < 8:
        return {}, {}, [f"{WEIGHTS_FILE} has {len(data)} bytes, no safetensors file is that short"]
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        other = _other_format(data) or f", at most {MAX_HEADER_BYTES} are read"
        return {}, {}, [f"{WEIGHTS_FILE} claims a header of {header_bytes} bytes{other}"]
    if 8 + header_bytes > len(data):
        return {}, {}, [f"{WEIGHTS_FILE} is cut off inside its header"]
    raw, faults = _strict_json(data[8 : 8 + header_bytes], f"the header of {WEIGHTS_FILE}")
    if faults:
        return {}, {}, faults

    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        faults.append("__metadata__ must map strings to strings")
        metadata = {}
    if len(raw) > MAX_TENSORS:
        return {}, {}, [*faults, f"{len(raw)} tensors, at most {MAX_TENSORS} are read"]

    tensors: dict[str, _TensorInfo] = {}
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
        size = _DTYPE_BYTES[dtype]
        for dim in shape:
            size *= dim
        if start != expected_start or stop - start != size:
            faults.append(f"{name[:80]!r} occupies bytes {start}..{stop}, its shape needs {size}")
        expected_start = stop
        tensors[name] = _TensorInfo(dtype, tuple(shape))
    if not faults and 8 + header_bytes + expected_start != len(data):
        kind = "is cut off" if 8 + header_bytes + expected_start > len(data) else "has extra bytes"
        faults.append(
            f"{WEIGHTS_FILE} {kind}: the header describes {expected_start} bytes of data, "
            f"{len(data) - 8 - header_bytes} are there"
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


def _parse_adapter(
    config: AdapterConfig,
    data: bytes,
    base: BaseSpec | None,
    allow_other_base: bool,
    source: str,
) -> Adapter:
    tensors, metadata, faults = _parse_header(data)
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])

    for key, value in _weights_metadata(config).items():
        if metadata.get(key) != value:
            found = str(metadata.get(key))[:80]
            faults.append(f"__metadata__ {key} is {found!r}, {CONFIG_FILE} implies {value!r}")
    if base is not None and (fault := _base_fault(config, base, allow_other_base)):
        faults.append(fault)

    modules, table_faults = _check_table(tensors, config, base)
    faults += table_faults
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])

    try:
        loaded = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFormatError(source, [f"{WEIGHTS_FILE}: {error}"]) from error
    parts: dict[str, ModuleBypass] = {}
    for module in modules:
        part = ModuleBypass(loaded[f"{module}.index"].to(torch.int32), loaded[f"{module}.bypass"])
        faults += _check_values(module, part, None if base is None else base.shapes[module][1])
        parts[module] = part
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])
    return Adapter(config, parts, hashlib.sha256(data).hexdigest())


def _check_table(
    tensors: Mapping[str, _TensorInfo], config: AdapterConfig, base: BaseSpec | None
) -> tuple[list[str], list[str]]:
    """The modules that the file holds, and every fault of its tensor names, dtypes and shapes."""
    faults: list[str] = []
    parts: dict[str, set[str]] = {}
    for name, info in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("index", "bypass") or not _MODULE_NAME.fullmatch(module):
            faults.append(
                f"unexpected tensor {name[:80]!r}; tensors are MODULE.index, MODULE.bypass"
            )
            continue
        parts.setdefault(module, set()).add(kind)
        allowed = _INDEX_DTYPES if kind == "index" else _BYPASS_DTYPES
        if info.dtype not in allowed:
            faults.append(f"{name} has dtype {info.dtype}, allowed: {', '.join(allowed)}")
        if len(info.shape) != 2 or info.shape[1] != config.k or info.shape[0] < 1:
            faults.append(f"{name} has shape {list(info.shape)}, expected [d_out, k={config.k}]")
        elif base is not None and module in base.shapes and info.shape[0] != base.shapes[module][0]:
            faults.append(f"{name} has {info.shape[0]} rows, the base has {base.shapes[module][0]}")

    for module, kinds in parts.items():
        for kind in sorted({"index", "bypass"} - kinds):
            faults.append(f"{module}.{kind} is missing")
        if not is_target(module, config.target_modules):
            faults.append(f"{module} is not among target_modules")
        if len(kinds) == 2:
            rows = {tensors[f"{module}.{kind}"].shape[:1] for kind in kinds}
            if len(rows) != 1:
                faults.append(f"{module}.index and {module}.bypass differ in rows")
    for target in config.target_modules:
        if not any(is_target(module, (target,)) for module in parts):
            faults.append(f"target module {target!r} has no tensors")

    if base is not None:
        wanted = {m for m in base.shapes if is_target(m, config.target_modules)}
        for module in sorted(parts.keys() - base.shapes.keys()):
            faults.append(f"the base has no adaptable module {module!r}")
        for module in sorted(wanted - parts.keys()):
            faults.append(f"module {module!r} of the base has no tensors")
        for module in sorted(wanted & parts.keys()):
            if config.k > base.shapes[module][1]:
                faults.append(f"k={config.k} is above d_in={base.shapes[module][1]} of {module}")
    return sorted(parts), faults


def _check_values(module: str, part: ModuleBypass, d_in: int | None) -> list[str]:
    faults = []
    lowest, highest = (int(bound) for bound in part.index.aminmax())
    if lowest < 0:
        faults.append(f"{module}.index has column {lowest}, columns start at 0")
    if d_in is not None and highest >= d_in:
        faults.append(f"{module}.index has column {highest}, the base has d_in={d_in}")
    in_order = part.index.sort(dim=1).values
    if part.index.shape[1] > 1 and bool((in_order[:, 1:] == in_order[:, :-1]).any()):
        row = int((in_order[:, 1:] == in_order[:, :-1]).any(dim=1).nonzero()[0])
        faults.append(f"{module}.index repeats a column in row {row}")
    if not bool(part.bypass.isfinite().all()):
        faults.append(f"{module}.bypass has NaN or infinite values")
    return faults


# --- writing ---------------------------------------------------------------------------------


def make_adapter(config: AdapterConfig, modules: Mapping[str, ModuleBypass]) -> Adapter:
    """An adapter from tensors in memory; its digest is that of the file `save_adapter` writes.

    Raises:
        AdapterFormatError: the tensors break the format.
    """
    _check_in_memory(config, modules, None)
    digest = hashlib.sha256(_weights_bytes(config, modules)).hexdigest()
    return Adapter(config, dict(modules), digest)


def check_adapter(adapter: Adapter, base: BaseSpec, *, allow_other_base: bool = False) -> None:
    """Check an adapter in memory against a base, as `load_adapter` checks one on disk.

    Raises:
        AdapterFormatError: it belongs to another base or does not fit this one.
    """
    if fault := _base_fault(adapter.config, base, allow_other_base):
        raise AdapterFormatError("in memory", [fault])
    _check_in_memory(adapter.config, adapter.modules, base)


def _check_in_memory(
    config: AdapterConfig, modules: Mapping[str, ModuleBypass], base: BaseSpec | None
) -> None:
    table = {}
    for name, part in modules.items():
        for kind, tensor in (("index", part.index), ("bypass", part.bypass)):
            dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            table[f"{name}.{kind}"] = _TensorInfo(dtype, tuple(tensor.shape))
    _, faults = _check_table(table, config, base)
    if not faults:
        for name, part in modules.items():
            faults += _check_values(name, part, None if base is None else base.shapes[name][1])
    if faults:
        raise AdapterFormatError("in memory", faults[:MAX_FAULTS])


def _base_fault(config: AdapterConfig, base: BaseSpec, allow_other_base: bool) -> str | None:
    if allow_other_base or config.base_fingerprint == base.fingerprint:
        return None
    return (
        f"it was trained on another base ({config.base_model_name_or_path!r}, fingerprint "
        f"{config.base_fingerprint[:12]}) than this one ({base.name!r}, fingerprint "
        f"{base.fingerprint[:12]}); serve it on its own base or train it again on this one"
    )


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter directory, durably: no reader ever finds a file in part.

    Each file goes to a temporary file, is flushed to disk and renamed into place, weights before
    config. Between the two renames the new weights stand under the old config: refused where base,
    k or modules differ, else served, and described by the old metadata. Columns are stored as
    uint16 where all of them fit, else as int32.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(directory / WEIGHTS_FILE, _weights_bytes(adapter.config, adapter.modules))
    write_durably(directory / CONFIG_FILE, _config_json(adapter.config).encode())


def _weights_bytes(config: AdapterConfig, modules: Mapping[str, ModuleBypass]) -> bytes:
    """The safetensors file. Written here because the library orders metadata at random, and equal
    adapters should have equal digests."""
    highest = max(int(part.index.max()) for part in modules.values())
    column_dtype = torch.uint16 if highest < UINT16_COLUMNS else torch.int32
    tensors: dict[str, Tensor] = {}
    for name, part in modules.items():
        tensors[f"{name}.index"] = part.index.to(column_dtype).contiguous()
        tensors[f"{name}.bypass"] = part.bypass.contiguous()
    header: dict[str, Any] = {"__metadata__": _weights_metadata(config)}
    data, start = [], 0
    # Wide dtypes first, as the library does, so that every tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        data.append(tensor.cpu().view(-1).view(torch.uint8).numpy().tobytes())
        stop = start + len(data[-1])
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _weights_metadata(config: AdapterConfig) -> dict[str, str]:
    return {
        "format": "neuroada",
        "format_version": str(config.format_version),
        "base_fingerprint": config.base_fingerprint,
    }


def _config_json(config: AdapterConfig) -> str:
    raw = {key: getattr(config, key) for key in _CONFIG_KEYS}
    raw["target_modules"] = list(config.target_modules)
    raw["metadata"] = dict(config.metadata)
    return json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
