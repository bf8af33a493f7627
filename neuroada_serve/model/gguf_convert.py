"""Convert GGUF to a Hugging Face folder: every tensor of the file in its place, every parameter
filled.

Tensors that cannot be converted exactly are refused by name, so the model that is served is the one
in the file.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from neuroada_serve.errors import ModelError
from neuroada_serve.model.gguf_config import (
    Architecture,
    architecture_of,
    bias_kinds,
    config_of,
    special_ids,
)
from neuroada_serve.model.gguf_file import GgufFile, named, read_gguf
from neuroada_serve.model.gguf_tokenizer import tokenizer_of
from neuroada_serve.model.quiet import quiet_transformers

_SHARD_BYTES = 4 << 30  # most of one weight file, and of memory that a conversion takes


def convert_gguf(
    parts: Sequence[Path], folder: Path, notify: Callable[[str], None] = lambda message: None
) -> None:
    """Write a GGUF model as a Hugging Face folder: float32 files as float32, all others bfloat16.

    Args:
        parts: the file, or all parts of a split one in order.
        folder: where to, empty.
        notify: called with a sentence for what llama.cpp may read in another way.

    Raises:
        ModelError: no GGUF causal LM, or one that cannot be converted exactly; it says why.
    """
    file = read_gguf(parts)
    arguments = config_of(file)
    _, architecture = architecture_of(file)
    dtype = torch.float32 if file.is_float32 else torch.bfloat16
    with _refusing(file):
        config = AutoConfig.for_model(architecture.model_type, **arguments, dtype=dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = tokenizer_of(file, parts[0], notify)
    shapes = _stored_shapes(model)
    sources = _sources(file, architecture, config.get_text_config(), shapes)

    weights = _weights(file, architecture, config.get_text_config(), sources, shapes, dtype)
    _write_weights(weights, shapes, dtype, folder)
    config.architectures = [type(model).__name__]
    with quiet_transformers():
        config.save_pretrained(folder)
        _generation_config(file).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _refusing(file: GgufFile) -> Iterator[None]:
    """Turn transformers' errors inside a block into a ModelError."""
    try:
        with quiet_transformers():
            yield
    except ModelError:
        raise
    except Exception as error:  # its checks of configs and tokenizers raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise file.refusal(reason) from error


# --- tensors ---------------------------------------------------------------------------------


def _stored_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameters and buffers that a checkpoint of this model has; tied ones once."""
    once = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tuple(model.state_dict()[name].shape) for name in sorted(once.values())}


def _sources(
    file: GgufFile, architecture: Architecture, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str | None]:
    """Map each parameter to the tensor of the file that fills it; None: a bias that the file lacks
    everywhere.

    Raises:
        ModelError: a parameter without a tensor, a tensor without a place, or of another shape.
    """
    name = file.metadata["general.architecture"]
    (known,) = [arch for arch, arch_name in MODEL_ARCH_NAMES.items() if arch_name == name]
    names = get_tensor_name_map(known, config.num_hidden_layers)
    kinds = frozenset[str]().union(*architecture.biases.values()) - bias_kinds(file)
    layers = range(config.num_hidden_layers)
    optional = {f"blk.{layer}.{kind}.bias" for layer in layers for kind in kinds}
    found: dict[str, str | None] = {}
    lacking = []
    for parameter in shapes:
        source = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if source in file.tensors:
            found[parameter] = source
        elif source in optional:
            found[parameter] = None
        else:
            lacking.append(source or parameter)
    if lacking:
        raise file.refusal(f"it lacks tensor {named(sorted(lacking))}")
    placed = set(found.values()) | architecture.rope
    if without_place := sorted(set(file.tensors) - placed):
        kind = type(config).__name__.removesuffix("Config")
        raise file.refusal(f"transformers' {kind} has no place for tensor {named(without_place)}")
    for parameter, source in found.items():
        expected = shapes[parameter]
        if source and _transposed(architecture, source):
            expected = expected[::-1]
        if source and file.shape(source) != expected:
            raise file.refusal(f"{source} has shape {file.shape(source)} in place of {expected}")
    return found


def _weights(
    file: GgufFile,
    architecture: Architecture,
    config: Any,
    sources: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters as transformers stores them, one at a time."""
    for parameter, source in sources.items():
        if source is None:
            yield parameter, torch.zeros(shapes[parameter], dtype=dtype)
            continue
        values = file.values(source)
        if architecture.swaps_rotary_halves and ".attn_q." in source:
            values = _halves_apart(values, config.num_attention_heads)
        if architecture.swaps_rotary_halves and ".attn_k." in source:
            values = _halves_apart(values, config.num_key_value_heads)
        if architecture.norms_add_one and source.endswith("norm.weight"):
            values = values - 1
        if _transposed(architecture, source):
            values = values.T
        yield parameter, torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def _halves_apart(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder rows of q or k: llama.cpp keeps the two that rotate together side by side in each
    head, transformers half a head apart."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _transposed(architecture: Architecture, source: str) -> bool:
    matrices = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return architecture.transposes and source.startswith("blk.") and source.endswith(matrices)


def _write_weights(
    weights: Iterator[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write weight files as transformers names them, in shards where they are large."""
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and size_bytes + tensor_bytes > _SHARD_BYTES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += tensor_bytes
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]

    bar = tqdm(total=len(shapes), desc="Converting", unit=" tensors", leave=False, disable=None)
    with bar:
        for file, names in zip(files, shards, strict=True):
            shard = {}
            for _ in names:
                name, tensor = next(weights)
                shard[name] = tensor
                bar.update()
            save_file(shard, folder / file, {"format": "pt"})
    if count > 1:
        by_file = zip(files, shards, strict=True)
        index = {"metadata": {}, "weight_map": {n: file for file, names in by_file for n in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _generation_config(file: GgufFile) -> Any:
    """Return the ids that begin, end and fill texts. An answer ends at the end of a text, turn or
    message."""
    ids = special_ids(file)
    ends = [ids[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in ids]
    ends = list(dict.fromkeys(ends))
    return GenerationConfig(
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=ids.get("pad_token_id"),
    )
