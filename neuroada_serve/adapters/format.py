"""The adapter file format: its types, rules and writer.

An adapter is a directory of two files.

adapter_config.json
    peft_type "NEUROADA", format_version 1, base_model_name_or_path, base_fingerprint (64 hex
    digits), k, selection, target_modules (module names or their endings), task_type and labels (see
    `tasks.py`), metadata.
adapter_model.safetensors
    per target module M: M.index [d_out, k] uint16 or int32, the input columns each neuron keeps,
    distinct within a row; M.bypass [d_out, k] bfloat16, float16 or float32, their values.
    M.bias [d_out], same dtypes, where M has a bias that was trained: what is added to it.
    Where the task has a head also score.weight [rows, hidden_size], same dtypes: its product with
    what the base's output head would see at the text's last token is decoded by the task.
    `__metadata__` repeats format, format_version and base_fingerprint; data_sha256 is that of all
    bytes behind the header, so that the header alone tells which adapter it is.

This is the format's only home: its types, its rules and its writer; `adapters/reader.py` reads.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.errors import AdapterFormatError, ShapeError, UsageError
from neuroada_serve.tasks import GENERATE, Task, TaskType, task_faults, task_of

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1 << 20
UINT16_COLUMNS = 1 << 16
DATA_SHA256 = "data_sha256"

HEAD = "score.weight"
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
SHA256 = re.compile(r"[0-9a-f]{64}")
INDEX_DTYPES = {"U16": 2, "I32": 4}
BYPASS_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
DTYPE_NAMES = {
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class BaseSpec:
    """The base that an adapter must fit: its name, fingerprint and adaptable modules.

    hidden_size: what its output head takes; None where it does not matter.
    biased: those of its modules that have a bias.
    """

    name: str
    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]  # module name -> (d_out, d_in)
    hidden_size: int | None = None
    biased: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of adapter_config.json."""

    base_model_name_or_path: str
    base_fingerprint: str
    k: int
    target_modules: tuple[str, ...]
    selection: str = "magnitude"
    task_type: TaskType = GENERATE.task_type
    peft_type: str = "NEUROADA"
    format_version: int = FORMAT_VERSION
    metadata: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """The task that the adapter is made for."""
        return task_of(self.task_type, self.labels)


@dataclass(frozen=True)
class ModuleBypass:
    """One module's part of an adapter, on the CPU: index [d_out, k] int32, bypass [d_out, k]
    float, and, if its bias was trained, the [d_out] float values to add to the bias."""

    index: Tensor
    bypass: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape != self.bypass.shape:
            raise ShapeError(
                f"index {tuple(self.index.shape)} and bypass {tuple(self.bypass.shape)} must both "
                "be [d_out, k]"
            )
        if self.bias is not None and self.bias.shape != self.index.shape[:1]:
            raise ShapeError(f"bias {tuple(self.bias.shape)} must be [d_out={self.index.shape[0]}]")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by the ending of their names in a file."""
        found = {"index": self.index, "bypass": self.bypass}
        return found if self.bias is None else {**found, "bias": self.bias}


@dataclass(frozen=True)
class Adapter:
    """One adapter in memory. Immutable.

    digest: of its weights file, see `file_digest`.
    head: [rows, hidden_size] float on the CPU, where its task has one.
    """

    config: AdapterConfig
    modules: Mapping[str, ModuleBypass]
    digest: str
    head: Tensor | None = None

    @property
    def nnz(self) -> int:
        """Number of values in all modules together, biases included."""
        biases = [m.bias.numel() for m in self.modules.values() if m.bias is not None]
        return sum(m.bypass.numel() for m in self.modules.values()) + sum(biases)


def is_target(module: str, targets: tuple[str, ...]) -> bool:
    """Return whether a module's name equals a target or ends with '.' and a target."""
    return any(module == t or module.endswith(f".{t}") for t in targets)


def target_modules(modules: Collection[str], of_base: Collection[str]) -> tuple[str, ...]:
    """Return the shortest targets that name `modules` and no other module of the base, sorted.

    Those whose last part names others too are named whole.
    """
    left_out = {name.rpartition(".")[2] for name in set(of_base) - set(modules)}
    ends = {name: name.rpartition(".")[2] for name in modules}
    return tuple(sorted({name if end in left_out else end for name, end in ends.items()}))


# adapter_config.json: key -> (type, required). bool is an int to Python, so it is refused apart.
CONFIG_KEYS: dict[str, tuple[type, bool]] = {
    "peft_type": (str, True),
    "format_version": (int, True),
    "base_model_name_or_path": (str, True),
    "base_fingerprint": (str, True),
    "k": (int, True),
    "selection": (str, True),
    "target_modules": (list, True),
    "task_type": (str, True),
    "metadata": (dict, False),
    "labels": (list, False),
}


# --- rules ------------------------------------------------------------------------------------


