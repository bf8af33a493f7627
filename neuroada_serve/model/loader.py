"""Load a base model from a safetensors folder: weights, tokenizer, adaptable modules,
fingerprint."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from neuroada_serve.adapters.durable import write_durably
from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.errors import ModelError, UsageError
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.model.rotary import fix_rotation, longest_model_len
from neuroada_serve.model.source import ModelSource
from neuroada_serve.model.template import TurnEnd, choose_template, examine

_FINGERPRINT_FILE = "neuroada_fingerprint.json"
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_MOST_NAMED = 5  # tensors that a refusal names
_FLOATS = {"F64", "F32", "F16", "BF16"}  # those that mean what they say without a scale


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model, ready to be served or trained on.

    model: a transformers causal LM in eval mode, all parameters frozen.
    tokenizer: its tokenizer, with the chat template if it has one.
    spec: the properties that adapters are checked against.
    eos_token_ids: all tokens that end an answer: those of the model's and the tokenizer's configs,
        and the one that the chat template writes after an answer.
    max_model_len: most tokens of a sequence, by which its rotation was chosen.
    vocab_size: tokens that the model has an embedding and a score for; the tokenizer may know more.
    turn_end: the text that the chat template writes after an answer, as far as that is known.
    template_fault: the reason why the chat template renders nothing, as a clause about the base.
    """

    model: Any  # PreTrainedModel; its class differs per architecture and is untyped upstream
    tokenizer: Any
    spec: BaseSpec
    path: Path
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: frozenset[int]
    max_model_len: int
    vocab_size: int
    turn_end: TurnEnd | None = None
    template_fault: str | None = None

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)


def load_base(
    source: ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    chat_template: str | None = None,
) -> BaseModel:
    """Load a base model to a device, frozen.

    Args:
        max_model_len: most tokens of a sequence; default: what the config's positions allow. What
            else depends on it is in `model/rotary.py`.
        chat_template: the name of one of the tokenizer's, or a file; default: the tokenizer's own.

    Raises:
        ModelError: unreadable files, pickle-only weights, no causal LM; tensors that are missing,
            of another shape, or without a place in the model; an unknown rope_type; no such chat
            template.
        UsageError: max_model_len is more than the positions allow.
    """
    torch_device = find_device(device)
    model = load_checked(source)
    with _refusing(source):
        tokenizer = load_tokenizer(source.path)
    choose_template(tokenizer, chat_template)
    place_(model, torch_device, None if dtype == "auto" else getattr(torch, dtype))
    modules = adaptable_modules(model)
    if not modules:
        raise ModelError(
            f"model {source.name!r} ({type(model).__name__}) has no linear layers in its blocks"
        )
    length = _model_len(model.config, max_model_len)
    fix_rotation(model, length)
    vocab_size = _vocab_size(model)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    turn_end, template_fault = examine(tokenizer, eos_token_ids)
    if turn_end is not None and turn_end.token_id is not None:
        eos_token_ids |= {turn_end.token_id}
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        spec=_spec(source, model),
        path=source.path,
        dtype=next(iter(modules.values())).weight.dtype,
        device=torch_device,
        eos_token_ids=frozenset(i for i in eos_token_ids if i < vocab_size),
        max_model_len=length,
        vocab_size=vocab_size,
        turn_end=turn_end,
        template_fault=template_fault,
    )


def with_model_len(base: BaseModel, max_model_len: int) -> BaseModel:
    """Return the same model for sequences of up to max_model_len tokens, as `load_base` would give
    it.

    Raises:
        UsageError: the positions allow fewer.
    """
    length = _model_len(base.model.config, max_model_len)
    fix_rotation(base.model, length)
    return replace(base, max_model_len=length)


