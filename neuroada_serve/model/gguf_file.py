"""Read a GGUF file, whole or split in parts, as metadata and tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from neuroada_serve.errors import ModelError

# llama.cpp's names for parts.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_NAMED = 5


def gguf_stem(path: Path) -> str:
    """Return the model's name: the file's, without the number of a part."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def gguf_parts(path: Path) -> list[Path]:
    """Return all files of the model that this one belongs to, in order.

    Raises:
        ModelError: this file or another part is not there; it names them.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        parts = [path]
    else:
        stem, count = part["stem"], int(part["count"])
        names = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
        parts = [path.with_name(name) for name in names]
    missing = [one.name for one in parts if not one.is_file()]
    if missing == [path.name]:
        raise ModelError(f"no file {str(path)!r}")
    if missing:
        raise ModelError(
            f"{path.name} is one part of {len(parts)}, and {named(missing)} is not beside it; put "
            "all parts into one folder"
        )
    return parts


def named(names: Sequence[str]) -> str:
    """Join the first few of these names, and say how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


@dataclass(frozen=True)
class GgufFile:
    """The contents of a GGUF model.

    name: of the file, for messages.
    metadata: its keys and values, those of the first part where it is split.
    tensors: by name, as stored; `values` reads one.
    """

    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]  # gguf.ReaderTensor

    def refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self.name} cannot be read as a GGUF causal LM: {reason}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in torch's order; GGUF lists dimensions the other way round."""
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor's numbers as float32.

        Raises:
            ModelError: stored in a way that the gguf package has no reader for.
        """
        tensor = self.tensors[name]
        try:
            found = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise self.refusal(f"tensor {name} is of type {kind}, which is not read") from None
        return np.array(found, dtype=np.float32).reshape(self.shape(name))

    @property
    def is_float32(self) -> bool:
        """All matrices are stored in float32."""
        matrices = [t for t in self.tensors.values() if len(t.shape) > 1]
        return all(t.tensor_type == GGMLQuantizationType.F32 for t in matrices)


def read_gguf(parts: Sequence[Path]) -> GgufFile:
    """Read the model in these files, in order. Tensors are mapped, not read yet.

    Raises:
        ModelError: no GGUF, cut short or damaged, or parts of different models.
    """
    readers = [_reader(path) for path in parts]
    metadata = _metadata(readers[0])
    file = GgufFile(parts[0].name, metadata, {t.name: t for r in readers for t in r.tensors})
    stated = int(metadata.get("split.count") or 1)
    if stated != len(parts):
        raise file.refusal(
            f"it is a part of {stated}, which its name does not say; name the parts "
            f"NAME-00001-of-{stated:05}.gguf and so on"
        )
    if len(parts) == 1:
        return file
    for number, (path, reader) in enumerate(zip(parts, readers, strict=True)):
        of = _metadata(reader, only=("split.no", "split.count"))
        if (of.get("split.no"), of.get("split.count")) != (number, len(parts)):
            raise file.refusal(f"{path.name} is not part {number + 1} of {len(parts)}")
    tensors = sum(len(reader.tensors) for reader in readers)
    if not tensors == len(file.tensors) == metadata.get("split.tensors.count"):
        raise file.refusal("its parts do not have the tensors that the first one announces")
    return file


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever unchecked lengths and offsets lead to
        raise ModelError(
            f"{path.name} cannot be read as a GGUF causal LM: it is no GGUF file, cut short or "
            f"damaged ({error}); download it again"
        ) from error


def _metadata(reader: GGUFReader, only: Sequence[str] = ()) -> dict[str, Any]:
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and (not only or key in only)
    }
