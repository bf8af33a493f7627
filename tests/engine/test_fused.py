"""Norms and other small operators, fused: nothing changes but the time."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import configuration_auto
from transformers.models.llama.modeling_llama import LlamaRMSNorm

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

    changed = compile_elementwise(model, compiler).modules
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


class Refusing:
    """A compiler whose functions fail as often as they are told."""

    def __init__(self, error: Exception, times: int = 1 << 30) -> None:
        self._error = error
        self._times = times
        self.num_compiled_calls = 0

    def __call__(self, function):
        def compiled(*args, **kwargs):
            if self._times:
                self._times -= 1
                raise self._error
            self.num_compiled_calls += 1
            return function(*args, **kwargs)

        return compiled


def test_part_that_cannot_be_compiled_runs_as_it_is(caplog):
    model = tiny_model("llama")
    expected = model(torch.arange(5)[None]).logits
    fused = compile_elementwise(model, Refusing(RuntimeError("no compiler")))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)
    assert len(caplog.records) == 3  # once each, not per layer
    assert fused.num_failed_compilations == 3


def test_compilation_is_tried_again_after_pauses_that_grow(monkeypatch):
    monkeypatch.setattr("neuroada_serve.engine.fused._FIRST_PAUSE", 4)
    compiler = Refusing(RuntimeError("no compiler"), times=2)
    fused = compile_elementwise(nn.Sequential(LlamaRMSNorm(8)), compiler)
    norm, x = fused.modules[0], torch.randn(3, 8)
    calls = []
    for _ in range(15):
        assert torch.equal(norm(x), LlamaRMSNorm(8)(x))
        calls.append(compiler.num_compiled_calls)
    assert calls.index(1) == 4 + 8
    assert fused.num_failed_compilations == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_faults_of_the_device_are_no_failed_compilations(error):
    fused = compile_elementwise(nn.Sequential(LlamaRMSNorm(8)), Refusing(error))
    with pytest.raises(type(error)):
        fused.modules[0](torch.randn(3, 8))
    assert fused.num_failed_compilations == 0


def test_a_call_that_fails_uncompiled_as_well_is_no_failed_compilation():
    fused = compile_elementwise(nn.Sequential(LlamaRMSNorm(8)), Refusing(RuntimeError("no shape")))
    with pytest.raises(RuntimeError, match="size of tensor"):
        fused.modules[0](torch.randn(3, 5))
    assert fused.num_failed_compilations == 0
