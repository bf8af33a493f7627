"""Translate a GGUF model's settings to transformers' terms, architecture by architecture.

The meaning of keys and tensors is llama.cpp's, of its converter and its graphs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuroada_serve.model.gguf_file import GgufFile
from neuroada_serve.model.gguf_keys import Keys
from neuroada_serve.model.gguf_rope import FREQS, LONG, SHORT, rope_parameters

_ATTENTION_BIASES = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})
_MLP_BIASES = frozenset({"ffn_gate", "ffn_up", "ffn_down"})


@dataclass(frozen=True)
class Architecture:
    """An architecture that can be converted.

    model_type: transformers' name of it.
    biases: by config flag ("": no flag, transformers always has them), the tensors of a block whose
        biases a file may have or leave out.
    rope: tensors of rotary factors that it reads.
    swaps_rotary_halves: llama.cpp keeps the rows of q and k in another order.
    norms_add_one: the file stores a norm's weight as 1 + transformers' weight.
    transposes: transformers stores a block's matrices transposed (Conv1D).
    """

    model_type: str
    biases: Mapping[str, frozenset[str]] = field(default_factory=dict)
    rope: frozenset[str] = frozenset()
    swaps_rotary_halves: bool = False
    norms_add_one: bool = False
    transposes: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        {"attention_bias": _ATTENTION_BIASES, "mlp_bias": _MLP_BIASES},
        rope=frozenset({FREQS, LONG, SHORT}),
        swaps_rotary_halves=True,
    ),
    "qwen2": Architecture("qwen2", {"": _ATTENTION_BIASES - {"attn_output"}}),
    "qwen3": Architecture("qwen3", {"attention_bias": _ATTENTION_BIASES}),
    "gemma": Architecture("gemma", {"attention_bias": _ATTENTION_BIASES}, norms_add_one=True),
    "gemma2": Architecture("gemma2", {"attention_bias": _ATTENTION_BIASES}, norms_add_one=True),
    "gemma3": Architecture(
        "gemma3_text", {"attention_bias": _ATTENTION_BIASES}, norms_add_one=True
    ),
    "phi3": Architecture("phi3", rope=frozenset({LONG, SHORT})),
    "gpt2": Architecture("gpt2", transposes=True),
}

# Settings of other architectures, with the values that change nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),  # others are of embedding models
    "residual_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),  # what all have whose q and k are reordered
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """Return the file's architecture, found by llama.cpp's name.

    Raises:
        ModelError: one that is not converted, or no model at all.
    """
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise file.refusal(f"it holds {kind!r}, not a model")
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise file.refusal(
            f"its architecture {name!r} is not converted; {', '.join(ARCHITECTURES)} are"
        )
    return name, ARCHITECTURES[name]


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the arguments of transformers' config for this model.

    Raises:
        ModelError: a setting is missing, or is one that transformers' model cannot follow.
    """
    name, architecture = architecture_of(file)
    keys = Keys(file, name)
    if (layers := keys.count("block_count")) > len(file.tensors):  # names are made for all of them
        raise file.refusal(f"it has {len(file.tensors)} tensors for {layers} layers")
    config = _gpt2(keys) if name == "gpt2" else _decoder(file, keys, name, architecture)
    config |= _vocabulary(file, keys)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for key, harmless in _HARMLESS.items():
        if key not in _OWN_KEYS.get(name, ()):
            keys.refuse_unless(key, harmless)
    keys.refuse_others()
    return config


def bias_kinds(file: GgufFile) -> frozenset[str]:
    """Return the tensors of a block that have biases in this file."""
    parts = [name.split(".") for name in file.tensors]
    return frozenset(p[2] for p in parts if len(p) == 4 and p[0] == "blk" and p[3] == "bias")


_OWN_KEYS = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("final_logit_softcapping",),
}


def _decoder(file: GgufFile, keys: Keys, name: str, architecture: Architecture) -> dict[str, Any]:
    """Return the config of every architecture but GPT-2; they differ in a few settings only."""
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads if heads else 0)
    keys.refuse_unless("attention.value_length", (head_dim,))
    rotated = keys.count("rope.dimension_count", head_dim)
    rope = rope_parameters(file, keys, rotated, architecture.rope)
    biases = bias_kinds(file)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": keys.count("block_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }
    config |= {flag: bool(kinds & biases) for flag, kinds in architecture.biases.items() if flag}
    if name == "phi3":
        return config | _phi3(file, keys, config, rotated)
    if rotated != head_dim:
        raise file.refusal(f"it rotates {rotated} of {head_dim} of a head, which is Phi-3's alone")
    if name in ("gemma", "gemma2", "gemma3"):
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if name == "gemma2":
        config |= _gemma2(file, keys, config)
    elif name == "gemma3":
        config |= _gemma3(file, keys, config)
    else:
        keys.refuse_unless("attention.sliding_window", (0,))
        keys.refuse_unless("attention.scale", (0.0, 1 / math.sqrt(head_dim)))
    return config