def _model_len(config: Any, wanted: int | None) -> int:
    longest = longest_model_len(config)
    if wanted is not None and wanted > longest:
        raise UsageError(f"max_model_len is {wanted}, and the base's positions allow {longest}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return wanted or int(positions or longest)


def load_checked(source: ModelSource) -> Any:
    """Load the model alone, on the host, frozen, refused as `load_base` refuses it.

    Raises:
        ModelError
    """
    with _refusing(source):
        stored = _stored_dtypes(source.path)
        model, report = load_model(source.path)
    if faults := _faults(model, report, stored):
        raise ModelError(f"model {source.name!r} cannot be loaded: {'; '.join(faults)}")
    return model.eval().requires_grad_(False)


@contextmanager
def _refusing(source: ModelSource) -> Iterator[None]:
    """Turn transformers' errors inside a block into a ModelError."""
    try:
        with quiet_transformers():
            yield
    except ModelError as error:
        raise ModelError(f"model {source.name!r} cannot be loaded: {error}") from error
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"model {source.name!r} cannot be loaded: {reason}") from error


def load_model(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """Load the causal LM in a folder, on the host; return it with transformers' report on its
    tensors.

    Parameters have the config's dtype. Where the files have it too, which is nearly always, the
    parameters are the mapped files: nothing is read before it is used or placed.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # in the report, by name; the library's error has none
        output_loading_info=True,
    )
    return model, report


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def place_(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Bring a loaded model to a device, and its parameters to a dtype; None keeps theirs.

    Tensor by tensor, read once from the mapped file and cast on the device, so that beside a GPU
    the host never holds a copy of the weights.
    """
    for parameter in model.parameters():
        wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(device).to(wanted)
    model.to(device)  # buffers; they keep their dtype


def _stored_dtypes(folder: Path) -> dict[str, str]:
    """Return the tensors in the weight files, by name, with safetensors' name of their dtype.

    Raises:
        ModelError: files that the index names are not there, or it names none.
    """
    files = _weight_files(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {_some(missing)}, which its index of weights names; download it again"
        )
    stored: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            stored.update({name: tensors.get_slice(name).get_dtype() for name in names})
    return stored


def _some(names: Iterable[str]) -> str:
    """Join the first few names, and say how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _faults(model: Any, report: Mapping[str, Any], stored: Mapping[str, str]) -> list[str]:
    """Say why the stored tensors are not this model's. transformers itself draws missing tensors at
    random, ignores those that some classes list as often missing, drops those without a place, and
    takes whole numbers for weights."""
    lacking = set(report["missing_keys"])
    tensors = model.state_dict()
    variants = partial(_variants, prefix=model.base_model_prefix)
    for pattern in model._keys_to_ignore_on_load_missing or ():
        passed_over = [name for name in tensors if re.search(pattern, name)]
        lacking.update(n for n in passed_over if not any(v in stored for v in variants(n)))
    without_scales = [
        name
        for name, dtype in stored.items()
        if dtype not in _FLOATS
        and any(v in tensors and tensors[v].is_floating_point() for v in variants(name))
        and not hasattr(model.config, "quantization_config")
    ]
    mismatched = [
        f"{name} {tuple(stored)} in place of {tuple(expected)}"
        for name, stored, expected in report["mismatched_keys"]
    ]
    # Left-overs of other heads and old releases belong to no layer here. One of a layer that is
    # here, a bias say, makes this another model than the one that was saved.
    layers = {name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    prefixes = ("", f"{model.base_model_prefix}.")
    without_place = [
        name
        for name in report["unexpected_keys"]
        if any(f"{prefix}{name}".rpartition(".")[0] in layers for prefix in prefixes)
    ]
    return [
        f"{what} {_some(names)}"
        for what, names in (
            ("its files lack", lacking),
            ("its files have other shapes than its config:", mismatched),
            ("its config has no place for", without_place),
            ("its config says nothing of the scales of", without_scales),
        )
        if names
    ]


def _spec(source: ModelSource, model: Any) -> BaseSpec:
    modules = adaptable_modules(model)
    fingerprint = base_fingerprint(source.path, list(modules), model.base_model_prefix)
    shapes = {name: matrix_shape(module) for name, module in modules.items()}
    biased = frozenset(name for name, module in modules.items() if module.bias is not None)
    return BaseSpec(source.name, fingerprint, shapes, _hidden_size(model), biased)


def _vocab_size(model: Any) -> int:
    """Return the number of tokens with both an embedding and a score."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(end.weight) for end in ends if end is not None)


def _hidden_size(model: Any) -> int | None:
    """Return the width of the output head's input."""
    size = getattr(model.get_output_embeddings(), "in_features", None)
    return None if size is None else int(size)


def adaptable_modules(model: nn.Module) -> dict[str, Any]:
    """Return every Linear (and GPT-2 Conv1D) inside the model's blocks, by name.

    For Llama and its kin: q, k, v, o, gate, up and down_proj of every layer. Embeddings, norms and
    the output head stay out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _IN_A_BLOCK.search(name)
    }


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a module's weight is [d_in, d_out] (GPT-2's Conv1D), not [d_out, d_in]."""
    return isinstance(module, Conv1D)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place of the one with that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def matrix_shape(module: Any) -> tuple[int, int]:
    """Return (d_out, d_in) of a module."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def find_device(device: str) -> torch.device:
    """Return the device of this name; auto takes CUDA if there is any.

    Raises:
        ModelError: unknown, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; cpu and cuda are known") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' was asked for, and torch finds no CUDA device")
    return found


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


