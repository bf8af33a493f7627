"""Convert adapters of other formats to ours, and ours to PEFT's SHiRA.

Every origin is reduced to single entries of the base's weights. They are written as rows of k: the
largest |value| of a row that has more, filled up with zeros where a row has fewer.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroada_serve.adapters.durable import check_new_folder
from neuroada_serve.adapters.entries import Entries, as_rows
from neuroada_serve.adapters.format import (
    Adapter,
    AdapterConfig,
    ModuleBypass,
    check_adapter,
    make_adapter,
    save_adapter,
    target_modules,
)
from neuroada_serve.adapters.official import ARGS_FILE, OfficialRun, read_official
from neuroada_serve.adapters.peft_files import (
    largest_places,
    read_shira,
    read_supertuning,
    write_shira,
)
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.errors import AdapterError, AdapterFormatError, ModelError, UsageError
from neuroada_serve.model.differences import (
    bias_difference,
    check_same_architecture,
    other_differences,
)
from neuroada_serve.model.loader import (
    BaseModel,
    adaptable_modules,
    is_transposed,
    load_base,
    load_checked,
)
from neuroada_serve.model.source import ModelSource

_DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_LONGEST_TEXT = 200  # of a setting in the metadata
_MOST_NAMED = 5  # parameters that a warning names
_MUCH_LOST = 0.9  # of the energy kept; below it, a warning
_MUCH_FILLED = 0.5  # of the values; above it, a warning
_NEARLY_ALL = 0.99  # of the energy
_RIGHT_BASE = 0.99  # of the entries among the largest weights; below it, a warning


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    adapter: as written.
    num_entries: values that the origin changes, none of them 0.
    kept: by module, the share of the origin's energy (sum of squared values) that it has.
    kept_in_all: the same over all modules.
    warnings: in a sentence each.
    """

    adapter: Adapter
    num_entries: int
    kept: Mapping[str, float]
    kept_in_all: float
    warnings: tuple[str, ...]

    @property
    def filled(self) -> float:
        """Return the share of the adapter's values that only fill rows up."""
        return _filled(self.adapter)


def _filled(adapter: Adapter) -> float:
    values = sum(int((part.bypass != 0).sum()) for part in adapter.modules.values())
    return 1 - values / adapter.nnz


@dataclass(frozen=True)
class _Origin:
    """The changes that are to be converted.

    energy: by module, of all that the origin changes, where modules have only a part of it.
    biases: [d_out] float32 what is added to biases, by module, all of them among modules.
    """

    name: str
    kind: str
    modules: Mapping[str, Entries]
    selection: str
    metadata: Mapping[str, Any]
    num_entries: int
    energy: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    biases: Mapping[str, Tensor] = field(default_factory=dict)


def convert_official(
    source: ModelSource, run: Path, out: Path, k: int | None = None, dtype: str = "auto"
) -> Conversion:
    """Convert a run of the method's official code, see `adapters.official`.

    Args:
        source: the base that it was trained on.
        run: folder of the run, or of one of its checkpoints.
        out: a folder that does not exist yet, or is empty.
        k: keep no more than the k largest |value| of each row; None keeps all.
        dtype: of the values in the file; auto is as stored, float32 for those the format lacks.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    _check_arguments(out, k, dtype)
    found = read_official(run)
    base = _loaded(source)
    peft_type = str(found.args.get("peft_type", ""))
    origin = _whole(
        base,
        run.name,
        "official",
        found.modules,
        "magnitude" if peft_type == "perCell_mag_add" else _as_text(peft_type) or "official",
        {"args": _recorded(found.args)} if found.args else {},
    )
    origin = replace(origin, biases=_official_biases(base, run.name, found))
    if peft_type == "perCell_mag_add":
        share = _share_of_largest(base, found.modules)
        if share < _RIGHT_BASE:
            warning = (
                f"only {share:.1%} of its positions are among the largest weights of "
                f"{base.spec.name!r}, where its kind selects: is this the base it was trained on?"
            )
            origin = replace(origin, warnings=(warning,))
    if not found.args:
        origin = replace(
            origin, warnings=(f"it has no {ARGS_FILE}; its recipe is unknown", *origin.warnings)
        )
    return _written(base, origin, out, k, dtype)


def convert_shira(
    source: ModelSource, folder: Path, out: Path, k: int | None = None, dtype: str = "auto"
) -> Conversion:
    """Convert a SHiRA adapter that PEFT saved. Arguments as of `convert_official`.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    _check_arguments(out, k, dtype)
    modules, config = read_shira(folder)
    metadata = _recorded(config, ("base_model_name_or_path", "r", "mask_type"))
    base = _loaded(source)
    origin = _whole(base, folder.name, "shira", modules, "shira", metadata)
    return _written(base, origin, out, k, dtype)


