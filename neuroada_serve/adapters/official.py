"""A reader of the official code's runs (arXiv:2510.18940) that does not trust them.

A run's folder holds args.json, positions.npy and tunable_para/state_dict_tunable.pt; runs on GLUE
have the last in checkpoint folders instead. Per module M, M.weight_new [n] has the values and
positions["M.weight"] [n, 2] their (row, column). Runs of the `_appr` kind share columns among rows:
indices.npy [modules, k], and M.weight_new is [d_out, k]. Runs with --tuneBias also hold M.bias
[d_out], the trained bias itself.
"""

import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroada_serve.adapters.entries import Entries
from neuroada_serve.adapters.inert_pickle import InertPickleError, Stateful, read_pickle
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError

ARGS_FILE = "args.json"
POSITIONS_FILE = "positions.npy"
INDICES_FILE = "indices.npy"
VALUES_FILE = "state_dict_tunable.pt"
_VALUES_FOLDER = "tunable_para"
_SUFFIX = ".weight_new"
_BIAS_SUFFIX = ".bias"
_APPROXIMATE = "_appr"
_MOST_NAMED = 5  # tensors that a refusal names


@dataclass(frozen=True)
class OfficialRun:
    """The result of one training run.

    modules: by name. args: of args.json; empty where there is none.
    biases: [d_out] what trained biases had become, by module, all of them among modules.
    bias_twice: whether the run's forward added each layer's bias twice.
    """

    modules: Mapping[str, Entries]
    biases: Mapping[str, Tensor]
    args: Mapping[str, Any]
    bias_twice: bool


def read_official(folder: Path) -> OfficialRun:
    """Read the folder of a run, or of one of its checkpoints.

    Raises:
        AdapterNotFoundError: a file is not there.
        AdapterFormatError: it is of a kind that has no sparse values, holds dense ones too, or is
            broken.
    """
    source = repr(folder.name)
    values_file = _find(folder, (f"{_VALUES_FOLDER}/{VALUES_FILE}", VALUES_FILE))
    args = _read_args(folder, source)
    peft_type = str(args.get("peft_type", ""))
    if args and "_add" not in peft_type:
        raise AdapterFormatError(
            source,
            [
                f"its peft_type is {peft_type!r}, which trains dense weights; only the kinds with "
                "'_add' keep sparse values. Convert the difference of its checkpoint and the base "
                "instead: neuroada convert diff"
            ],
        )
    values = _read_values(values_file, source)
    positions = _read_positions(_find(folder, (POSITIONS_FILE, f"../{POSITIONS_FILE}")), source)
    names = [name.removesuffix(_SUFFIX) for name in values if name.endswith(_SUFFIX)]
    biases = {
        name.removesuffix(_BIAS_SUFFIX): value.float()
        for name, value in values.items()
        if name.endswith(_BIAS_SUFFIX)
    }
    if alone := [name for name in biases if name not in names]:
        raise AdapterFormatError(
            source, [f"it trained biases of {_listed(alone)} without values; an adapter cannot"]
        )
    if missing := [name for name in names if f"{name}.weight" not in positions]:
        raise AdapterFormatError(
            source, [f"{POSITIONS_FILE} has no positions of {_listed(missing)}"]
        )
    approximate = peft_type.endswith(_APPROXIMATE) or any(
        values[name + _SUFFIX].ndim == 2 for name in names
    )
    if approximate:
        indices = _read_indices(_find(folder, (INDICES_FILE, f"../{INDICES_FILE}")), source)
        if len(indices) != len(positions):
            raise AdapterFormatError(
                source,
                [f"{INDICES_FILE} has {len(indices)} rows, {POSITIONS_FILE} {len(positions)}"],
            )
        places = {
            key.removesuffix(".weight"): row for key, row in zip(positions, indices, strict=True)
        }
        modules = {
            name: _shared_columns(name, values[name + _SUFFIX], places[name], source)
            for name in names
        }
    else:
        modules = {
            name: _single(name, values[name + _SUFFIX], positions[f"{name}.weight"], source)
            for name in names
        }
    return OfficialRun(modules, biases, args, bias_twice=approximate)


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise AdapterNotFoundError(
        f"{folder} has no {names[0]}; name the folder that the official code wrote, with "
        f"{POSITIONS_FILE} and {_VALUES_FOLDER}/{VALUES_FILE}, or a checkpoint folder in it"
    )


def _read_args(folder: Path, source: str) -> dict[str, Any]:
    for file in (folder / ARGS_FILE, folder.parent / ARGS_FILE):
        if file.is_file():
            try:
                args = json.loads(file.read_bytes())
            except (ValueError, RecursionError) as error:
                raise AdapterFormatError(source, [f"{ARGS_FILE} is not JSON: {error}"]) from error
            if not isinstance(args, dict):
                raise AdapterFormatError(source, [f"{ARGS_FILE} must hold a JSON object"])
            return args
    return {}


