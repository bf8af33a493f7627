"""The code of transformers that kernels and fused functions may stand in for.

They compute what the code that they were written for computes. So that code is known by digests of
its source: a release of transformers in which any of it differs runs its own modules until somebody
has looked at the difference and entered the new digest. Known are releases 5.17 to 5.23.
"""

import ast
import hashlib
import inspect
import logging
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers.activations import ACT2FN

logger = logging.getLogger(__name__)

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
    """Return the family of a model; None if any of its code is not known, which is logged."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        return None
    part = _unknown_part(model, family)
    if part is not None:
        logger.warning(
            "%s runs as modules, which is slower: this release of transformers has another %s than "
            "the kernel was written for",
            *(name, part),
        )
        return None
    return family


def _unknown_part(model: Any, family: Family) -> str | None:
    """Name the first part of a model whose code is not known, from the outside to the inside: what
    a part has inside is looked at only once its own code is known."""
    if not has_code(model, *_HEADS):
        return "head"
    if not has_code(model.model, family.model):
        return "model"
    norms = [model.model.norm]
    for layer in model.model.layers:
        if not has_code(layer, _LAYER):
            return "layer"
        attention, mlp = layer.self_attn, layer.mlp
        if not has_code(attention, family.attention):
            return "attention"
        functions = inspect.unwrap(type(attention).forward).__globals__
        for name, code in family.rotary.items():
            if source_digest(functions.get(name)) != code:
                return name
        if not has_code(mlp, GATED_MLP):
            return "MLP"
        if type(mlp.act_fn) is not type(ACT2FN[family.activation]):
            return "activation"
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        if family.head_norms:
            norms += [attention.q_norm, attention.k_norm]
    return None if all(has_code(norm, family.norm) for norm in norms) else "norm"


def has_code(module: Any, *digests: str) -> bool:
    """Tell if the source of a module's class has one of these digests."""
    return source_digest(type(module).forward) in digests


@cache
def source_digest(function: Callable[..., Any] | None) -> str | None:
    """Return a digest of a function's source without comments, docstrings and annotations; None if
    there is no source."""
    if function is None:
        return None
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