def convert_supertuning(
    source: ModelSource, folder: Path, out: Path, k: int | None = None, dtype: str = "auto"
) -> Conversion:
    """Convert a Super-Tuning adapter that PEFT saved. Arguments as of `convert_official`.

    Where it was saved without indices they are found anew in the base's weights, with a warning.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    _check_arguments(out, k, dtype)
    found, files = read_supertuning(folder)
    base = _loaded(source)
    adaptable = adaptable_modules(base.model)
    modules, warnings = {}, []
    for name, (value, places) in found.items():
        if name not in adaptable:
            raise _no_module(files.source, base, [name])
        weight = _matrix(adaptable[name])
        d_in = weight.shape[1]
        if places is None:
            if len(value) > weight.numel():
                raise AdapterFormatError(
                    files.source,
                    [f"{name} has {len(value)} values, the base only {weight.numel()} weights"],
                )
            places = largest_places(weight, len(value), bool(files.config.get("select_top", True)))
            warnings = [
                "it was saved without indices; they were found anew in the weights of "
                f"{base.spec.name!r} as PEFT does. Where weights tie, or with another copy of the "
                "base, they can differ from those that were trained"
            ]
        modules[name] = Entries(places // d_in, places % d_in, value)
    metadata = _recorded(files.config, ("base_model_name_or_path", "sparsity", "select_top"))
    origin = _whole(base, folder.name, "supertuning", modules, "supertuning", metadata)
    return _written(base, replace(origin, warnings=tuple(warnings)), out, k, dtype)


def convert_diff(
    source: ModelSource, tuned: ModelSource, out: Path, k: int, dtype: str = "auto"
) -> Conversion:
    """Keep the k largest |difference| in each row between a fine-tuned checkpoint and its base.

    Args:
        source: the base.
        tuned: the checkpoint, of the same architecture.
        out: a folder that does not exist yet, or is empty.
        k: at most so many in each row; fewer where no row differs in as many.
        dtype: of the values in the file; auto is float32, which gives the checkpoint's own weights
            back when it is merged, as a rule to the bit.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    _check_arguments(out, k, dtype)
    base = _loaded(source)
    model = load_checked(tuned)
    ours, theirs = adaptable_modules(base.model), adaptable_modules(model)
    check_same_architecture(base, model, tuned.name)
    modules, biases, energy, num_entries = {}, dict[str, Tensor](), {}, 0
    for name in ours:
        weight = _matrix(ours[name])
        difference = _matrix(theirs[name]).float() - weight.float()
        bias = bias_difference(ours[name], theirs[name])
        if bias is not None:
            biases[name] = bias
        elif not bool((difference != 0).any()):
            continue
        if not all(bool(d.isfinite().all()) for d in (difference, bias) if d is not None):
            raise ModelError(f"model {tuned.name!r} has NaN or infinite weights in {name}")
        num_entries += int((difference != 0).sum())
        energy[name] = float(difference.double().square().sum())
        column = magnitude_index(difference, min(k, weight.shape[1])).long()
        row = torch.arange(len(weight)).repeat_interleave(column.shape[1])
        entries = Entries(row, column.flatten(), difference.gather(1, column).flatten())
        modules[name] = entries.without_zeros()
    if not modules:
        raise ModelError(
            f"{tuned.name!r} has the weights of {base.spec.name!r} in all modules that an adapter "
            "can change; there is nothing to convert"
        )
    warnings: tuple[str, ...] = ()
    if others := other_differences(base.model, model):
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        warnings = (
            f"{', '.join(others[:_MOST_NAMED])}{more} differ too, and stay those of the base: an "
            "adapter changes linear layers in the model's blocks alone",
        )
    origin = _Origin(
        tuned.name, "diff", modules, "difference", {}, num_entries, energy, warnings, biases
    )
    return _written(base, origin, out, k, dtype)