def _read_values(file: Path, source: str) -> dict[str, Tensor]:
    """Return M.weight_new and M.bias by name."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a broken file
        raise AdapterFormatError(
            source,
            [f"{VALUES_FILE} is no file of tensors: it is broken, or more than tensors is in it"],
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise AdapterFormatError(source, [f"{VALUES_FILE} must hold tensors by name"])
    faults = []
    ours = (_SUFFIX, _BIAS_SUFFIX)
    if dense := [str(name) for name in loaded if not str(name).endswith(ours)]:
        faults.append(
            f"it trained {_listed(dense)} densely too, and an adapter has no place for that: train "
            "without --selectallhead"
        )
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            faults.append(f"{name} in {VALUES_FILE} is no plain tensor")
        elif not tensor.is_floating_point() and not dense:
            faults.append(f"{name} has dtype {tensor.dtype}, values are floats")
    if faults:
        raise AdapterFormatError(source, faults)
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _single(module: str, value: Tensor, places: Tensor, source: str) -> Entries:
    if value.ndim != 1 or places.shape != (len(value), 2):
        raise AdapterFormatError(
            source,
            [
                f"{module} has values {list(value.shape)} at positions {list(places.shape)}; "
                "[n] and [n, 2] belong together"
            ],
        )
    return Entries(places[:, 0].contiguous(), places[:, 1].contiguous(), value)


def _shared_columns(module: str, value: Tensor, columns: Tensor, source: str) -> Entries:
    if value.ndim != 2 or value.shape[1] != len(columns):
        raise AdapterFormatError(
            source,
            [
                f"{module} has values {list(value.shape)} and {len(columns)} columns; [d_out, k] "
                "and k belong together"
            ],
        )
    d_out, k = value.shape
    row = torch.arange(d_out).repeat_interleave(k)
    return Entries(row, columns.repeat(d_out), value.flatten())


# --- .npy files --------------------------------------------------------------------------------


def _read_indices(file: Path, source: str) -> Tensor:
    """Return indices.npy, [modules, k] int64."""
    try:
        with file.open("rb") as opened:
            array = np.lib.format.read_array(opened, allow_pickle=False)
    except Exception as error:  # numpy raises tokenize's errors too
        raise AdapterFormatError(source, [f"{INDICES_FILE} is no array: {error}"]) from error
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise AdapterFormatError(
            source,
            [f"{INDICES_FILE} has {array.dtype} {list(array.shape)}, not integers [modules, k]"],
        )
    return torch.from_numpy(array.astype(np.int64))


def _read_positions(file: Path, source: str) -> dict[str, Tensor]:
    """Return name of a weight -> [n, 2] int64. The file is an array of one object, a pickled
    dict."""
    data = file.read_bytes()
    opened = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(opened)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(opened)
    except Exception as error:  # numpy raises tokenize's errors too
        raise AdapterFormatError(source, [f"{POSITIONS_FILE} is no .npy file: {error}"]) from error
    if shape != () or not dtype.hasobject:
        raise AdapterFormatError(source, [f"{POSITIONS_FILE} is an array, not positions by name"])
    try:
        # Each storage is read once: a file could ask for the same one a million times.
        storages = {"torch.storage._load_from_bytes": functools.cache(_storage)}
        array = read_pickle(data[opened.tell() :], _PICKLED | storages)
    except InertPickleError as error:
        raise AdapterFormatError(
            source, [f"{POSITIONS_FILE} is not read, and nothing in it was run: {error}"]
        ) from error
    positions = _only_object(array)
    if not isinstance(positions, dict) or not all(
        isinstance(t, Tensor) and t.dtype == torch.int64 for t in positions.values()
    ):
        raise AdapterFormatError(
            source, [f"{POSITIONS_FILE} must hold int64 positions by the name of their weight"]
        )
    return positions


class _Array(Stateful):
    """A stand-in that becomes an array of objects. state: version, shape, dtype, order,
    [objects]."""


def _only_object(array: object) -> object:
    state = array.state if isinstance(array, _Array) else None
    if isinstance(state, tuple) and len(state) == 5:
        objects = state[4]
        if isinstance(objects, list) and len(objects) == 1:
            return objects[0]
    return None


def _storage(data: object) -> Tensor:
    """Return the elements of a tensor from a file inside the file: [elements], flat."""
    if not isinstance(data, bytes):
        raise InertPickleError("a tensor's elements are not bytes")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a broken file
        raise InertPickleError("a tensor's elements cannot be read") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise InertPickleError("a tensor's elements are something else")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a tensor made from a storage's elements."""
    if not (isinstance(storage, Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise InertPickleError("a tensor has no shape")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride)):
        raise InertPickleError("a tensor's shape is not made of natural numbers")
    if math.prod(size) > len(storage):
        raise InertPickleError("a tensor has more elements than the file")
    try:
        return storage.as_strided(size, stride, offset)
    except RuntimeError as error:
        raise InertPickleError("a tensor lies outside its elements") from error


_PICKLED: dict[str, Callable[..., object] | None] = {
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.ndarray": None,
    "numpy.dtype": lambda *_: Stateful(),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "collections.OrderedDict": lambda: {},
}
