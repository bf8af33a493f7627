"""Weights on their way in: the right ones, in the right dtype, or a refusal that names them."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from neuroada_serve import uncollected
from neuroada_serve.errors import ModelError
from neuroada_serve.model.loader import load_base, load_checked, place_
from neuroada_serve.model.source import ModelSource
from tests.support.tiny import FAMILIES, save_tiny_model

IDS = torch.arange(20).unsqueeze(0)
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path) -> ModelSource:
    return save_tiny_model(tmp_path / "tiny")


def rewrite(folder: Path, change) -> None:
    """Save the weights as `change` leaves or returns them."""
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_loads_as_transformers_loads_it(family, dtype, tmp_path):
    source = save_tiny_model(tmp_path, family)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    base = load_base(source, dtype)
    assert base.dtype == expected.dtype
    for name, parameter in expected.named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter), name
        assert base.model.get_parameter(name).dtype == parameter.dtype, name
    assert torch.equal(base.model(IDS).logits, expected(IDS).logits)


@torch.no_grad()
def test_shards_and_a_left_out_prefix_load_the_same(source):
    expected = load_base(source).model(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(source.path)
    (source.path / "model.safetensors").unlink()
    model.save_pretrained(source.path, max_shard_size="20KB")
    assert torch.equal(load_base(source).model(IDS).logits, expected)
    for file in source.path.glob("model*"):
        file.unlink()
    model.save_pretrained(source.path)
    rewrite(source.path, lambda w: {n.removeprefix("model."): t for n, t in w.items()})
    assert torch.equal(load_base(source).model(IDS).logits, expected)


def test_tied_weights_stay_one_tensor_in_another_dtype(source):
    model = load_base(source, "bfloat16").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_rotary_frequencies_keep_float32(source):
    assert load_base(source, "bfloat16").model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_placing_brings_every_tensor_to_the_device(source):
    model = AutoModelForCausalLM.from_pretrained(source.path)
    expected = model(IDS).logits
    place_(model, torch.device("cuda"), None)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_missing_tensor_is_refused_by_name(family, tmp_path):
    source = save_tiny_model(tmp_path, family)
    name = {"llama": WEIGHT, "gpt2": "transformer.h.1.mlp.c_fc.weight"}[family]
    rewrite(tmp_path, lambda w: {n: t for n, t in w.items() if n != name})
    with pytest.raises(ModelError, match=f"tiny-{family}.* its files lack {name}$"):
        load_base(source)


def test_many_missing_tensors_are_counted(source):
    rewrite(source.path, lambda w: {n: t for n, t in w.items() if "layers.1." not in n})
    with pytest.raises(ModelError, match=r"lack (model\S+ ){4}model\S+ and 4 more$"):
        load_base(source)


def test_buffer_that_transformers_passes_over_is_refused(tmp_path, monkeypatch):
    """Classes list what checkpoints often lack: it would keep the value it was made with."""
    source = save_tiny_model(tmp_path, "llama")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"norm\.weight"])
    assert load_base(source)
    rewrite(tmp_path, lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"its files lack model\.norm\.weight$"):
        load_base(source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_without_their_scales_are_refused(dtype, source):
    rewrite(source.path, lambda w: w | {WEIGHT: w[WEIGHT].to(dtype)})
    with pytest.raises(ModelError, match=f"config says nothing of the scales of {WEIGHT}$"):
        load_base(source)


def in_shards(source):
    model = AutoModelForCausalLM.from_pretrained(source.path)
    (source.path / "model.safetensors").unlink()
    model.save_pretrained(source.path, max_shard_size="20KB")
    return source.path / "model.safetensors.index.json"


@pytest.mark.parametrize("load", [load_base, load_checked])
def test_absent_shard_is_named(load, source):
    in_shards(source)
    (source.path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-00005.safetensors, which its index"):
        load(source)


def test_tensor_that_its_shard_lacks_is_named(source):
    shard = source.path / json.loads(in_shards(source).read_text())["weight_map"][WEIGHT]
    weights = {name: t for name, t in load_file(shard).items() if name != WEIGHT}
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(ModelError, match=f"its files lack {WEIGHT}$"):
        load_base(source)


def test_index_that_names_no_file_is_refused(source):
    in_shards(source).write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(ModelError, match="names no file; download it again"):
        load_base(source)


def test_tensor_of_another_shape_is_refused_with_both(source):
    rewrite(source.path, lambda w: w | {WEIGHT: w[WEIGHT][:-1].contiguous()})
    with pytest.raises(ModelError, match=rf"{WEIGHT} \(31, 48\) in place of \(32, 48\)"):
        load_base(source)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensor_without_a_place_in_its_layer_is_refused(prefix, source):
    """A bias that the config knows nothing of: without it this would be another model."""

    def change(weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        bias = WEIGHT.removeprefix(prefix).replace("weight", "bias")
        return weights | {bias: torch.ones(32)}

    rewrite(source.path, change)
    with pytest.raises(ModelError, match="its config has no place for .*0.mlp.down_proj.bias"):
        load_base(source)


def test_left_overs_that_belong_to_no_layer_are_passed_over(source):
    extra = ["mtp.head.weight", "model.rotary_emb.old", "model.layers.0.self_attn.rotary.inv_freq"]
    rewrite(source.path, lambda w: w | {name: torch.ones(4) for name in extra})
    assert load_base(source).spec.shapes


# --- the way there ---------------------------------------------------------------------------


def test_uncollected_pauses_the_garbage_collector_and_no_longer():
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_importing_the_front_door_imports_nothing_heavy():
    code = "import neuroada_serve, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
