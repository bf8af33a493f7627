"""Code of transformers that has changed runs by its own modules, whatever it computes now."""

import ast
import inspect
import textwrap

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.engine.cpu_decoder import known_decoder
from neuroada_serve.engine.fused import compile_elementwise, use_cpu_kernels
from neuroada_serve.engine.known_code import GATED_MLP, family_of, has_code, source_digest
from neuroada_serve.model.bypass_linear import attach_bypass
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from tests.support.decoder_sizes import SIZES
from tests.support.tiny import FAMILIES, plain_merged, save_tiny_model

PARTS = [
    *(f"{name}.forward" for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention")),
    *(f"{name}.forward" for name in ("LlamaDecoderLayer", "LlamaModel", "LlamaForCausalLM")),
    *("rotate_half", "apply_rotary_pos_emb"),
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)  # the kernel knows our blocks
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
    return save_tiny_model(tmp_path / "llama", "llama", torch.bfloat16)


@pytest.fixture
def change(tmp_path, monkeypatch):
    """Changes a part of transformers' Llama as a new release would: in its source."""

    def change(part: str, statement: str = "changed = True") -> None:
        *holders, name = part.split(".")
        holder = getattr(modeling_llama, *holders) if holders else modeling_llama
        function = inspect.unwrap(getattr(holder, name))
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        tree.body[0].body.insert(0, ast.parse(statement).body[0])
        file = tmp_path / f"{part}.py"
        file.write_text(ast.unparse(tree))
        namespace = {**vars(modeling_llama), "auto_docstring": lambda function: function}
        exec(compile(ast.unparse(tree), file, "exec"), namespace)
        monkeypatch.setattr(holder, name, namespace[name])

    return change


def decoder(source):
    base = load_base(source)
    attach_bypass(base.model)
    return known_decoder(base.model)


@pytest.mark.parametrize("part", PARTS)
def test_changed_source_is_not_known(source, change, part):
    assert decoder(source) is not None
    change(part)
    assert decoder(source) is None


@pytest.mark.parametrize("part", ["rotate_half", "apply_rotary_pos_emb"])
def test_function_that_has_gone_is_not_known(source, monkeypatch, part):
    monkeypatch.delattr(modeling_llama, part)
    assert decoder(source) is None


def test_part_with_another_name_is_not_known_and_told(source, change, caplog):
    change("LlamaDecoderLayer.forward")
    base = load_base(source)
    for layer in base.model.model.layers:
        layer.attention = layer.self_attn
        del layer.self_attn
    assert family_of(base.model) is None
    assert "another layer than the kernel was written for" in caplog.text


def test_changed_code_is_computed_as_it_is_now(source, change):
    ids = [(7 * i) % 250 for i in range(30)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def expected():
        with torch.no_grad():
            logits = plain_merged(source, None)(torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]

    def difference():
        llm = LLM(str(source.path))
        ours = [p.logprob for p in llm.generate([ids], params)[0].prompt_logprobs]
        by_kernel = llm.engine._runner._cpu_decoder is not None
        return by_kernel, (torch.tensor(ours) - expected()).abs().mean().item()

    before = expected()
    assert difference() == (True, pytest.approx(0, abs=0.05))
    change("LlamaMLP.forward", "x = 3 * x")
    assert (expected() - before).abs().mean() > 0.3, "the change shows"
    assert difference() == (False, pytest.approx(0, abs=0.05))


def test_changed_parts_are_neither_fused_nor_computed_by_kernels(change):
    norm = LlamaRMSNorm(64).bfloat16()
    mlp = LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96))
    assert use_cpu_kernels(norm) == [norm]
    assert compile_elementwise(mlp, lambda function: function).modules == [mlp]
    del norm.forward, mlp.forward
    change("LlamaRMSNorm.forward")
    change("LlamaMLP.forward")
    assert use_cpu_kernels(norm) == []
    assert compile_elementwise(mlp, lambda function: function).modules == []


def test_docstrings_are_not_code(change):
    assert has_code(LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64)), GATED_MLP)
    plain = source_digest(LlamaMLP.forward)
    change("LlamaMLP.forward", '"""Multiply."""')
    assert source_digest(LlamaMLP.forward) == plain


def test_code_without_a_source_is_not_known():
    namespace = {}
    exec("def forward(self, x):\n    return x", namespace)
    assert source_digest(namespace["forward"]) is None
    assert source_digest(len) is None
