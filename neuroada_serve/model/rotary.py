"""Fix the rotation of queries and keys by position when a model is loaded.

A transformers model whose rope_type is `longrope` or `dynamic` chooses its frequencies in every
forward, by the largest position in it. Here a forward holds tokens of many requests, or a part of
one prompt, and keys that were turned before lie in the cache: a request would get the rotation of
its neighbours. So the frequencies are chosen once, by the most tokens that a sequence may have
(`max_model_len`), and every forward uses these:

- longrope: `long_factor` if max_model_len is above the base's original_max_position_embeddings,
  else `short_factor`. vLLM's rule. It is what transformers computes for sequences above, or not
  above, that length.
- dynamic: stretched as transformers stretches it for one sequence of max_model_len tokens; up to
  the base's max_position_embeddings, not at all.

All other kinds depend on nothing but the config, and stay as transformers computes them.
"""

from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neuroada_serve.errors import ModelError

_STATIC = {"default", "linear", "yarn", "llama3", "proportional", "ntk_alpha", "axial"}
_CHOSEN = {"longrope", "dynamic"}


def fix_rotation(model: nn.Module, max_model_len: int) -> str | None:
    """Fix the rotary frequencies of every forward of a model to those for max_model_len tokens.

    May be called again with another length.

    Returns:
        What was chosen by the length, as a sentence; None where nothing depends on it.

    Raises:
        ModelError: the model has a rope_type that is not known here.
    """
    said: list[str] = []
    for module in model.modules():
        rope_type: Any = getattr(module, "rope_type", None)
        if rope_type is None or not hasattr(module, "config"):
            continue
        # Gemma 3 and its kin have one set of frequencies per type of layer.
        kinds = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, kind in kinds.items():
            if kind in _CHOSEN:
                said.append(_choose(module, layer_type, kind, max_model_len))
            elif kind not in _STATIC:
                raise ModelError(
                    f"{type(module).__name__} has rope_type {kind!r}; known are "
                    f"{', '.join(sorted(_STATIC | _CHOSEN))}"
                )
        if not _CHOSEN.isdisjoint(kinds.values()):
            # The module's own forward, below transformers' decorators that choose anew.
            module.forward = partial(unwrap(type(module).forward), module)
    return " ".join(dict.fromkeys(said)) or None


def longest_model_len(config: Any) -> int:
    """Return the most tokens that a model of this config can be given room for.

    Its max_position_embeddings, and `factor` times as many where a rotation is dynamic.
    """
    text = config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", None) or 1 << 20)
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    factors = [
        p.get("factor", 1) for p in nested or [parameters] if p.get("rope_type") == "dynamic"
    ]
    return int(positions * max(1, *factors)) if factors else positions


def _choose(module: Any, layer_type: str | None, kind: str, max_model_len: int) -> str:
    """Set the frequencies of one kind of layer, and return a description of the choice."""
    config, parameters = module.config, module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    trained = config.max_position_embeddings
    length: Any = max_model_len
    if kind == "dynamic":  # as transformers calls it: the dtype it counts in is another
        length = torch.tensor(max_model_len) if max_model_len > trained else None
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    frequencies: Tensor = getattr(module, name)
    chosen, _ = ROPE_INIT_FUNCTIONS[kind](  # what attention is scaled by depends on no length
        config, frequencies.device, seq_len=length, layer_type=layer_type
    )
    frequencies.copy_(chosen)
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        if max_model_len > original:
            return (
                f"This base turns positions by its long factors, since up to {max_model_len} "
                f"tokens are served; --max-model-len {original} would take the short ones, which "
                "fit shorter requests better."
            )
        return f"This base turns positions by its short factors, for up to {original} tokens."
    if max_model_len > trained:
        return (
            f"This base's positions are stretched from {trained} to {max_model_len} tokens; "
            f"--max-model-len {trained} would leave them as they are."
        )
    return (
        f"This base's positions are as they were trained, for up to {trained} tokens; a larger "
        f"--max-model-len, up to {longest_model_len(config)}, would stretch them."
    )