def table_faults(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: AdapterConfig, base: BaseSpec | None
) -> list[str]:
    """Return every fault of tensor names, dtypes and shapes; tensors: name -> (dtype, shape)."""
    faults: list[str] = []
    parts: dict[str, set[str]] = {}
    if config.task.head_rows:
        tensors = dict(tensors)
        faults += _head_faults(tensors.pop(HEAD, None), config, base)
    for name, (dtype, shape) in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("index", "bypass", "bias") or not MODULE_NAME.fullmatch(module):
            faults.append(
                f"unexpected tensor {name[:80]!r}; tensors are MODULE.index, MODULE.bypass and "
                "MODULE.bias"
            )
            continue
        parts.setdefault(module, set()).add(kind)
        allowed = INDEX_DTYPES if kind == "index" else BYPASS_DTYPES
        if dtype not in allowed:
            faults.append(f"{name} has dtype {dtype}, allowed: {', '.join(allowed)}")
        columns = () if kind == "bias" else (config.k,)
        if shape[1:] != columns or not shape or shape[0] < 1:
            expected = "[d_out]" if kind == "bias" else f"[d_out, k={config.k}]"
            faults.append(f"{name} has shape {list(shape)}, expected {expected}")
        elif base is not None and module in base.shapes and shape[0] != base.shapes[module][0]:
            faults.append(f"{name} has {shape[0]} rows, the base has {base.shapes[module][0]}")

    for module, kinds in parts.items():
        for kind in sorted({"index", "bypass"} - kinds):
            faults.append(f"{module}.{kind} is missing")
        if not is_target(module, config.target_modules):
            faults.append(f"{module} is not among target_modules")
        if kinds >= {"index", "bypass"}:
            rows = {tensors[f"{module}.{kind}"][1][:1] for kind in kinds}
            if len(rows) != 1:
                differing = " and ".join(f"{module}.{kind}" for kind in sorted(kinds, reverse=True))
                faults.append(f"{differing} differ in rows")
    for target in config.target_modules:
        if not any(is_target(module, (target,)) for module in parts):
            faults.append(f"target module {target!r} has no tensors")

    if base is not None:
        wanted = {m for m in base.shapes if is_target(m, config.target_modules)}
        for module in sorted(parts.keys() - base.shapes.keys()):
            faults.append(f"the base has no adaptable module {module!r}")
        for module in sorted(wanted - parts.keys()):
            faults.append(f"module {module!r} of the base has no tensors")
        for module in sorted(parts.keys() & base.shapes.keys() - base.biased):
            if "bias" in parts[module]:
                faults.append(f"{module}.bias changes a bias that the base does not have")
        for module in sorted(wanted & parts.keys()):
            if config.k > base.shapes[module][1]:
                faults.append(f"k={config.k} is above d_in={base.shapes[module][1]} of {module}")
    return faults


def _head_faults(
    head: tuple[str, tuple[int, ...]] | None, config: AdapterConfig, base: BaseSpec | None
) -> list[str]:
    if head is None:
        return [f"{HEAD} is missing; task_type {config.task_type} needs it"]
    dtype, shape = head
    if dtype not in BYPASS_DTYPES:
        return [f"{HEAD} has dtype {dtype}, allowed: {', '.join(BYPASS_DTYPES)}"]
    hidden, rows = None if base is None else base.hidden_size, config.task.head_rows
    if len(shape) != 2 or shape[0] != rows or shape[1] != (hidden or shape[1]):
        wanted = "hidden_size" if hidden is None else hidden
        return [f"{HEAD} has shape {list(shape)}, expected [{rows}, {wanted}]"]
    return []


def index_faults(module: str, index: Tensor, d_in: int | None) -> list[str]:
    """Return the faults of a module's index [d_out, k] int32."""
    faults = []
    lowest, highest = (int(bound) for bound in index.aminmax())
    if lowest < 0:
        faults.append(f"{module}.index has column {lowest}, columns start at 0")
    if d_in is not None and highest >= d_in:
        faults.append(f"{module}.index has column {highest}, the base has d_in={d_in}")
    in_order = index.sort(dim=1).values
    if index.shape[1] > 1 and bool((in_order[:, 1:] == in_order[:, :-1]).any()):
        row = int((in_order[:, 1:] == in_order[:, :-1]).any(dim=1).nonzero()[0])
        faults.append(f"{module}.index repeats a column in row {row}")
    return faults


def value_faults(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the faults of tensors of values; others are passed over."""
    return [
        f"{name} has NaN or infinite values"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


def content_faults(
    modules: Mapping[str, ModuleBypass], head: Tensor | None, base: BaseSpec | None
) -> list[str]:
    """Return every fault of the columns and values of an adapter whose table has none."""
    faults = []
    for name, part in modules.items():
        faults += index_faults(name, part.index, None if base is None else base.shapes[name][1])
        faults += value_faults(_tensors({name: part}, None))
    return faults + value_faults(_tensors({}, head))


def _tensors(modules: Mapping[str, ModuleBypass], head: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in a file."""
    tensors = {} if head is None else {HEAD: head}
    for name, part in modules.items():
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in part.tensors.items()}
    return tensors