def export_shira(source: ModelSource, adapter: Path, out: Path) -> int:
    """Write an adapter as PEFT's SHiRA, see `write_shira`, and return its r.

    Args:
        source: the adapter's base.
        adapter: an adapter directory.
        out: a folder that does not exist yet, or is empty.

    Raises:
        UsageError: its subclasses name what is wrong.
    """
    check_new_folder(out)
    base = _loaded(source)
    loaded = load_adapter(adapter, base.spec)
    if loaded.head is not None:
        noun = loaded.config.task.noun
        raise AdapterError(f"adapter {adapter.name!r} is a {noun}; PEFT's SHiRA has no head")
    if any(part.bias is not None for part in loaded.modules.values()):
        raise AdapterError(f"adapter {adapter.name!r} has biases; PEFT's SHiRA has none")
    for name, module in adaptable_modules(base.model).items():
        if name in loaded.modules and is_transposed(module):
            raise AdapterError(f"PEFT has no SHiRA for {name}, a {type(module).__name__}")
    return write_shira(loaded, base.spec, out)


# --- what all have in common -------------------------------------------------------------------


def _check_arguments(out: Path, k: int | None, dtype: str) -> None:
    check_new_folder(out)
    if k is not None and k < 1:
        raise UsageError(f"k must be at least 1, is {k}")
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")


def _loaded(source: ModelSource) -> BaseModel:
    """Load a base in its stored dtype, on the host, where only weights that are read take
    memory."""
    return load_base(source, "auto", "cpu")


def _matrix(module: Any) -> Tensor:
    """Return a layer's weight as [d_out, d_in], a view."""
    weight: Tensor = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


def _whole(
    base: BaseModel,
    name: str,
    kind: str,
    modules: Mapping[str, Entries],
    selection: str,
    metadata: Mapping[str, Any],
) -> _Origin:
    """Make an origin whose entries are all at hand.

    Raises:
        AdapterFormatError: the base has no such entries.
    """
    _check_places(base, name, modules)
    changed = {module: entries.without_zeros() for module, entries in modules.items()}
    return _Origin(
        name,
        kind,
        changed,
        selection,
        metadata,
        sum(len(entries.value) for entries in changed.values()),
        {module: entries.energy() for module, entries in changed.items()},
    )


def _official_biases(base: BaseModel, source: str, run: OfficialRun) -> dict[str, Tensor]:
    """Return the changes that a run has made to the base's biases.

    Raises:
        AdapterFormatError: the base has no such biases.
    """
    adaptable, biases, faults = adaptable_modules(base.model), dict[str, Tensor](), list[str]()
    for name in run.modules:
        trained, before = run.biases.get(name), adaptable[name].bias
        if before is None:
            faults += [] if trained is None else [f"{name} has no bias in the base"]
            continue
        if trained is None and not run.bias_twice:
            continue
        before = before.detach().float()
        after = before if trained is None else trained
        if after.shape != before.shape:
            faults.append(f"{name}.bias is {list(after.shape)}, the base's {list(before.shape)}")
        elif not bool(after.isfinite().all()):
            faults.append(f"{name}.bias has NaN or infinite values")
        else:
            biases[name] = (2 * after if run.bias_twice else after) - before
    if faults:
        raise AdapterFormatError(repr(source), faults)
    return biases


def _no_module(source: str, base: BaseModel, names: list[str]) -> AdapterFormatError:
    return AdapterFormatError(
        source,
        [f"{name} is no linear layer in the blocks of {base.spec.name!r}" for name in names],
    )


def _check_places(base: BaseModel, source: str, modules: Mapping[str, Entries]) -> None:
    adaptable = adaptable_modules(base.model)
    if missing := [name for name in modules if name not in adaptable]:
        raise _no_module(repr(source), base, missing)
    faults = []
    for name, entries in modules.items():
        if is_transposed(adaptable[name]):
            faults.append(f"{name} is a Conv1D in the base, which this method does not change")
        faults += [f"{name} {fault}" for fault in entries.faults(*base.spec.shapes[name])]
    if faults:
        raise AdapterFormatError(repr(source), faults)


