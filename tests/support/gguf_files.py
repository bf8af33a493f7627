"""GGUF files of random models, written as llama.cpp's convert_hf_to_gguf.py writes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny import VOCAB, tiny_tokenizer

Quantization = gguf.GGMLQuantizationType

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 259,
}
_ARCHITECTURES = {"gemma3_text": "gemma3"}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def longrope(dims: int = 8, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + i / 8 for i in range(dims)], "long_factor": [2.0] * dims}
    return {"rope_type": "longrope", "original_max_position_embeddings": 64, **factors, **more}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(theta: float = 1000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


_ORIGINAL = {"original_max_position_embeddings": 64, "sliding_window": None}
# Kinds of model that a file can hold: transformers' type and settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TIED),
    "llama untied": ("llama", UNTIED),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, **UNTIED}),
    "llama wide heads": ("llama", {"head_dim": 32, **TIED}),
    "llama linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "llama yarn": ("llama", rope(**YARN)),
    "llama yarn attention": ("llama", rope(**YARN, attention_factor=1.7, beta_fast=16.0)),
    "llama 3.1": ("llama", rope(**LLAMA3)),
    "llama 3.1 of other settings": ("llama", rope(**LLAMA3 | {"low_freq_factor": 1.7})),
    "llama longrope": ("llama", rope(**longrope())),
    "qwen2": ("qwen2", {**TIED, **rope()}),
    "qwen2 yarn": ("qwen2", {**UNTIED, **rope(**YARN)}),
    "qwen3": ("qwen3", TIED),
    "qwen3 biases yarn": ("qwen3", {"attention_bias": True, **UNTIED, **rope(**YARN)}),
    "gemma": ("gemma", {"head_dim": 32, **TIED}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 7, **TIED}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "sliding_window": 7, **TIED}),
    "gemma3 linear": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "num_hidden_layers": 7,
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            **TIED,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None, **UNTIED}),
    "phi3 longrope": ("phi3", {**rope(**longrope()), **_ORIGINAL}),
    "phi3 partial, short": (
        "phi3",
        {
            **rope(**longrope(6), partial_rotary_factor=0.75),
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 1024,
            "sliding_window": None,
        },
    ),
    "gpt2": ("gpt2", TIED),
    "gpt2 untied": ("gpt2", UNTIED),
}
# llama.cpp has no way to these: it passes over Qwen3's bias of o_proj (its loader refuses such a
# file), and over a file's own attention factor and beta_fast of yarn.
NOT_IN_LLAMA_CPP = {"qwen3 biases yarn", "llama yarn attention"}


def random_model(kind: str, seed: int = 0) -> Any:
    """A random model of a kind, in float32."""
    model_type, settings = KINDS[kind]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("wpe.weight"):
                parameter.mul_(3)
    return model


@dataclass
class Changes:
    """Differences of a file from what the converter writes.

    keys: settings that are added (or left out: None).
    tensors: changes them, or leaves some out, before they are written.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda tensors: tensors
    quantization: Quantization = Quantization.F32
    split_max_tensors: int = 0


def save_gguf(path: Path, model: Any, changes: Changes | None = None) -> Path:
    """The file (the first, where it is split) that the converter writes for this model."""
    changes = changes or Changes()
    config = model.config
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=changes.split_max_tensors)
    for key, value in {**_settings(config, arch), **_tokens(), **changes.keys}.items():
        if value is not None:
            _add(writer, key, value)
    tensors = changes.tensors(gguf_tensors(model))
    for name, array in tensors.items():
        kind = changes.quantization if array.ndim > 1 else Quantization.F32
        if kind == Quantization.F32:
            writer.add_tensor(name, array)
        elif kind == Quantization.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names and in its order of rows."""
    config = model.config
    name_of = _ARCHITECTURES.get(config.model_type, config.model_type)
    (arch,) = [a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == name_of]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if arch == gguf.MODEL_ARCH.LLAMA:
            for part, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
            ):
                if part in name:
                    halves = array.reshape(heads, 2, -1, *array.shape[1:])
                    array = halves.swapaxes(1, 2).reshape(array.shape)
        elif "gemma" in name_of and name.endswith("norm.weight"):
            array = array + 1
        elif name_of == "gpt2" and name.endswith(("attn.weight", "proj.weight", "fc.weight")):
            array = array.T
        found[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(array)
    return found | _rope_tensors(config)


def _rope_of(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    parameters = _rope_of(config)
    kind = parameters.get("rope_type")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(parameters[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    dim, factors = config.head_dim, []
    for i in range(0, dim, 2):
        wavelen = 2 * math.pi * parameters["rope_theta"] ** (i / dim)
        old, factor = parameters["original_max_position_embeddings"], parameters["factor"]
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        smooth = (old / wavelen - low) / (high - low)
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _settings(config: Any, arch: str) -> dict[str, Any]:
    if arch == "gpt2":
        return {
            "gpt2.block_count": config.n_layer,
            "gpt2.context_length": config.n_positions,
            "gpt2.embedding_length": config.n_embd,
            "gpt2.feed_forward_length": 4 * config.n_embd,
            "gpt2.attention.head_count": config.n_head,
            "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    rope_parameters = _rope_of(config)
    kind, theta = rope_parameters["rope_type"], rope_parameters["rope_theta"]
    rotated = int(config.head_dim * rope_parameters.get("partial_rotary_factor", 1.0))
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(theta),
    }
    if arch != "phi3":
        found["attention.key_length"] = found["attention.value_length"] = config.head_dim
    if arch in ("llama", "phi3"):
        found["rope.dimension_count"] = rotated
    if arch == "llama":
        found["vocab_size"] = config.vocab_size
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = rope_parameters["factor"]
    if kind == "yarn":
        yarn = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast"}
        for ours, theirs in yarn.items():
            if ours in rope_parameters:
                found[f"rope.scaling.{theirs}"] = rope_parameters[ours]
    original = rope_parameters.get("original_max_position_embeddings")
    if kind == "longrope" and arch == "llama":
        found["rope.scaling.type"] = kind
    if kind == "longrope":
        scale = config.max_position_embeddings / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    if kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = original
    if arch == "phi3":
        found["attention.sliding_window"] = config.sliding_window or 0
        found.setdefault("rope.scaling.original_context_length", config.max_position_embeddings)
    if arch in ("gemma2", "gemma3"):
        found["attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            found["final_logit_softcapping"] = config.final_logit_softcapping
    if arch == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
    if arch == "gemma3":
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        found["rope.freq_base_swa"] = float(local)
    if arch in ("gemma", "gemma2"):
        assert theta == 10000.0, "not written"
        del found["rope.freq_base"]
    return {f"{arch}.{key}": value for key, value in found.items()}


def _tokens() -> dict[str, Any]:
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    tokens[258] = "ab"  # there must be a merge, and what it makes
    return {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in (256, 257, 259) else 1 for i in range(VOCAB)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 259,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
