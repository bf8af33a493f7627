"""Arguments of `LLM`: vLLM's names and forms, and a sentence for each value that is refused."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from neuroada_serve import LLM, SamplingParams, load_adapter, save_adapter
from neuroada_serve.errors import AdapterNotFoundError, RequestError, UsageError
from tests.support.tiny import random_adapter, save_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=3)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llm")
    source = save_tiny_model(root / "model")
    for seed, name in enumerate(("fr", "de")):
        save_adapter(random_adapter(source, seed), root / name)
    return root


@pytest.fixture(scope="module")
def llm(folders):
    return LLM(model=folders / "model", adapters=[folders / "fr", str(folders / "de")])


def test_listed_folders_are_named_after_themselves(llm):
    assert llm.adapters == ("fr", "de")


@pytest.mark.parametrize("method", ["generate", "chat", "classify"])
def test_vllm_names_are_accepted(method):
    names = inspect.signature(getattr(LLM, method)).parameters
    assert names["use_tqdm"].default is True
    assert list(names)[1] == ("messages" if method == "chat" else "prompts")
    assert method == "classify" or list(names)[2:4] == ["sampling_params", "adapters"]


def test_keywords_and_places_mean_the_same(llm):
    by_place = llm.chat(HELLO, GREEDY, "fr")[0]
    by_name = llm.chat(messages=HELLO, sampling_params=GREEDY, adapters="fr")[0]
    assert by_place.token_ids == by_name.token_ids
    [answer] = llm.generate(prompts="hello", sampling_params=GREEDY, use_tqdm=False)
    assert answer.prompt == "hello"


def test_prompt_forms_mean_the_same(llm):
    expected = llm.generate("hello", GREEDY)[0]
    ids = list(expected.prompt_token_ids)
    forms = [
        {"prompt": "hello"},
        {"prompt_token_ids": ids},
        {"prompt": "hello", "prompt_token_ids": ids},
        ids,
        np.array(ids),
        torch.tensor(ids),
    ]
    for one in (*forms[:4], forms):
        for answer in llm.generate(one, GREEDY):
            assert answer.prompt_token_ids == expected.prompt_token_ids
            assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(5), "prompts must be a list of prompts, not int"),
        (lambda llm: llm.generate(None), "prompts must be a list of prompts, not NoneType"),
        (lambda llm: llm.generate(["a", None]), "a text or a list of token ids, not NoneType"),
        (lambda llm: llm.generate([b"a"]), "a text or a list of token ids, not bytes"),
        (lambda llm: llm.generate([["a", "b"]]), "token ids, not a list of str"),
        (lambda llm: llm.generate([[1, True]]), "token ids, not a list of int"),
        (lambda llm: llm.generate({"text": "a"}), "this one has 'text'"),
        (lambda llm: llm.generate({}), "this one has neither"),
        (lambda llm: llm.generate("a", 5), "sampling_params must be a SamplingParams"),
        (lambda llm: llm.generate("a", {"temperature": 0}), "one per prompt, not dict"),
        (lambda llm: llm.generate("a", [GREEDY] * 2), "2 sampling_params for 1 prompts"),
        (lambda llm: llm.generate("a", GREEDY, True), "adapters must be a name, a mix"),
        (lambda llm: llm.generate("a", GREEDY, [7]), "chosen by its name, or a mix"),
        (lambda llm: llm.generate("a", GREEDY, {"fr": "1"}), "chosen by its name, or a mix"),
        (lambda llm: llm.generate("a", GREEDY, ["fr", "de"]), "2 adapters for 1 prompts"),
        (lambda llm: llm.chat("hello"), "messages must be a conversation"),
        (lambda llm: llm.chat(None), "messages must be a conversation"),
        (lambda llm: llm.chat([["hello"]]), "messages must be a conversation"),
        (lambda llm: llm.chat([HELLO, []]), "messages must be a conversation"),
        (lambda llm: llm.merge(5), "chosen by its name, or a mix"),
        (lambda llm: llm.unload_adapter("nobody"), "nobody"),
        (lambda llm: llm.load_adapter(5, "x"), "name must be a text, not int"),
        (lambda llm: llm.load_adapter("x", None), "'x' must be a folder or an Adapter"),
        (lambda llm: LLM(5), "model must be a name or a path, not int"),
        (lambda llm: LLM("x", adapters=5), "a list of folders, each named after itself; int"),
        (lambda llm: LLM("x", adapters=["a/fr", "b/fr"]), "two adapters are called 'fr'"),
        (lambda llm: LLM("x", max_num_seqs="4"), "max_num_seqs must be a number, got '4'"),
        (lambda llm: LLM("x", adapter_weights={"a": "b"}), "the weight of 'a' must be above 0"),
        (lambda llm: load_adapter(None), "path must be an adapter's folder, not NoneType"),
        (lambda llm: load_adapter("x", "demo"), "base must be a BaseSpec"),
        (lambda llm: save_adapter("x", None), r"takes an Adapter and a folder to write"),
    ],
)
def test_mistake_is_one_of_our_errors(llm, call, words):
    with pytest.raises(UsageError, match=words):
        call(llm)
    assert not llm.engine.has_unfinished


def test_unknown_keywords_are_the_usual_type_error(llm, folders):
    with pytest.raises(TypeError, match=r"LLM\(\) got an unexpected keyword argument 'tensor_par"):
        LLM(str(folders / "model"), tensor_parallel_size=2)
    with pytest.raises(TypeError, match="lora_request"):
        llm.generate("a", lora_request=None)


def test_a_folder_alone_is_a_list_of_one(folders):
    assert LLM(str(folders / "model"), folders / "fr").adapters == ("fr",)
    with pytest.raises(AdapterNotFoundError, match="no adapter directory"):
        LLM(str(folders / "model"), Path("nowhere") / "fr")


def test_wrong_token_ids_are_named(llm):
    with pytest.raises(RequestError, match="integers within"):
        llm.generate([[5, 70_000]])
