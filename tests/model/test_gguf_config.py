"""Settings of a GGUF file are carried over, or refused by name."""

import pytest

from neuroada_serve.errors import ModelError
from neuroada_serve.model.gguf_config import config_of
from neuroada_serve.model.gguf_file import read_gguf
from tests.support.gguf_files import Changes, random_model, save_gguf


def config(tmp_path, kind, **keys):
    changes = Changes({key.replace("__", "."): value for key, value in keys.items()})
    return config_of(read_gguf([save_gguf(tmp_path / "model.gguf", random_model(kind), changes)]))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "llama.nobody.knows", 1),
        ("llama", "llama.attention.scale", 0.3),
        ("llama", "llama.attention.sliding_window", 128),
        ("llama", "llama.attn_logit_softcapping", 30.0),
        ("llama", "llama.final_logit_softcapping", 30.0),
        ("llama", "llama.expert_count", 8),
        ("llama", "llama.logit_scale", 8.0),
        ("llama", "llama.residual_scale", 0.22),
        ("llama", "llama.embedding_scale", 12.0),
        ("llama", "llama.attention.causal", False),
        ("llama", "llama.attention.value_length", 8),
        ("llama", "llama.tensor_data_layout", "reference"),
        ("llama", "llama.rope.dimension_count", 8),
        ("llama", "llama.vocab_size", 300),
        ("llama", "llama.attention.head_count", [4, 2]),
        ("qwen2", "qwen2.pooling_type", 3),
        ("qwen3", "qwen3.nextn_predict_layers", 1),
        ("gemma2", "gemma2.rope.freq_base_swa", 5.0),
        ("gemma3", "gemma3.attn_logit_softcapping", 50.0),
        ("gpt2", "gpt2.attention.head_count_kv", 1),
        ("llama yarn", "llama.rope.scaling.yarn_ext_factor", 0.5),
        ("llama yarn", "llama.rope.scaling.yarn_log_multiplier", 0.1),
        ("llama yarn", "llama.rope.scaling.type", "cube"),
        ("llama", "llama.rope.scaling.attn_factor", 2.0),
        ("llama", "llama.rope.scaling.type", "longrope"),
        ("phi3", "phi3.rope.scaling.factor", 4.0),
    ],
)
def test_setting_that_transformers_cannot_follow_is_refused(kind, key, value, tmp_path):
    with pytest.raises(ModelError, match="model.gguf cannot be read as a GGUF causal LM: "):
        config(tmp_path, kind, **{key: value})


def test_unknown_settings_are_named(tmp_path):
    with pytest.raises(
        ModelError, match="what llama.nobody, llama.x.knows means is not known here"
    ):
        config(tmp_path, "llama", llama__x__knows=1, llama__nobody="knows")


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.embedding_le"])
def test_setting_that_is_missing_is_named(key, tmp_path):
    key = {"llama.embedding_le": "llama.embedding_length"}.get(key, key)
    with pytest.raises(ModelError, match=f"it lacks key {key}"):
        config(tmp_path, "llama", **{key: None})


def test_more_layers_than_tensors_are_refused_at_once(tmp_path):
    with pytest.raises(ModelError, match="tensors for 1000000000 layers"):
        config(tmp_path, "llama", llama__block_count=10**9)


def test_settings_that_change_nothing_are_taken(tmp_path):
    harmless = {
        "llama.attention.scale": 0.25,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.attention.head_count_kv": [2, 2],
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.rope.scaling.finetuned": True,
        "general.author": "somebody",
        "quantize.imatrix.file": "x.dat",
    }
    assert config(tmp_path, "llama", **harmless) == config(tmp_path, "llama")


def test_numbers_are_the_decimals_that_were_meant(tmp_path):
    found = config(tmp_path, "llama", **{"llama.attention.layer_norm_rms_epsilon": 1e-5})
    assert found["rms_norm_eps"] == 1e-5


def test_windows_and_caps_of_gemma(tmp_path):
    found = config(tmp_path, "gemma2", **{"gemma2.attn_logit_softcapping": None})
    assert found["attn_logit_softcapping"] == 50.0  # llama.cpp's default
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    pattern = {"gemma2.attention.sliding_window_pattern": [False, True]}
    listed = config(tmp_path, "gemma2", **pattern)
    assert listed["layer_types"] == ["full_attention", "sliding_attention"]
    without = config(tmp_path, "gemma3", **{"gemma3.attention.sliding_window": None})
    assert without["layer_types"] == ["full_attention"] * 2


def test_window_of_phi3_is_the_models_own(tmp_path):
    assert config(tmp_path, "phi3")["sliding_window"] is None
    assert config(tmp_path, "phi3", **{"phi3.attention.sliding_window": 7})["sliding_window"] == 7


def test_tokenizer_of_another_size_is_refused(tmp_path):
    with pytest.raises(ModelError, match="its tokenizer has 2 tokens, its embeddings 260"):
        config(tmp_path, "llama", **{"tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(ModelError, match="its eos_token_id 999 is none of its 260 tokens"):
        config(tmp_path, "llama", **{"tokenizer.ggml.eos_token_id": 999})
