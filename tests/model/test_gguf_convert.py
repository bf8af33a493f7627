"""A GGUF file becomes exactly the model that it was written from, or is refused by name."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroada_serve.errors import ModelError
from neuroada_serve.model import gguf_convert
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from tests.support.gguf_files import KINDS, Changes, Quantization, random_model, save_gguf


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "cache"))


def converted(path):
    """The model that is served from a file, in plain transformers."""
    folder = resolve_model(str(path)).path
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def assert_same_model(found, expected, length=100, atol=1e-4):
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_file_becomes_the_model_it_was_written_from(kind, tmp_path):
    model = random_model(kind)
    assert_same_model(converted(save_gguf(tmp_path / "model.gguf", model)), model)


def test_scalings_of_these_models_change_their_answers():
    """Or the test above would show nothing."""
    ids = torch.arange(100)[None]
    logits = {
        kind: random_model(kind)(ids).logits
        for kind in ("llama untied", "llama linear", "llama yarn", "llama 3.1", "llama longrope")
    }
    plain = logits.pop("llama untied")
    assert all((plain - scaled).abs().max() > 1 for scaled in logits.values())


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("llama biases", "Q4_1"),
        ("qwen2 yarn", "Q8_0"),
        ("gemma2", "Q5_0"),
        ("phi3", "Q4_0"),
        ("gpt2", "Q8_0"),
        ("llama", "BF16"),
    ],
)
def test_quantized_file_holds_what_its_blocks_say(kind, quantization, tmp_path):
    model = random_model(kind)
    changes = Changes(quantization=Quantization[quantization])
    path = save_gguf(tmp_path / "model.gguf", model, changes)
    tensors = gguf.GGUFReader(path).tensors
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}
    plain = save_gguf(tmp_path / "plain.gguf", model, Changes(tensors=lambda _: stored))
    expected = {n: t.bfloat16() for n, t in load_file(weights(plain)).items()}
    found = load_file(weights(path))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights(path):
    return resolve_model(str(path)).path / "model.safetensors"


def test_matrices_of_16_bits_become_bfloat16_and_float32_stays(tmp_path):
    model = random_model("llama")
    half = save_gguf(tmp_path / "half.gguf", model, Changes(quantization=Quantization.F16))
    assert load_base(resolve_model(str(half))).dtype == torch.bfloat16
    whole = save_gguf(tmp_path / "whole.gguf", model)
    assert load_base(resolve_model(str(whole))).dtype == torch.float32


def test_same_file_gives_the_same_bytes(tmp_path, monkeypatch):
    path = save_gguf(tmp_path / "model.gguf", random_model("llama biases"))
    first = weights(path).read_bytes()
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "other"))
    assert weights(path).read_bytes() == first


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert, "_SHARD_BYTES", 100_000)
    model = random_model("qwen3")
    path = save_gguf(tmp_path / "model.gguf", model)
    assert_same_model(converted(path), model)
    assert len(list(resolve_model(str(path)).path.glob("model-*.safetensors"))) > 2
    assert load_base(resolve_model(str(path))).spec.shapes


# --- every tensor has a place, every parameter a tensor --------------------------------------


def without(*names):
    return Changes(tensors=lambda found: {n: t for n, t in found.items() if n not in names})


def with_tensor(name, shape=(64,)):
    return Changes(tensors=lambda found: found | {name: np.ones(shape, np.float32)})


def refused(tmp_path, kind, changes):
    path = save_gguf(tmp_path / "model.gguf", random_model(kind), changes)
    with pytest.raises(
        ModelError, match="^model.gguf cannot be read as a GGUF causal LM: "
    ) as found:
        resolve_model(str(path))
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    return str(found.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "blk.1.attn_k.weight"),
        ("llama", "blk.0.ffn_norm.weight"),
        ("llama", "output_norm.weight"),
        ("llama", "token_embd.weight"),
        ("qwen3", "blk.0.attn_q_norm.weight"),
        ("gemma2", "blk.1.post_ffw_norm.weight"),
        ("phi3", "blk.0.ffn_up.weight"),
        ("gpt2", "blk.1.attn_qkv.bias"),
        ("gpt2", "position_embd.weight"),
        ("phi3 longrope", "rope_factors_short.weight"),
    ],
)
def test_missing_tensor_is_named(kind, name, tmp_path):
    assert f"it lacks tensor {name}" in refused(tmp_path, kind, without(name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "blk.0.attn_sinks.weight"),
        ("llama", "blk.0.attn_norm.bias"),
        ("llama", "blk.2.attn_q.weight"),
        ("llama", "output.bias"),
        ("qwen2", "rope_freqs.weight"),
        ("qwen2", "blk.1.ffn_up.bias"),
        ("gemma", "blk.0.post_attention_norm.weight"),
        ("phi3", "blk.0.attn_qkv.bias"),
    ],
)
def test_tensor_without_a_place_is_named(kind, name, tmp_path):
    assert f"has no place for tensor {name}" in refused(tmp_path, kind, with_tensor(name))


def test_tensor_of_another_shape_is_named(tmp_path):
    said = refused(tmp_path, "llama", with_tensor("blk.1.attn_norm.weight", (32,)))
    assert "blk.1.attn_norm.weight has shape (32,) in place of (64,)" in said


def test_biases_that_a_file_has_nowhere_add_nothing(tmp_path):
    """As in llama.cpp: a Llama whose q, k and v alone have biases."""
    biases = [f"blk.{i}.{part}.bias" for i in (0, 1) for part in ("attn_output", "ffn_gate")]
    model = random_model("llama biases")
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
        layer.mlp.gate_proj.bias.data.zero_()
    assert_same_model(converted(save_gguf(tmp_path / "model.gguf", model, without(*biases))), model)


def test_bias_that_one_layer_lacks_is_named(tmp_path):
    said = refused(tmp_path, "llama biases", without("blk.1.attn_q.bias"))
    assert "it lacks tensor blk.1.attn_q.bias" in said


def test_type_without_a_reader_is_named(tmp_path):
    def whole_numbers(found):
        return found | {"blk.0.attn_norm.weight": np.ones(64, np.int32)}

    said = refused(tmp_path, "llama", Changes(tensors=whole_numbers))
    assert "tensor blk.0.attn_norm.weight is of type I32" in said


# --- tokens ----------------------------------------------------------------------------------


def test_every_id_that_ends_an_answer_is_kept(tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 256, "tokenizer.ggml.eom_token_id": 65}
    path = save_gguf(tmp_path / "model.gguf", random_model("llama"), Changes(keys))
    base = load_base(resolve_model(str(path)))
    assert base.eos_token_ids == {257, 256, 65}
    assert base.model.generation_config.eos_token_id == [257, 256, 65]
    assert base.model.generation_config.bos_token_id == 256
    assert base.model.config.pad_token_id == 259


def test_chat_template_comes_along(tmp_path):
    keys = {"tokenizer.chat_template": "{{ messages[0]['content'] }}!"}
    path = save_gguf(tmp_path / "model.gguf", random_model("llama"), Changes(keys))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(path)).path)
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi!"
