"""The size of a step: its tokens by device, and what contexts cost beside weights."""

import pytest
import torch

from neuroada_serve.config import PROMPT_BLOCK, EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.step_size import _CPU_ATTENTION, context_scale, step_tokens
from neuroada_serve.model.loader import load_base
from tests.support.tiny import save_tiny_model


@pytest.mark.parametrize(
    ("device", "settings", "tokens"),
    [
        ("cpu", {}, 512),
        ("cuda", {}, 2048),
        ("cpu", {"max_num_seqs": 600}, 600),
        ("cpu", {"max_num_seqs": 500, "deterministic": True}, 500 + PROMPT_BLOCK),
        ("cuda", {"max_num_batched_tokens": 100}, 100),
    ],
)
def test_step_has_the_tokens_that_suit_its_device(device, settings, tokens):
    assert step_tokens(EngineConfig(**settings), torch.device(device)) == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_costs_what_weights_do_at_a_position_of_the_models_shapes(dtype, tmp_path):
    base = load_base(save_tiny_model(tmp_path, dtype=dtype))
    config = base.model.config
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * heads * config.num_hidden_layers  # products with keys and values, a position
    weights = sum(out * width for out, width in base.spec.shapes.values())
    expected = weights / attention / _CPU_ATTENTION
    assert context_scale(base) == expected > 1
    # Kernels of their own take the weights out of the model's parameters.
    engine = Engine(base, EngineConfig(max_num_seqs=2))
    assert context_scale(base) == engine.pace.context_scale == expected
    assert engine.pace.most_tokens == 512
