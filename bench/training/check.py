"""Gradients of our ways to train against those of the authors' forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu.model import Shape, random_base
from bench.training.methods import Method, prepared, random_batch

CHECKED = Shape(
    {
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
)
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(device: str, methods: Sequence[Method]) -> dict[str, Any]:
    """Compare our gradients with the official forward's: norm of the difference, over the norm.

    Compiled ones too, where such a method is to be measured: compiling takes a minute.
    """
    variants: list[dict[str, Any]] = [{}, {"recompute": "cheap"}, {"recompute": "all"}]
    if any(method.compiled for method in methods):
        variants.append({"compiled": True})
    found: dict[str, Any] = {}
    for dtype, bound in BOUNDS.items():
        for k in (1, 8):
            expected = _gradients(Method("official", k), device, dtype)
            for method in (Method("neuroada", k, **variant) for variant in variants):
                pairs = zip(_gradients(method, device, dtype), expected, strict=True)
                error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
                # The compiler reorders norms, which transformers computes in float32 in any case.
                most = BOUNDS[torch.float32] if method.compiled else bound
                found[f"{method.name} {dtype}"] = {
                    "error": error,
                    "bound": most,
                    "ok": error <= most,
                }
    return found


def _gradients(method: Method, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradients per layer, at values that are the same for every method."""
    torch._dynamo.reset()
    model = random_base(CHECKED, torch.device(device), dtype).model
    batch = random_batch(4, 96, CHECKED.model["vocab_size"], device)
    draw = torch.Generator().manual_seed(1)
    with prepared(model, method) as (trained, _):
        for value in trained:
            random = torch.randn(value.numel(), generator=draw, dtype=torch.float64) * 0.05
            with torch.no_grad():
                value.copy_(random.view(value.shape))
        model(**batch, use_cache=False).loss.backward()
        return [value.grad.flatten().double() for value in trained if value.grad is not None]