def _share_of_largest(base: BaseModel, modules: Mapping[str, Entries]) -> float:
    """Return the share of the entries whose weights are among the largest of their rows, as many as
    the row has; compared in bfloat16, in which the official code usually selects."""
    adaptable = adaptable_modules(base.model)
    among = total = 0
    for name, entries in modules.items():
        if k := entries.most_in_a_row():
            magnitude = _matrix(adaptable[name]).abs().bfloat16()
            smallest = magnitude.gather(1, magnitude_index(magnitude, k)[:, -1:].long()).flatten()
            is_among = magnitude[entries.row, entries.column] >= smallest[entries.row]
            among += int(is_among.sum())
            total += len(is_among)
    return among / total if total else 1.0


def _written(base: BaseModel, origin: _Origin, out: Path, k: int | None, dtype: str) -> Conversion:
    """Write the origin's changes as an adapter of the base."""
    narrowest = min(origin.modules, key=lambda name: base.spec.shapes[name][1])
    d_in = base.spec.shapes[narrowest][1]
    fullest = max(origin.modules, key=lambda name: origin.modules[name].most_in_a_row())
    most = max(1, origin.modules[fullest].most_in_a_row())
    used_k = most if k is None else min(k, most)
    if used_k > d_in:
        raise UsageError(
            f"a row of {fullest} has {most} entries and {narrowest} only d_in={d_in} inputs, while "
            f"k is one for all modules; keep the largest with --k, up to {d_in}"
        )

    adaptable = adaptable_modules(base.model)
    parts, kept_energy = {}, {}
    for name, entries in origin.modules.items():
        largest = entries.largest(used_k)
        kept_energy[name] = largest.energy()
        part = as_rows(largest, _matrix(adaptable[name]), used_k)
        stored = part.bypass.dtype if part.bypass.dtype in _DTYPES.values() else torch.float32
        bias = origin.biases.get(name)
        parts[name] = ModuleBypass(
            part.index,
            part.bypass.to(_DTYPES[dtype] or stored),
            None if bias is None else bias.to(_DTYPES[dtype] or torch.float32),
        )
    kept = {name: _share(kept_energy[name], origin.energy[name]) for name in parts}
    in_all = _share(sum(kept_energy.values()), sum(origin.energy.values()))
    warnings = list(origin.warnings)
    if not origin.num_entries and not any(bool(b.any()) for b in origin.biases.values()):
        warnings.append("all its values are 0: it answers as the base does")
    if in_all < _MUCH_LOST:
        warnings.append(
            f"only {in_all:.1%} of the energy is kept with k={used_k}: answers will differ from "
            "the original's; a larger --k keeps more"
        )

    adapter = make_adapter(
        AdapterConfig(
            base_model_name_or_path=base.spec.name,
            base_fingerprint=base.spec.fingerprint,
            k=used_k,
            target_modules=target_modules(parts, base.spec.shapes),
            selection=origin.selection,
            metadata={
                "converted_from": {
                    "kind": origin.kind,
                    "name": _as_text(origin.name),
                    "entries": origin.num_entries,
                    "energy_kept": round(in_all, 6),
                    **origin.metadata,
                }
            },
        ),
        parts,
    )
    if k is None and used_k > 1 and (filled := _filled(adapter)) > _MUCH_FILLED:
        warnings.append(
            f"{filled:.0%} of the values only fill rows up to k={used_k}, which the fullest row "
            f"needs; --k {_enough_k(origin, most)} would keep {_NEARLY_ALL:.0%} of the energy"
        )
    check_adapter(adapter, base.spec)
    save_adapter(adapter, out)
    return Conversion(adapter, origin.num_entries, kept, in_all, tuple(warnings))


def _enough_k(origin: _Origin, most: int) -> int:
    """Return the smallest k that keeps nearly all energy."""
    by_rank = torch.stack([e.energy_by_rank(most) for e in origin.modules.values()]).sum(0)
    return int((by_rank.cumsum(0) < _NEARLY_ALL * by_rank.sum()).sum()) + 1


def _recorded(found: Mapping[str, Any], keys: Collection[str] | None = None) -> dict[str, Any]:
    """Keep those settings of a file that an adapter's metadata can hold: texts and finite
    numbers."""
    recorded: dict[str, Any] = {}
    for key, value in found.items():
        if keys is None or key in keys:
            if isinstance(value, str):
                recorded[_as_text(key)] = _as_text(value)
            elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
                recorded[_as_text(key)] = value
    return recorded


def _as_text(text: str) -> str:
    """Cut a text to a length, and replace what is not Unicode."""
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 1.0  # the two are summed in different orders
