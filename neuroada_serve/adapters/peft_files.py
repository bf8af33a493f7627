"""PEFT's adapters of single weights: SHiRA is read and written, Super-Tuning is read.

An adapter's folder holds adapter_config.json and adapter_model.safetensors. Per module M,
base_model.model.M. and

SHiRA
    shira_weight [n] float32, shira_indices [2, n] int32: rows and columns, n = r * (d_in + d_out).
Super-Tuning
    supertuning_values [n] float32, supertuning_indices [n] int32: row * d_in + column, in no order;
    absent where the adapter was saved without them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.adapters.entries import Entries, from_rows
from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Adapter, BaseSpec
from neuroada_serve.errors import AdapterFormatError, AdapterNotFoundError, UsageError

_PREFIX = "base_model.model."
_MOST_NAMED = 5  # tensors that a refusal names


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as PEFT saved it: its config, and its tensors by module and kind."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    source: str


def read_peft(folder: Path, peft_type: str, kinds: tuple[str, ...]) -> PeftFiles:
    """Read the files of a PEFT adapter.

    Args:
        folder: the adapter's.
        peft_type: that its config must name.
        kinds: of tensors that a module may have, the first of which it must.

    Raises:
        AdapterNotFoundError: a file is not there.
        AdapterFormatError: of another type, broken, or with tensors of other kinds.
    """
    source = repr(folder.name)
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if (folder / "adapter_model.bin").is_file() and not weights_file.is_file():
        raise AdapterFormatError(
            source,
            [
                "adapter_model.bin is a pickle, which is not read; load it with PEFT where you "
                f"trust it and save it again, as {WEIGHTS_FILE}"
            ],
        )
    for file in (config_file, weights_file):
        if not file.is_file():
            raise AdapterNotFoundError(f"{folder} has no {file.name}; name a PEFT adapter's folder")
    try:
        config = json.loads(config_file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(source, [f"{CONFIG_FILE} is not JSON: {error}"]) from error
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterFormatError(
            source, [f"its peft_type is {str(found)[:40]!r}, not {peft_type!r}"]
        )
    try:
        loaded = safetensors.torch.load(weights_file.read_bytes())
    except SafetensorError as error:
        raise AdapterFormatError(source, [f"{WEIGHTS_FILE}: {error}"]) from error

    tensors: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in sorted(loaded.items()):
        module, _, kind = name.removeprefix(_PREFIX).rpartition(".")
        if kind not in kinds or not name.startswith(_PREFIX):
            others.append(name.removeprefix(_PREFIX))
        else:
            tensors.setdefault(module, {})[kind] = tensor
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        reason = (
            "trained without modules_to_save" if config.get("modules_to_save") else "without them"
        )
        raise AdapterFormatError(
            source,
            [
                f"it has {', '.join(others[:_MOST_NAMED])}{more}, and an adapter has no place for "
                f"dense tensors; only one {reason} can be converted"
            ],
        )
    faults = [f"{m} has no {kinds[0]}" for m, parts in tensors.items() if kinds[0] not in parts]
    if not tensors:
        faults.append(f"it has no {kinds[0]}")
    if faults:
        raise AdapterFormatError(source, faults)
    return PeftFiles(config, tensors, source)


# --- SHiRA -------------------------------------------------------------------------------------


def read_shira(folder: Path) -> tuple[dict[str, Entries], Mapping[str, Any]]:
    """Read a SHiRA adapter: its entries by module, and its config.

    Raises:
        AdapterNotFoundError, AdapterFormatError: see `read_peft`; or tensors that disagree.
    """
    files = read_peft(folder, "SHIRA", ("shira_weight", "shira_indices"))
    modules = {}
    for module, parts in files.tensors.items():
        value, places = parts["shira_weight"], parts.get("shira_indices")
        if places is None:
            raise AdapterFormatError(files.source, [f"{module} has no shira_indices"])
        if value.ndim != 1 or places.shape != (2, len(value)) or not value.is_floating_point():
            raise AdapterFormatError(
                files.source,
                [
                    f"{module} has shira_weight {list(value.shape)} and shira_indices "
                    f"{list(places.shape)}; [n] and [2, n] belong together"
                ],
            )
        # Saved on Windows, they are float32.
        if places.is_floating_point() and not torch.equal(places, places.trunc()):
            raise AdapterFormatError(files.source, [f"{module}.shira_indices are not integers"])
        row, column = places.long()
        modules[module] = Entries(row, column, value)
    return modules, files.config


def write_shira(adapter: Adapter, base: BaseSpec, folder: Path) -> int:
    """Write an adapter as PEFT's SHiRA, and return its r.

    SHiRA has r * (d_in + d_out) entries in each module and one r for all. It is the smallest that
    holds the adapter's values; the rest are other entries of value 0, spread over the matrix.

    Args:
        adapter: of this base.
        base: for the shapes.
        folder: made where it is absent.

    Raises:
        UsageError: a module has too few entries in all for so large an r.
    """
    entries = {name: from_rows(part) for name, part in adapter.modules.items()}
    shapes = {name: base.shapes[name] for name in entries}
    r = max(1, *(math.ceil(len(e.row) / sum(shapes[name])) for name, e in entries.items()))
    largest_r = {name: d_out * d_in // (d_out + d_in) for name, (d_out, d_in) in shapes.items()}
    tightest = min(largest_r, key=lambda name: largest_r[name])
    if r > largest_r[tightest]:
        fits = min(largest_r[tightest] * sum(shape) // shape[0] for shape in shapes.values())
        raise UsageError(
            f"SHiRA would need r={r}, and {tightest} {list(shapes[tightest])} allows no more than "
            f"r={largest_r[tightest]}; "
            + (f"an adapter with k up to {fits} fits" if fits else "no adapter of it fits")
        )
    tensors = {}
    for name, part in entries.items():
        d_out, d_in = shapes[name]
        places = _filled_up(part.row * d_in + part.column, r * (d_out + d_in), d_out * d_in)
        value = torch.zeros(d_out * d_in)
        value[part.row * d_in + part.column] = part.value.float()
        indices = torch.stack([places // d_in, places % d_in]).int()
        tensors[f"{_PREFIX}{name}.shira_weight"] = value[places]
        tensors[f"{_PREFIX}{name}.shira_indices"] = indices
    config = {
        "peft_type": "SHIRA",
        "task_type": adapter.config.task_type,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "r": r,
        "mask_type": "neuroada",  # none of PEFT's: it takes the indices of the file
        "target_modules": list(adapter.config.target_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_durably(folder / WEIGHTS_FILE, weights)
    write_durably(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    return r


def _filled_up(places: Tensor, count: int, size: int) -> Tensor:
    """Return [count] int64: these numbers of range(size), and others spread evenly over the
    rest; ascending."""
    free = torch.ones(size, dtype=torch.bool)
    free[places] = False
    rest = free.nonzero().flatten()
    missing = count - len(places)
    chosen = rest[torch.arange(missing) * len(rest) // max(1, missing)]
    return torch.cat([places, chosen]).sort().values


# --- Super-Tuning ------------------------------------------------------------------------------


def read_supertuning(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor | None]], PeftFiles]:
    """Read a Super-Tuning adapter: its values [n] and flat places [n] int64 by module, and its
    files.

    Places are None where the adapter was saved without them; `largest_places` finds them.

    Raises:
        AdapterNotFoundError, AdapterFormatError: see `read_peft`; or tensors that disagree.
    """
    files = read_peft(folder, "SUPERTUNING", ("supertuning_values", "supertuning_indices"))
    modules = {}
    for module, parts in files.tensors.items():
        value, places = parts["supertuning_values"], parts.get("supertuning_indices")
        if (
            value.ndim != 1
            or not value.is_floating_point()
            or (places is not None and (places.shape != value.shape or places.is_floating_point()))
        ):
            found = "none" if places is None else f"{list(places.shape)} {places.dtype}"
            raise AdapterFormatError(
                files.source,
                [
                    f"{module} has supertuning_values {list(value.shape)} {value.dtype} and "
                    f"supertuning_indices {found}; floats [n] and integers [n] belong together"
                ],
            )
        modules[module] = (value, None if places is None else places.long())
    return modules, files


def largest_places(weight: Tensor, count: int, largest: bool) -> Tensor:
    """Return the flat places [count] of the largest, or smallest, |weight| in PEFT's own order:
    the i-th value belongs to the i-th place. Ties are broken as torch breaks them, as PEFT does."""
    return weight.abs().flatten().topk(count, largest=largest).indices
