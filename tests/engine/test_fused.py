"""Norms and other small operators, fused: nothing changes but the time."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import configuration_auto

from neuroada_serve.engine.fused import compile_elementwise
from tests.support.tiny import FAMILIES


def tiny_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = configuration_auto.AutoConfig.for_model(family, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
@torch.no_grad()
def test_fused_parts_change_nothing(family):
    model = tiny_model(family)
    expected = [model(torch.arange(n)[None]).logits for n in (1, 2, 9)]
    called: list[str] = []

    def compiler(function):
        def compiled(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        return compiled

    changed = compile_elementwise(model, compiler)
    for n, logits in zip((1, 2, 9), expected, strict=True):
        assert torch.equal(model(torch.arange(n)[None]).logits, logits)
    wanted = {"gpt2": set(), "phi3": {"forward", "apply_rotary_pos_emb"}}
    assert set(called) == wanted.get(family, {"forward", "apply_rotary_pos_emb", "gate"})
    for module in changed:
        del module.forward
    called.clear()
    assert torch.equal(model(torch.arange(9)[None]).logits, expected[2])
    assert called == []


@torch.inference_mode()
def test_layers_share_a_few_compilations():
    """The real tracer without its code generator: no layer and no new length compiles anew."""
    torch._dynamo.reset()
    model = tiny_model("llama")
    expected = {n: model(torch.arange(n)[None]).logits for n in (1, 3, 4, 8, 16, 17)}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_elementwise(model, lambda function: torch.compile(function, backend=backend))
    for n, logits in expected.items():
        torch.testing.assert_close(model(torch.arange(n)[None]).logits, logits)
    assert len(graphs) <= 9, "norm, rotary, gate: one token, first length, any length"


def test_part_that_cannot_be_compiled_runs_as_it_is(caplog):
    model = tiny_model("llama")
    expected = model(torch.arange(5)[None]).logits

    def compiler(function):
        def refuse(*args):
            raise RuntimeError("no compiler")

        return refuse

    compile_elementwise(model, compiler)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)
    assert len(caplog.records) == 3  # once each, not per layer
