"""Rotary scaling of a GGUF file in transformers' terms."""

import numpy as np
import pytest

from neuroada_serve.errors import ModelError
from neuroada_serve.model.gguf_config import config_of
from neuroada_serve.model.gguf_file import read_gguf
from tests.support.gguf_files import Changes, random_model, save_gguf


def rope(tmp_path, kind, keys=None, tensors=lambda found: found):
    path = save_gguf(tmp_path / "model.gguf", random_model(kind), Changes(keys or {}, tensors))
    return config_of(read_gguf([path]))["rope_parameters"]


def test_no_scaling_is_said_as_such(tmp_path):
    assert rope(tmp_path, "llama") == {"rope_type": "default", "rope_theta": 10000.0}
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert rope(tmp_path, "llama", none)["rope_type"] == "default"
    assert rope(tmp_path, "llama", {"llama.rope.freq_base": None})["rope_theta"] == 10000.0


def test_linear_is_what_a_factor_alone_means(tmp_path):
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        found = rope(tmp_path, "llama", {key: 4.0})
        assert (found["rope_type"], found["factor"]) == ("linear", 4.0)


def test_yarn_with_its_settings(tmp_path):
    keys = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_attn_factor": 1.5}
    keys = {f"llama.rope.scaling.{name}": value for name, value in keys.items()}
    assert rope(tmp_path, "llama yarn", keys) == {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }


def test_yarn_attention_factor_multiplies_the_usual_one(tmp_path):
    found = rope(tmp_path, "llama yarn", {"llama.rope.scaling.attn_factor": 0.5})
    assert found["attention_factor"] == pytest.approx((0.1 * np.log(4) + 1) / 2)


def test_llama_3_settings_are_recovered_from_its_factors(tmp_path):
    """Those of Llama 3.1 and 3.2: theta 500000, heads of 64 or 128, factor 8 or 32."""
    from neuroada_serve.model.gguf_rope import _llama3, _llama3_factors

    for factor, dim in ((8.0, 128), (32.0, 64)):
        stored = _llama3_factors(factor, 8192, 500000.0, dim).astype(np.float32)
        found = _llama3(stored, 500000.0, dim, 131072)
        assert found == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


def test_other_factors_are_kept_as_they_are(tmp_path):
    factors = np.array([1, 1.5, 2, 3, 5, 8, 8, 9], np.float32)
    found = rope(tmp_path, "llama 3.1", tensors=lambda t: t | {"rope_freqs.weight": factors})
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == factors.tolist()
    assert found["attention_factor"] == 1.0


@pytest.mark.parametrize(
    ("kind", "keys", "tensor"),
    [
        ("llama yarn", {}, "rope_freqs.weight"),
        ("llama longrope", {"llama.rope.scaling.factor": 2.0}, None),
        ("llama longrope", {}, "rope_freqs.weight"),
    ],
)
def test_two_scalings_at_once_are_refused(kind, keys, tensor, tmp_path):
    more = {tensor: np.full(8, 2, np.float32)} if tensor else {}
    with pytest.raises(ModelError, match="scaled in two ways at once"):
        rope(tmp_path, kind, keys, lambda found: found | more)


def test_factors_of_another_head_are_refused(tmp_path):
    short = {"rope_freqs.weight": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match=r"rope_freqs.weight has shape \(4,\) in place of \(8,\)"):
        rope(tmp_path, "llama", tensors=lambda found: found | short)
