"""Tiny random models, and the gradients of values inside their layers."""

from contextlib import nullcontext

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from neuroada_serve.train.loop import values_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
VOCABULARY = 48
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # with biases
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),  # weights transposed
}


def random_model(family, seed=0, heads=4, kv_heads=2, head_dim=8, width=40, layers=2):
    torch.manual_seed(seed)
    config, model = FAMILIES[family]
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    if family == "gpt2":
        shape = {"n_embd": heads * head_dim, "n_layer": layers, "n_head": heads, "n_inner": width}
    else:
        shape = {
            "hidden_size": heads * head_dim,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
        if family == "qwen3":
            shape["head_dim"] = head_dim
    return model(config(**common, **shape)).eval()


def randomise(layers, scale=0.1):
    with torch.no_grad():
        for value in values_of(layers).values():
            value.copy_(torch.randn_like(value) * scale)


def grads_of(model, layers, ids, context=nullcontext):
    """The loss, and the gradient of every layer's values, and of its bias as name.bias."""
    model.zero_grad()
    with context():
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {n.removesuffix(".value"): v.grad.clone() for n, v in values_of(layers).items()}
    return loss.detach(), found


def assert_close(found, expected, bound):
    """Norm of the difference, of the expected norm, per layer."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) <= bound * float(grad.norm()), name
