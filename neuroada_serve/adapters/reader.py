"""Adapter directories in: files are hostile input.

They are opened without following a link out of `root`, read into memory, and checked before a
tensor is made of them. The config, the header, the table of tensors and the values are checked one
after the other; all faults of a stage are reported together.

An adapter can be known without its values being read: its config and the header of its weights file
say what it holds, and which bytes belong to it.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from neuroada_serve.adapters.format import (
    BYPASS_DTYPES,
    CONFIG_FILE,
    CONFIG_KEYS,
    DATA_SHA256,
    FORMAT_VERSION,
    HEAD,
    INDEX_DTYPES,
    MAX_FAULTS,
    MAX_HEADER_BYTES,
    MODULE_NAME,
    SHA256,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    base_fault,
    file_digest,
    index_faults,
    table_faults,
    task_faults,
    value_faults,
    weights_metadata,
)
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TENSORS = 8192
_STAMP_FIELDS = 3  # of a file: size, time, inode
_MOST_CHECKED = 64  # headers kept as checked, at most MAX_HEADER_BYTES each

_DTYPE_BYTES = INDEX_DTYPES | BYPASS_DTYPES
_SAID_SHA256 = re.compile(rb'"data_sha256": ?"([0-9a-f]{64})"')


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor lies in a weights file: dtype by its safetensors name, bytes start..stop - 1
    of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter's files say of themselves, checked; the values are not read yet.

    digest: of the weights file, see `file_digest`; where the header does not say data_sha256, the
        data was read for it.
    tensors: by name; shared by all adapters whose headers are equal.
    stamp: size and time of both files; differs once they are written anew.
    """

    path: Path
    root: Path | None
    config: AdapterConfig
    digest: str
    header_size: int  # bytes of the weights file before its tensors
    tensors: Mapping[str, TensorSpan] = field(repr=False)
    stamp: tuple[int, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that it has, sorted."""
        return sorted({name.rpartition(".")[0] for name in self.tensors if name != HEAD})

    @property
    def nnz(self) -> int:
        """Values in all modules together, biases too."""
        kinds = (".bypass", ".bias")
        return sum(math.prod(t.shape) for name, t in self.tensors.items() if name.endswith(kinds))

    @property
    def size_bytes(self) -> int:
        """Of the weights file."""
        return self.stamp[-_STAMP_FIELDS]

    @property
    def source(self) -> str:
        """How messages call it."""
        return repr(self.path.name)


class AdapterReader:
    """Reads adapter directories for one base. Safe in any thread.

    Args:
        base: what adapters are checked against; None checks them by themselves.
        allow_other_base: accept another base's fingerprint; shapes must agree all the same.
    """

    def __init__(self, base: BaseSpec | None = None, *, allow_other_base: bool = False) -> None:
        self._base = base
        self._allow_other_base = allow_other_base
        # Adapters made by one recipe have equal headers but for their digest; what was found right
        # once is kept.
        self._checked: dict[tuple[object, ...], Mapping[str, TensorSpan]] = {}
        self._configs: dict[tuple[object, ...], AdapterConfig] = {}

    def header(self, path: str | os.PathLike[str], root: Path | None = None) -> AdapterHeader:
        """Check an adapter's config and the header of its weights file.

        Args:
            path: the adapter's directory.
            root: refuse a path, or a file in it, that leads outside this directory.

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
        with _open_file(directory / CONFIG_FILE, MAX_CONFIG_BYTES, root, source) as file:
            config_stamp = _stamp(file)
            config_bytes = _read_whole(file, source)
        config = self._shared(_parse_config(config_bytes, source))
        limit = MAX_WEIGHTS_BYTES if self._base is None else _most_bytes(config, self._base)
        with _open_file(directory / WEIGHTS_FILE, limit, root, source) as file:
            stamp = _stamp(file)
            start = file.read(8)
            header_bytes = start + file.read(min(_header_size(start), MAX_HEADER_BYTES))
            tensors = self._tensors(config, header_bytes, stamp[0], source)
            said = _SAID_SHA256.search(header_bytes)
            data_sha256 = _rest_sha256(file) if said is None else said[1].decode()
        return AdapterHeader(
            path=directory,
            root=root,
            config=config,
            digest=file_digest(header_bytes, data_sha256),
            header_size=len(header_bytes),
            tensors=tensors,
            stamp=(*config_stamp, *stamp),
        )

    def data(self, header: AdapterHeader) -> tuple[bytes, list[str]]:
        """The bytes of the weights file, read anew, and a fault where they do not match its header.

        Raises:
            AdapterNotFoundError, AdapterFormatError: the file has gone, is no longer the one that
                the header is of, or cannot be read.
        """
        path, source = header.path / WEIGHTS_FILE, header.source
        changed = AdapterFormatError(source, [f"{WEIGHTS_FILE} has changed; load it again"])
        with _open_file(path, MAX_WEIGHTS_BYTES, header.root, source) as file:
            if _stamp(file)[0] != header.size_bytes:
                raise changed
            data = _read_whole(file, source)
        start = data[: header.header_size]
        if file_digest(start, _sha256(memoryview(data)[header.header_size :])) == header.digest:
            return data, []
        said = _SAID_SHA256.search(start)
        if said is None or file_digest(start, said[1].decode()) != header.digest:
            raise changed
        return data, [
            f"{WEIGHTS_FILE} is damaged: its values are not those that its header was written for "
            f"({DATA_SHA256} differs); copy it again, or, where you changed them yourself, save it "
            "with save_adapter"
        ]

    def adapter(self, header: AdapterHeader) -> Adapter:
        """The whole adapter, its values checked.

        Raises:
            AdapterNotFoundError, AdapterFormatError.
        """
        data, damage = self.data(header)
        faults: list[str] = []
        try:
            loaded = safetensors.torch.load(data)
        except SafetensorError as error:
            raise AdapterFormatError(header.source, [f"{WEIGHTS_FILE}: {error}"]) from error
        parts: dict[str, ModuleBypass] = {}
        for module in header.modules:
            index = loaded[f"{module}.index"].to(torch.int32)
            bias = loaded.get(f"{module}.bias")
            parts[module] = ModuleBypass(index, loaded[f"{module}.bypass"], bias)
            d_in = None if self._base is None else self._base.shapes[module][1]
            faults += index_faults(module, index, d_in)
        for name, tensor in loaded.items():
            faults += [] if name.endswith(".index") else value_faults(name, tensor)
        head = loaded.get(HEAD)
        if faults or damage:  # which value is wrong says more than that some are
            raise AdapterFormatError(header.source, (faults or damage)[:MAX_FAULTS])
        return Adapter(header.config, parts, header.digest, head)

    def _shared(self, config: AdapterConfig) -> AdapterConfig:
        """The config, its fields those of another that is equal but for the metadata: thousands of
        adapters keep one copy."""
        plain = replace(config, metadata={})
        key = (
            *(plain.k, plain.target_modules, plain.labels),
            *(plain.base_fingerprint, plain.base_model_name_or_path),
        )
        known = self._configs.get(key)
        if known is None or replace(known, metadata={}) != plain:
            if len(self._configs) >= _MOST_CHECKED:
                self._configs.clear()
            self._configs[key] = known = plain
        return replace(known, metadata=config.metadata) if config.metadata else known

    def _tensors(
        self, config: AdapterConfig, header_bytes: bytes, file_size: int, source: str
    ) -> Mapping[str, TensorSpan]:
        # The same bytes around the digest parse to the same header around the digest.
        blank = _SAID_SHA256.sub(b'"data_sha256":""', header_bytes, count=1)
        of_config = (config.k, config.target_modules, config.base_fingerprint, config.labels)
        key = (blank, file_size, *of_config)
        if (known := self._checked.get(key)) is None:
            known = _check_header(
                config, header_bytes, file_size, self._base, self._allow_other_base, source
            )
            if len(self._checked) >= _MOST_CHECKED:
                self._checked.clear()
            self._checked[key] = known
        return known


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
    reader = AdapterReader(base, allow_other_base=allow_other_base)
    return reader.adapter(reader.header(path, root))


def _resolved_within(path: Path, root: Path) -> str | None:
    """The path without links; None where it leads out of root, or nowhere."""
    try:
        resolved, inside = os.path.realpath(path), os.path.realpath(root)
    except (OSError, ValueError):  # a NUL in the name
        return None
    return resolved if resolved == inside or resolved.startswith(f"{inside}{os.sep}") else None


def _open_file(path: Path, limit: int, root: Path | None, source: str) -> BufferedReader:
    """A regular file of at most `limit` bytes, opened for reading."""
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
    status, fault = os.fstat(fd), ""
    if not stat.S_ISREG(status.st_mode):
        fault = f"{path.name} is not a regular file"
    elif status.st_size > limit:
        fault = f"{path.name} has {status.st_size} bytes, at most {limit} expected"
    if fault:
        os.close(fd)
        raise AdapterFormatError(source, [fault])
    return os.fdopen(fd, "rb")


def _read_whole(file: BufferedReader, source: str) -> bytes:
    """All bytes of a file opened at its start; as many as it had when it was opened."""
    size = os.fstat(file.fileno()).st_size
    data = file.read(size + 1)
    if len(data) != size:
        raise AdapterFormatError(source, ["a file changed while it was read; load it again"])
    return data


def _stamp(file: BufferedReader) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def adapter_stamp(path: Path) -> tuple[int, ...]:
    """`AdapterHeader.stamp` of the files in an adapter directory just now.

    Raises:
        OSError: they are not there.
    """
    stamp: list[int] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        status = os.stat(path / name)
        stamp += (status.st_size, status.st_mtime_ns, status.st_ino)
    return tuple(stamp)


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _rest_sha256(file: BufferedReader) -> str:
    """Of the bytes that are still to be read."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


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
    for key in sorted(raw.keys() - CONFIG_KEYS.keys()):
        faults.append(f"{CONFIG_FILE} has unknown key {key[:40]!r}")
    for key, (kind, required) in CONFIG_KEYS.items():
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
        raise AdapterFormatError(source, faults[:MAX_FAULTS])
    return AdapterConfig(**{**raw, "target_modules": tuple(targets), "labels": labels})


def _most_bytes(config: AdapterConfig, base: BaseSpec) -> int:
    """No valid weights file for this base is larger: the header, 8 bytes an entry, 4 a bias."""
    rows = sum(d_out for d_out, _ in base.shapes.values())
    widest = max(d_in for _, d_in in base.shapes.values())
    head = len(config.labels) * (base.hidden_size or widest) * 4
    return 8 + MAX_HEADER_BYTES + rows * (min(config.k, widest) * 8 + 4) + head


def _header_size(start: bytes) -> int:
    return int.from_bytes(start, "little")


def _parse_header(
    header_bytes: bytes, file_size: int
) -> tuple[dict[str, TensorSpan], dict[str, str], list[str]]:
    """Tensor table and metadata of a safetensors file, or the faults that keep it unread.

    Args:
        header_bytes: the start of the file, up to where its tensors begin.
    """
    if len(header_bytes) < 8:
        fault = f"{WEIGHTS_FILE} has {file_size} bytes, no safetensors file is that short"
        return {}, {}, [fault]
    size = _header_size(header_bytes[:8])
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


def _check_header(
    config: AdapterConfig,
    header_bytes: bytes,
    file_size: int,
    base: BaseSpec | None,
    allow_other_base: bool,
    source: str,
) -> Mapping[str, TensorSpan]:
    """The tensors that a weights file has, by its header.

    Raises:
        AdapterFormatError
    """
    tensors, metadata, faults = _parse_header(header_bytes, file_size)
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])
    said = _SAID_SHA256.search(header_bytes)
    if metadata.get(DATA_SHA256) != (None if said is None else said[1].decode()):
        faults.append(f"__metadata__ {DATA_SHA256} must be 64 hexadecimal digits, and stand once")
    for key, value in weights_metadata(config).items():
        if metadata.get(key) != value:
            found = str(metadata.get(key))[:80]
            faults.append(f"__metadata__ {key} is {found!r}, {CONFIG_FILE} implies {value!r}")
    if base is not None and (fault := base_fault(config, base, allow_other_base)):
        faults.append(fault)
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    faults += table_faults(table, config, base)
    if faults:
        raise AdapterFormatError(source, faults[:MAX_FAULTS])
    return tensors
