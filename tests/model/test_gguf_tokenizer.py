"""The tokenizer of a converted GGUF file has the file's tokens, all of them and no others."""

import pytest
from transformers import AutoTokenizer

from neuroada_serve.errors import ModelError
from neuroada_serve.model.source import resolve_model
from tests.support.gguf_files import KINDS, Changes, random_model, save_gguf

# Not qwen2: transformers reads every folder of that kind with a class that adds its own token.
ONE_EACH = ["llama", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2"]


def tokenizer(tmp_path, monkeypatch, kind, notify=lambda message: None, **keys):
    assert kind in KINDS
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "cache"))
    changes = Changes({key.replace("__", "."): value for key, value in keys.items()})
    path = save_gguf(tmp_path / "model.gguf", random_model(kind), changes)
    return AutoTokenizer.from_pretrained(resolve_model(str(path), notify).path)


@pytest.mark.parametrize("kind", ONE_EACH)
def test_no_token_is_added_that_the_model_has_no_embedding_for(kind, tmp_path, monkeypatch):
    found = tokenizer(tmp_path, monkeypatch, kind)
    assert len(found) == 260
    text = "<s>Grüße, ab 12 <unk><mask><|endoftext|></s>"
    ids = found(text, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (256, 257)
    assert max(ids) < 260
    assert found.decode(ids) == text
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (256, 257, 259)


@pytest.mark.parametrize("adds", [True, False])
def test_first_token_is_added_where_the_file_says_so(adds, tmp_path, monkeypatch):
    found = tokenizer(tmp_path, monkeypatch, "llama", tokenizer__ggml__add_bos_token=adds)
    assert (found("a")["input_ids"][0] == 256) == adds


def test_file_without_a_tokenizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="it has no tokenizer"):
        tokenizer(tmp_path, monkeypatch, "llama", tokenizer__ggml__tokens=None)


@pytest.mark.parametrize(("kind", "needed"), [("gpt2", "merges"), ("llama", "scores")])
def test_what_a_kind_of_tokenizer_needs_is_named(kind, needed, tmp_path, monkeypatch):
    keys = {"tokenizer__ggml__model": kind, f"tokenizer__ggml__{needed}": None}
    with pytest.raises(ModelError, match=f"it lacks key tokenizer.ggml.{needed}"):
        tokenizer(tmp_path, monkeypatch, "llama", **keys)


def test_tokenizer_of_an_unknown_kind_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="cannot be read as a GGUF causal LM"):
        tokenizer(tmp_path, monkeypatch, "llama", tokenizer__ggml__model="nobodys")


@pytest.mark.parametrize(
    ("merge", "fault"),
    [
        ("ab", "'ab', is not two tokens with a space between"),
        ("a  b", "'a  b', is not two tokens with a space between"),
        (7, "7, is not two tokens with a space between"),
        ("a zz", "needs token 'zz', which is not among tokenizer.ggml.tokens"),
        ("b a", "needs token 'ba', which is not among tokenizer.ggml.tokens"),
    ],
)
def test_merge_that_is_none_is_named(merge, fault, tmp_path, monkeypatch):
    merges = ["a b", merge] if isinstance(merge, str) else [merge, 8]
    with pytest.raises(ModelError) as refused:
        tokenizer(tmp_path, monkeypatch, "llama", tokenizer__ggml__merges=merges)
    assert f"tokenizer.ggml.merges[{merges.index(merge)}], " in str(refused.value)
    assert fault in str(refused.value)


CUT = "a   12;  7½"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["a", "  ", " 12", ";", " ", " 7½"]),
        ("smollm", ["a", "   ", "1", "2", ";", "  ", "7", "½"]),
        ("llama-bpe", ["a", "  ", " ", "12", ";", " ", " ", "7½"]),
    ],
)
def test_texts_are_cut_as_llama_cpp_cuts_them(name, pieces, tmp_path, monkeypatch):
    told = []
    found = tokenizer(tmp_path, monkeypatch, "llama", told.append, tokenizer__ggml__pre=name)
    cut = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(CUT)
    assert [CUT[start:stop] for _, (start, stop) in cut] == pieces
    assert not any("pre-tokenizer" in message for message in told)


@pytest.mark.parametrize(("name", "said"), [("nobodys", "'nobodys', unknown"), (None, "names no")])
def test_unknown_way_to_cut_texts_is_said(name, said, tmp_path, monkeypatch):
    told = []
    tokenizer(tmp_path, monkeypatch, "llama", told.append, tokenizer__ggml__pre=name)
    assert [said in message for message in told if "pre-tokenizer" in message] == [True]
