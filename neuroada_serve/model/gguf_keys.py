"""Read the settings of a GGUF model, each of which must be understood."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuroada_serve.model.gguf_file import GgufFile, named


class Keys:
    """The settings of a GGUF file by name, `ARCHITECTURE.name`.

    A setting that is read counts as understood; `refuse_others` refuses all that were never read:
    dropping them could make this another model.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._prefix = f"{architecture}."
        self._values = {
            key.removeprefix(self._prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self._prefix)
        }
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str, default: Any = None) -> Any:
        """Return a setting as stored. None as default: it must be there."""
        self._asked.add(name)
        if (found := self._values.get(name, default)) is None:
            raise self._file.refusal(f"it lacks key {self._prefix}{name}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Return the shortest decimal that is the file's float32: 1e-05, not
        9.999999747378752e-06."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._file.refusal(f"{self._prefix}{name} is {value!r}, not a number")
        return float(str(np.float32(value)))

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number; a list of equal entries, one for each layer, counts as one."""
        value = self.value(name, default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._file.refusal(f"{self._prefix}{name} is {value!r}, not one whole number")
        return value

    def text(self, name: str, default: str) -> str:
        return str(self.value(name, default))

    def accept(self, *names: str) -> None:
        """Accept settings that change nothing that is computed."""
        self._asked.update(names)

    def refuse_unless(self, name: str, harmless: Sequence[Any]) -> None:
        """Refuse a setting with any value but these."""
        self._asked.add(name)
        value = self._values.get(name)
        if value is not None and not any(_same(value, one) for one in harmless):
            raise self._file.refusal(
                f"{self._prefix}{name} is {value!r}, which transformers' model of this "
                "kind cannot do"
            )

    def refuse_others(self) -> None:
        """Refuse settings that nobody has asked for, by name."""
        if unknown := sorted(set(self._values) - self._asked):
            keys = named([self._prefix + name for name in unknown])
            raise self._file.refusal(
                f"what {keys} means is not known here, and dropping it could change the model"
            )


def _same(value: Any, other: Any) -> bool:
    """Tell whether two values are equal, or differ by no more than a file's float32 does."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)
