"""The code of transformers that kernels and fused functions may stand in for.

They compute what the code that they were written for computes. So that code is known by digests of
its source: a release of transformers in which any of it differs runs its own modules until somebody
has looked at the difference and entered the new digest. Known are releases 5.17 to 5.23.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers.activations import ACT2FN

# weight * round(x / sqrt(mean(x * x) + eps))
RMS_NORM = "9635bcd843f309a0"
# down(act(gate(x)) * up(x))
GATED_MLP = "7d2027d4464e3e71"
# x += attention(norm(x)), then x += mlp(norm(x))
_LAYER = "1a8125909341e389"
# the model and a linear head, without and with `slice_logits_to_keep`
_HEADS = ("f14e2be13ced0d90", "1e1249f332dd043c")
# rotate_half and apply_rotary_pos_emb: pairs (i, dim / 2 + i) of a head turn by one angle
_HALVES = {"rotate_half": "7b6c9b425ca04287", "apply_rotary_pos_emb": "f0e978aab1df6bb0"}


@dataclass(frozen=True)
class Family:
    """Decoders of one code in transformers.

    norm: digest.
    activation: of the gate, by its name in configs.
    qkv, gate_up: the layers that make queries, keys and values, and gate and up: split, or fused.
    rotary: functions of the attention's module, with their digests.
    attention, model: digests.
    head_norms: whether queries and keys are normed before the rotation.
    window: what has the `sliding_window` of a layer, the "config" or the "attention"; None: none.
    """

    norm: str
    activation: str
    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]
    rotary: dict[str, str]
    attention: str
    model: str
    head_norms: bool = False
    window: str | None = None


_SPLIT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_LIKE_LLAMA = (RMS_NORM, "silu", *_SPLIT, _HALVES)

FAMILIES = {
    "LlamaForCausalLM": Family(*_LIKE_LLAMA, "865d17a1b6edd273", "3ee4b3154dd99641"),
    "MistralForCausalLM": Family(
        *_LIKE_LLAMA, "38eb7a675fc00c3f", "3e106c8cfc95b78a", window="config"
    ),
    "Qwen2ForCausalLM": Family(
        *_LIKE_LLAMA, "467d2e0bba2fd378", "7082cc645fa7709b", window="attention"
    ),
    "Qwen3ForCausalLM": Family(
        *_LIKE_LLAMA, "e0b15d778eecc3a8", "7082cc645fa7709b", head_norms=True, window="attention"
    ),
}


def family_of(model: Any) -> Family | None:
    """The family of a model; None where any of its code is not known."""
    family = FAMILIES.get(type(model).__name__)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        return None
    inner = model.model
    known = [has_code(model, *_HEADS), has_code(inner, family.model)]
    norms = [inner.norm]
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        if family.head_norms:
            norms += [attention.q_norm, attention.k_norm]
        known += [has_code(layer, _LAYER), has_code(attention, family.attention)]
        known += [has_code(mlp, GATED_MLP), type(mlp.act_fn) is type(ACT2FN[family.activation])]
        functions = type(attention).forward.__globals__
        known += [source_digest(functions[name]) == code for name, code in family.rotary.items()]
    known += [has_code(norm, family.norm) for norm in norms]
    return family if all(known) else None


def has_code(module: Any, *digests: str) -> bool:
    """Tell if the source of a module's class has one of these digests."""
    return source_digest(type(module).forward) in digests


@cache
def source_digest(function: Callable[..., Any]) -> str | None:
    """Digest of a function's source without comments, docstrings and annotations; None where there
    is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
