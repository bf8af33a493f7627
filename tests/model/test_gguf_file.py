"""GGUF files that are split, cut short, damaged or something else."""

import shutil
from pathlib import Path

import gguf
import pytest

from neuroada_serve.errors import ModelError
from neuroada_serve.model.gguf_file import gguf_stem, read_gguf
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.source import resolve_model
from tests.support.gguf_files import Changes, random_model, save_gguf


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture
def parts(model, tmp_path):
    save_gguf(tmp_path / "split.gguf", model, Changes(split_max_tensors=8))
    found = sorted(tmp_path.glob("split-*.gguf"))
    assert [part.name for part in found] == [f"split-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_split_file_is_joined_from_any_part(parts, model, tmp_path):
    whole = resolve_model(str(save_gguf(tmp_path / "whole.gguf", model)))
    found = [resolve_model(str(part)) for part in parts]
    assert {source.name for source in found} == {"split"}
    assert len({source.path for source in found}) == 1
    assert load_base(found[0]).spec.fingerprint == load_base(whole).spec.fingerprint


def test_missing_parts_are_named(parts):
    parts[0].unlink()
    with pytest.raises(
        ModelError, match="one part of 3, and split-00001-of-00003.gguf is not besi"
    ):
        resolve_model(str(parts[1]))
    with pytest.raises(ModelError, match="no file '.*split-00001-of-00003.gguf'"):
        resolve_model(str(parts[0]))


def test_part_under_another_name_is_refused(parts, tmp_path):
    parts[0].rename(tmp_path / "half.gguf")
    with pytest.raises(ModelError, match="half.gguf cannot be read .* it is a part of 3, which"):
        resolve_model(str(tmp_path / "half.gguf"))


def test_parts_in_another_order_are_refused(parts, tmp_path):
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match="split-00002-of-00003.gguf is not part 2 of 3"):
        resolve_model(str(parts[0]))


def test_part_of_another_split_of_the_model_is_refused(parts, model, tmp_path):
    (tmp_path / "other").mkdir()
    save_gguf(tmp_path / "other" / "split.gguf", model, Changes(split_max_tensors=7))
    shutil.copy(tmp_path / "other" / parts[1].name, parts[1])
    with pytest.raises(ModelError, match="do not have the tensors that the first one announces"):
        resolve_model(str(parts[0]))


def test_names_of_parts():
    path = Path("/models/big-00002-of-00003.gguf")
    assert gguf_stem(path) == "big"
    assert gguf_stem(path.with_name("big-2-of-3.gguf")) == "big-2-of-3"


@pytest.mark.parametrize("keep", [0, 4, 20, 100, 5000, -40_000, -1])
def test_file_cut_short_is_refused_and_leaves_nothing(keep, model, tmp_path):
    path = save_gguf(tmp_path / "model.gguf", model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ModelError, match="model.gguf cannot be read as a GGUF causal LM: it is no G"
    ):
        resolve_model(str(path))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_part_cut_short_is_named(parts):
    parts[2].write_bytes(parts[2].read_bytes()[:-999])
    with pytest.raises(ModelError, match="split-00003-of-00003.gguf .* cut short or damaged"):
        resolve_model(str(parts[0]))


def test_values_are_the_stored_ones_in_torchs_order(model, tmp_path):
    file = read_gguf([save_gguf(tmp_path / "model.gguf", model)])
    embeddings = model.model.embed_tokens.weight
    assert file.shape("token_embd.weight") == tuple(embeddings.shape)
    assert (file.values("token_embd.weight") == embeddings.detach().numpy()).all()


def test_adapters_and_unknown_kinds_are_refused_by_name(tmp_path):
    for name, key, value, said in (
        ("a", "general.type", "adapter", "it holds 'adapter', not a model"),
        ("b", "general.type", "model", "its architecture 'mamba' is not converted; llama, qwen2"),
    ):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "mamba")
        writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelError, match=said):
            resolve_model(str(tmp_path / f"{name}.gguf"))