# --- fingerprint -----------------------------------------------------------------------------


def base_fingerprint(folder: Path, modules: list[str], prefix: str) -> str:
    """Return the sha256 over the weights of `modules` as stored in the folder: names, dtypes,
    shapes, bytes.

    Sharding, the dtype that is loaded and everything besides these weights do not change it. Kept
    in the folder with the sizes and times of the weight files, and computed again when they change.

    Raises:
        ModelError: a module has no tensor of its own in the files.
    """
    try:
        return _kept_or_computed(folder, modules, prefix)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"the weight files in {folder} cannot be read: {error}") from error


def _kept_or_computed(folder: Path, modules: list[str], prefix: str) -> str:
    files = _weight_files(folder)
    state: dict[str, Any] = {
        "modules": hashlib.sha256("\n".join(sorted(modules)).encode()).hexdigest(),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
    }
    kept = folder / _FINGERPRINT_FILE
    try:
        known = json.loads(kept.read_text())
        if known["state"] == state:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or of another version: computed below
    fingerprint = _hash_weights(files, modules, prefix)
    if os.access(folder, os.W_OK):
        text = json.dumps({"state": state, "fingerprint": fingerprint}, indent=2)
        write_durably(kept, text.encode())
    return fingerprint


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():  # goes before shards, as in transformers
        return [folder / "model.safetensors"]
    shards = folder / "model.safetensors.index.json"
    if shards.is_file():
        names = set(json.loads(shards.read_text())["weight_map"].values())
        if not names:
            raise ModelError(f"{shards} names no file; download it again")
        return [folder / name for name in sorted(names)]
    raise ModelError(
        f"{folder} has no model.safetensors; convert pickle checkpoints to safetensors first"
    )


def _hash_weights(files: list[Path], modules: list[str], prefix: str) -> str:
    stored: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored.update(dict.fromkeys(tensors.keys(), file))
    digest = hashlib.sha256()
    for module in sorted(modules):
        key = _stored_name(f"{module}.weight", stored, prefix)
        with safe_open(stored[key], framework="pt") as tensors:
            weight = tensors.get_tensor(key)
        digest.update(f"{module}.weight {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _variants(name: str, prefix: str) -> tuple[str, ...]:
    """Return a module's possible names: checkpoints may leave out, or add, the prefix of the
    headless model."""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def _stored_name(name: str, stored: Mapping[str, Path], prefix: str) -> str:
    for candidate in _variants(name, prefix):
        if candidate in stored:
            return candidate
    raise ModelError(
        f"the checkpoint has no tensor {name!r}: its layout differs from the model's modules, and "
        "adapters could not be tied to it"
    )
