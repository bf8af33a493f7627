"""A GGUF file answers here as in llama.cpp: `pytest -m llamacpp`, see docs/development.md."""

import pytest
import torch

from neuroada_serve import LLM, SamplingParams
from tests.support.gguf_files import KINDS, NOT_IN_LLAMA_CPP, Changes, random_model, save_gguf

pytestmark = pytest.mark.llamacpp

PROMPTS = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 9, 90)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROADA_CACHE", str(tmp_path / "cache"))


def llama_cpp_tokens(path, prompts, num_tokens):
    """Greedy tokens of llama.cpp, keys and values in float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    answers = []
    for prompt in prompts:
        model.reset()
        stream = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([next(stream) for _ in range(num_tokens)])
    model.close()
    return answers


def our_tokens(path, prompts, num_tokens):
    # Long rotary factors are chosen by the longest text allowed, as llama.cpp does by its context.
    llm = LLM(str(path), dtype="float32", device="cpu", max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [list(answer.token_ids) for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_IN_LLAMA_CPP])
def test_greedy_tokens_are_llama_cpps(kind, tmp_path):
    # llama.cpp's GELU is a table of 16-bit numbers: a GPT-2 of seed 0 has a close decision.
    path = save_gguf(tmp_path / "model.gguf", random_model(kind, seed=kind == "gpt2"))
    prompts = [prompt.tolist() for prompt in PROMPTS]
    expected = llama_cpp_tokens(path, prompts, 24)
    assert our_tokens(path, prompts, 24) == expected
    assert len({tuple(answer) for answer in expected}) == len(prompts)


def test_split_file_is_llama_cpps(tmp_path):
    model = random_model("llama biases")
    path = save_gguf(tmp_path / "model.gguf", model, Changes(split_max_tensors=9))
    prompts = [prompt.tolist() for prompt in PROMPTS]
    assert our_tokens(path, prompts, 24) == llama_cpp_tokens(path, prompts, 24)
