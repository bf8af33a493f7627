"""Choose what the backward keeps of the forward, and what it computes again.

Frozen weights need no input for their gradients, so most of what a decoder layer keeps is for
norms, rotary embeddings and gates, which are cheap to compute again. Attention and the products are
what costs time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

Recompute = Literal["nothing", "cheap", "all"]

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def set_recompute(model: Any, what: Recompute, share: float = 1.0) -> Callable[[], None]:
    """Choose what the backward computes again, for a model of transformers in training mode.

    nothing: everything is kept; the fastest.
    cheap: products and attention are kept, all else in a layer is computed again.
    all: only the layers' inputs are kept; a second forward, the least memory.

    Args:
        share: of the layers that compute again, the first ones: what the last ones keep is released
            before the others need room to compute again.

    Returns:
        A function that undoes the choice.
    """
    if what == "nothing":
        return lambda: None
    arguments: dict[str, Any] = {"use_reentrant": False}
    if what == "cheap":
        arguments["context_fn"] = _keep_products
    # transformers 5.17 has these by their older names alone
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{kind}_checkpointing_enable")
    enable(**{f"{kind}_checkpointing_kwargs": arguments})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[round(share * len(layers)) :]:
        layer.gradient_checkpointing = False
    undo: Callable[[], None] = getattr(model, f"{kind}_checkpointing_disable")
    return undo


def _keep_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    keep: Any = create_selective_checkpoint_contexts  # untyped
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]] = keep(_policy)
    return contexts


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
