"""A reader of adapter directories, which are hostile input.

They are opened without following a link out of `root`, read into memory, and checked before a
tensor is made of them. The config, the header, the table of tensors and the values are checked one
after the other; all faults of a stage are reported together.

An adapter can be known without its values being read: its config and the header of its weights file
say what it holds, and which bytes belong to it.
"""

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from neuroada_serve.adapters.format import (
    CONFIG_FILE,
    DATA_SHA256,
    HEAD,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    BaseSpec,
    ModuleBypass,
    base_fault,
    content_faults,
    file_digest,
)
from neuroada_serve.adapters.parse import (
    SAID_SHA256,
    TensorSpan,
    check_header,
    header_size,
    parse_config,
)
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError, UsageError

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 4 << 30
_STAMP_FIELDS = 3  # of a file: size, time, inode
_MOST_CHECKED = 64  # headers kept as checked, at most MAX_HEADER_BYTES each


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter known by its config and its weights file's header, both checked; its values are
    not read yet.

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
        """Names of its modules, sorted."""
        return sorted({name.rpartition(".")[0] for name in self.tensors if name != HEAD})

    @property
    def nnz(self) -> int:
        """Number of values in all modules together, biases included."""
        kinds = (".bypass", ".bias")
        return sum(math.prod(t.shape) for name, t in self.tensors.items() if name.endswith(kinds))

    @property
    def size_bytes(self) -> int:
        """Size of the weights file."""
        return self.stamp[-_STAMP_FIELDS]

    @property
    def source(self) -> str:
        """The name that messages give it."""
        return repr(self.path.name)


class AdapterReader:
    """Read adapter directories for one base. Safe in any thread.

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
        """Check an adapter's config and its weights file's header.

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
        config = self._shared(parse_config(config_bytes, source))
        fault = self._base and base_fault(config, self._base, self._allow_other_base)
        if fault:  # modules, shapes and a size that differ only follow from it
            raise AdapterFormatError(source, [fault])
        limit = MAX_WEIGHTS_BYTES if self._base is None else _most_bytes(config, self._base)
        with _open_file(directory / WEIGHTS_FILE, limit, root, source) as file:
            stamp = _stamp(file)
            start = file.read(8)
            header_bytes = start + file.read(min(header_size(start), MAX_HEADER_BYTES))
            tensors = self._tensors(config, header_bytes, stamp[0], source)
            said = SAID_SHA256.search(header_bytes)
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
        """Read the bytes of the weights file anew; also return a fault if they do not match its
        header.

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
        said = SAID_SHA256.search(start)
        if said is None or file_digest(start, said[1].decode()) != header.digest:
            raise changed
        return data, [
            f"{WEIGHTS_FILE} is damaged: its values are not those that its header was written for "
            f"({DATA_SHA256} differs); copy it again, or, where you changed them yourself, save it "
            "with save_adapter"
        ]

    def adapter(self, header: AdapterHeader) -> Adapter:
        """Read the whole adapter and check its values.

        Raises:
            AdapterNotFoundError, AdapterFormatError.
        """
        data, damage = self.data(header)
        try:
            loaded = safetensors.torch.load(data)
        except SafetensorError as error:
            raise AdapterFormatError(header.source, [f"{WEIGHTS_FILE}: {error}"]) from error
        parts: dict[str, ModuleBypass] = {}
        for module in header.modules:
            index = loaded[f"{module}.index"].to(torch.int32)
            bias = loaded.get(f"{module}.bias")
            parts[module] = ModuleBypass(index, loaded[f"{module}.bypass"], bias)
        head = loaded.get(HEAD)
        faults = content_faults(parts, head, self._base)
        if faults or damage:  # which value is wrong says more than that some are
            raise AdapterFormatError(header.source, faults or damage)
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
        blank = SAID_SHA256.sub(b'"data_sha256":""', header_bytes, count=1)
        of_config = (config.k, config.target_modules, config.base_fingerprint, config.labels)
        key = (blank, file_size, *of_config)
        if (known := self._checked.get(key)) is None:
            known = check_header(config, header_bytes, file_size, self._base, source)
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
        UsageError: these are no path and no BaseSpec.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"path must be an adapter's folder, not {type(path).__name__}")
    if not isinstance(base, BaseSpec | None):
        raise UsageError(
            f"base must be a BaseSpec, such as LLM(...).engine.base.spec, not {type(base).__name__}"
        )
    reader = AdapterReader(base, allow_other_base=allow_other_base)
    return reader.adapter(reader.header(path, root))


def _resolved_within(path: Path, root: Path) -> str | None:
    """Return the path without links; None if it leads out of root, or nowhere."""
    try:
        resolved, inside = os.path.realpath(path), os.path.realpath(root)
    except (OSError, ValueError):  # a NUL in the name
        return None
    return resolved if resolved == inside or resolved.startswith(f"{inside}{os.sep}") else None


def _open_file(path: Path, limit: int, root: Path | None, source: str) -> BufferedReader:
    """Open a regular file of at most `limit` bytes for reading."""
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
    """Read all bytes of a file opened at its start; as many as it had when it was opened."""
    size = os.fstat(file.fileno()).st_size
    data = file.read(size + 1)
    if len(data) != size:
        raise AdapterFormatError(source, ["a file changed while it was read; load it again"])
    return data


def _stamp(file: BufferedReader) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def adapter_stamp(path: Path) -> tuple[int, ...]:
    """Return the present `AdapterHeader.stamp` of the files in an adapter directory.

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
    """Return the sha256 of the bytes that are still to be read."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _most_bytes(config: AdapterConfig, base: BaseSpec) -> int:
    """Return the size that no valid weights file for this base exceeds: the header, 8 bytes an
    entry, 4 a bias."""
    rows = sum(d_out for d_out, _ in base.shapes.values())
    widest = max(d_in for _, d_in in base.shapes.values())
    head = config.task.head_rows * (base.hidden_size or widest) * 4
    return 8 + MAX_HEADER_BYTES + rows * (min(config.k, widest) * 8 + 4) + head