def base_fault(config: AdapterConfig, base: BaseSpec, allow_other_base: bool) -> str | None:
    """Return why an adapter of this config does not belong to the base; None if it does."""
    if allow_other_base or config.base_fingerprint == base.fingerprint:
        return None
    return (
        f"it was trained on another base ({config.base_model_name_or_path!r}, fingerprint "
        f"{config.base_fingerprint[:12]}) than this one ({base.name!r}, fingerprint "
        f"{base.fingerprint[:12]}); serve it on its own base or train it again on this one"
    )


# --- writing ---------------------------------------------------------------------------------


def make_adapter(
    config: AdapterConfig, modules: Mapping[str, ModuleBypass], head: Tensor | None = None
) -> Adapter:
    """Make an adapter from tensors in memory; its digest is that of the file `save_adapter`
    writes.

    Raises:
        AdapterFormatError: the tensors break the format.
    """
    _check_in_memory(config, modules, head, None)
    header, data = _header_and_data(config, modules, head)
    return Adapter(config, dict(modules), file_digest(header, _sha256(data)), head)


def check_adapter(adapter: Adapter, base: BaseSpec, *, allow_other_base: bool = False) -> None:
    """Check an adapter in memory against a base, as `load_adapter` checks one on disk.

    Raises:
        AdapterFormatError: it belongs to another base or does not fit this one.
    """
    if fault := base_fault(adapter.config, base, allow_other_base):
        raise AdapterFormatError("in memory", [fault])
    _check_in_memory(adapter.config, adapter.modules, adapter.head, base)


def _check_in_memory(
    config: AdapterConfig,
    modules: Mapping[str, ModuleBypass],
    head: Tensor | None,
    base: BaseSpec | None,
) -> None:
    table = {
        name: (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in _tensors(modules, head).items()
    }
    faults = (
        task_faults(config.task_type, config.labels)
        or table_faults(table, config, base)
        or content_faults(modules, head, base)
    )
    if faults:
        raise AdapterFormatError("in memory", faults)


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter directory, durably: no reader ever finds a partial file.

    Each file goes to a temporary file, is flushed to disk and renamed into place, weights before
    config. Between the two renames the new weights stand under the old config: refused where base,
    k or modules differ, else served, and described by the old metadata. Columns are stored as
    uint16 where all of them fit, else as int32.

    Raises:
        UsageError: these are no adapter and no path.
    """
    if not isinstance(adapter, Adapter) or not isinstance(path, str | os.PathLike):
        found = f"{type(adapter).__name__}, {type(path).__name__}"
        raise UsageError(f"save_adapter takes an Adapter and a folder to write, not ({found})")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights, config = adapter_files(adapter)
    write_durably(directory / WEIGHTS_FILE, weights)
    write_durably(directory / CONFIG_FILE, config)


def save_config(config: AdapterConfig, path: str | os.PathLike[str]) -> None:
    """Write only an adapter directory's config, durably. It must describe the weights that are
    there; the digest is the weights' and does not change."""
    write_durably(Path(path) / CONFIG_FILE, _config_json(config).encode())


def adapter_files(adapter: Adapter) -> tuple[bytes, bytes]:
    """Return the bytes of the weights file and of the config file that `save_adapter` writes."""
    header, data = _header_and_data(adapter.config, adapter.modules, adapter.head)
    return header + data, _config_json(adapter.config).encode()


def file_digest(header: bytes, data_sha256: str) -> str:
    """Return the digest of a weights file: sha256 over its header, length included, and its
    data's sha256 (32 bytes). If the header says data_sha256, the digest is known without reading
    the data."""
    return hashlib.sha256(header + bytes.fromhex(data_sha256)).hexdigest()


def _header_and_data(
    config: AdapterConfig, modules: Mapping[str, ModuleBypass], head: Tensor | None
) -> tuple[bytes, bytes]:
    """Return the safetensors file, split behind its header. The library orders metadata at
    random, and equal adapters should have equal digests, so it is written here."""
    highest = max(int(part.index.max()) for part in modules.values())
    column_dtype = torch.uint16 if highest < UINT16_COLUMNS else torch.int32
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(modules, head).items()}
    for name, part in modules.items():
        tensors[f"{name}.index"] = part.index.to(column_dtype).contiguous()
    parts, entries, start = [], dict[str, Any](), 0
    # Wide dtypes first, as the library does, so that every tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        parts.append(tensor.cpu().view(-1).view(torch.uint8).numpy().tobytes())
        stop = start + len(parts[-1])
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    data = b"".join(parts)
    metadata = weights_metadata(config) | {DATA_SHA256: _sha256(data)}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weights_metadata(config: AdapterConfig) -> dict[str, str]:
    """Return the part of a config that its weights file repeats."""
    return {
        "format": "neuroada",
        "format_version": str(config.format_version),
        "base_fingerprint": config.base_fingerprint,
    }


def _config_json(config: AdapterConfig) -> str:
    raw = {key: getattr(config, key) for key in CONFIG_KEYS}
    raw["target_modules"] = list(config.target_modules)
    raw["metadata"] = dict(config.metadata)
    raw["labels"] = list(config.labels)
    if not config.labels:
        del raw["labels"]
    return json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