def _gemma2(file: GgufFile, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config["rope_parameters"]["rope_theta"]
    if keys.number("rope.freq_base_swa", theta) != theta:
        raise file.refusal("its sliding layers have a rotary base of their own, as in Gemma 3")
    return {
        # llama.cpp's defaults, for files of before these keys.
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(file, keys, config, 2),
        "query_pre_attn_scalar": _attention_scalar(file, keys, config, 46),
    }


def _gemma3(file: GgufFile, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    rope = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    layers = config["num_hidden_layers"]
    found = {
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": rope,
        "query_pre_attn_scalar": _attention_scalar(file, keys, config, 62),
    }
    if window := keys.count("attention.sliding_window", 0):
        layer_types = _layer_types(file, keys, config, 6)
        return found | {"sliding_window": window, "layer_types": layer_types}
    keys.accept("attention.sliding_window_pattern")
    return found | {"layer_types": ["full_attention"] * layers}


def _layer_types(file: GgufFile, keys: Keys, config: Mapping[str, Any], usual: int) -> list[str]:
    """Return the type of each layer: all but every n-th see a window alone, or those listed do."""
    layers = config["num_hidden_layers"]
    pattern = keys.value("attention.sliding_window_pattern", usual)
    if isinstance(pattern, int):
        sliding = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    elif len(pattern) == layers:
        sliding = [bool(entry) for entry in pattern]
    else:
        raise file.refusal(f"its sliding window pattern has {len(pattern)} entries for {layers}")
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def _attention_scalar(
    file: GgufFile, keys: Keys, config: Mapping[str, Any], layers_of_27b: int
) -> int:
    """Return the number whose root divides attention scores. No key holds it, and 27B models have
    one of their own."""
    scalar = int(config["head_dim"])
    if config["num_hidden_layers"] == layers_of_27b:
        scalar = int(config["hidden_size"]) // int(config["num_attention_heads"])
    keys.refuse_unless("attention.scale", (0.0, 1 / math.sqrt(scalar)))
    return scalar


def _phi3(file: GgufFile, keys: Keys, config: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    rope, head_dim = dict(config["rope_parameters"]), config["head_dim"]
    if rope["rope_type"] not in ("default", "longrope"):
        raise file.refusal(f"transformers' Phi-3 has no rotary scaling {rope['rope_type']!r}")
    rope["partial_rotary_factor"] = rotated / head_dim
    if int(head_dim * rope["partial_rotary_factor"]) != rotated:
        raise file.refusal(f"it rotates {rotated} of {head_dim} of a head")
    keys.refuse_unless("attention.scale", (0.0, 1 / math.sqrt(head_dim)))
    keys.accept("attention.sliding_window_pattern")
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": keys.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        # llama.cpp passes over it; the model was trained with it.
        "sliding_window": keys.count("attention.sliding_window", 0) or None,
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    heads = keys.count("attention.head_count")
    keys.refuse_unless("attention.head_count_kv", (heads,))
    hidden = keys.count("embedding_length")
    for name in ("attention.key_length", "attention.value_length"):
        keys.refuse_unless(name, (hidden // heads if heads else 0,))
    keys.refuse_unless("attention.scale", (0.0, 1 / math.sqrt(hidden / heads)))
    return {
        "n_embd": hidden,
        "n_layer": keys.count("block_count"),
        "n_inner": keys.count("feed_forward_length"),
        "n_head": heads,
        "n_positions": keys.count("context_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _vocabulary(file: GgufFile, keys: Keys) -> dict[str, Any]:
    if "token_embd.weight" not in file.tensors:
        raise file.refusal("it lacks tensor token_embd.weight")
    rows = file.shape("token_embd.weight")[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise file.refusal("it has no tokenizer")
    if len(tokens) != rows or keys.count("vocab_size", rows) != rows:
        raise file.refusal(f"its tokenizer has {len(tokens)} tokens, its embeddings {rows}")
    ids = special_ids(file)
    for name, value in ids.items():
        if not 0 <= value < rows:
            raise file.refusal(f"its {name} {value} is none of its {rows} tokens")
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": rows} | {name: ids.get(name) for name in ends}


def special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of special tokens by transformers' names; eot and eom by llama.cpp's."""
    names = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "eot_token_id": "eot_token_id",
        "eom_token_id": "eom_token_id",
        "pad_token_id": "padding_token_id",
        "unk_token_id": "unknown_token_id",
    }
    stated = {ours: file.metadata.get(f"tokenizer.ggml.{name}") for ours, name in names.items()}
    return {name: int(value) for name, value in stated.items() if value is not None}
