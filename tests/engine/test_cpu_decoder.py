"""Steps as one CPU kernel: what transformers computes, for every mix of adapters."""

from dataclasses import replace

import pytest
import torch

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.adapters.format import make_adapter
from neuroada_serve.engine import cpu_decoder, known_code
from neuroada_serve.engine.cpu_decoder import CpuDecoder, known_decoder
from neuroada_serve.model.bypass_linear import attach_bypass
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import cpu_forward, cpu_team, cpu_vectors, matrix
from neuroada_serve.tasks import SEQ_CLS
from tests.support.decoder_sizes import SIZES
from tests.support.tiny import FAMILIES, VOCAB, adapter_for, plain_merged, save_tiny_model

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = sorted(set(FAMILIES) - set(KNOWN))
LONG = cpu_decoder.RUN_TOKENS  # tokens of one adapter that go through the weights
PROMPT = [(7 * i) % 250 for i in range(LONG + 40)]


@pytest.fixture(autouse=True)
def weights_in_blocks_of_64(monkeypatch):
    """Pack weights ourselves if oneDNN packs in another way, as it does for AMX."""
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    saved = {}

    def source(family: str):
        if family not in saved:
            with pytest.MonkeyPatch.context() as patch:
                sized = FAMILIES[family] | (SIZES if family in KNOWN else {})
                patch.setitem(FAMILIES, family, sized)
                folder = tmp_path_factory.mktemp(family)
                saved[family] = save_tiny_model(folder, family, torch.bfloat16)
        return saved[family]

    return source


def new_llm(source, adapters: dict[str, dict], **config) -> LLM:
    base = load_base(source)
    made = {name: adapter_for(base.model, base.spec, **kw) for name, kw in adapters.items()}
    llm = LLM(str(source.path), **config)
    for name, adapter in made.items():
        llm.load_adapter(name, adapter)
    llm.made = made
    return llm


ADAPTERS = {
    "one": {"seed": 1, "k": 1},
    "other": {"seed": 2, "k": 1},
    "three": {"seed": 3, "k": 3},
    "eight": {"seed": 4, "k": 8},
    "some": {"seed": 5, "k": 2, "targets": ("k_proj", "up_proj", "o_proj")},
}


def differences(llm: LLM, source, prompts, names, max_tokens: int = 6) -> list[float]:
    """Per request, how far its log probabilities are from a float32 model's, in the mean."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    found = []
    for answer, prompt, name in zip(
        llm.generate(prompts, params, names), prompts, names, strict=True
    ):
        plain = plain_merged(source, None if name is None else llm.made[name])
        ids = [*prompt, *answer.token_ids]
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = expected[torch.arange(len(ids) - 1), ids[1:]]
        ours = [p.logprob for p in (*answer.prompt_logprobs, *answer.outputs[0].logprobs)]
        found.append((torch.tensor(ours) - expected).abs().mean().item())
    return found


def assert_as_close_as_transformers(source, prompts, names, merged=None, **config) -> None:
    """The kernel rounds in fewer places than transformers' bf16 forward, so is no further off."""
    by_kernel = new_llm(source, ADAPTERS, **config)
    assert by_kernel.engine._runner._cpu_decoder is not None
    by_modules = new_llm(source, ADAPTERS, enforce_eager=True, **config)
    assert by_modules.engine._runner._cpu_decoder is None
    for llm in (by_kernel, by_modules):
        if merged is not None:
            llm.merge(merged)
    ours = differences(by_kernel, source, prompts, names)
    theirs = differences(by_modules, source, prompts, names)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert mine < 1.3 * other + 0.01, (name, mine, other)


@pytest.mark.parametrize("family", KNOWN)
def test_kernel_is_as_close_to_float32_as_transformers(sources, family):
    names = [None, "one", "three", "eight", "some"]
    prompts = [PROMPT[:n] for n in (1, 5, 17, 40, 9)]
    assert_as_close_as_transformers(sources(family), prompts, names)


@pytest.mark.parametrize("merged", ["one", "eight", "some"])
def test_merged_adapter_is_taken_out_for_all_others(sources, merged):
    names = [None, "one", "other", "three", "eight", "some"] * 4
    prompts = [PROMPT[i : i + 5] for i in range(len(names))]
    assert_as_close_as_transformers(sources("llama"), prompts, names, merged, max_num_seqs=24)


def test_biases_are_added_by_the_modules_unless_they_are_in_the_weights(sources, monkeypatch):
    llm = new_llm(sources("qwen2"), ADAPTERS | {"biased": {"seed": 6, "k": 2, "biases": True}})
    steps = []
    run = CpuDecoder.run
    monkeypatch.setattr(CpuDecoder, "run", lambda *args: steps.append(1) or run(*args))
    prompts = [PROMPT[:n] for n in (5, 17, 9)]
    for merged, names, by_kernel in (
        (None, ["biased", None, "three"], False),
        (None, ["one", None, "three"], True),
        ("biased", ["biased"] * 3, True),
        ("biased", ["biased", None, "three"], False),
        ("one", [None, "one", "biased"], False),
    ):
        if merged is None:
            llm.unmerge()
        else:
            llm.merge(merged)
        steps.clear()
        assert max(differences(llm, sources("qwen2"), prompts, names)) < 0.1
        assert bool(steps) == by_kernel, (merged, names)


@pytest.mark.parametrize("count", [2, 3, 4, 15, 16, 17, 35])
def test_any_number_of_lanes(sources, count):
    names = [("one", "three")[i % 7 == 0] for i in range(count)]
    prompts = [PROMPT[i : i + 2] for i in range(count)]
    assert_as_close_as_transformers(sources("llama"), prompts, names, max_num_seqs=40)


@pytest.mark.parametrize("merged", [None, "three"])
def test_long_prompts_of_one_adapter_go_through_the_weights(sources, merged):
    """Several runs in one step, with other tokens before, between and behind them."""
    source = sources("llama")
    prompts = [PROMPT[:n] for n in (3, LONG + 20, LONG, 7, LONG + 1, 5, LONG, 4)]
    names = ["one", "eight", "one", None, "some", "three", None, "other"]
    assert_as_close_as_transformers(source, prompts, names, merged)


@pytest.mark.parametrize("merged", [None, "three"])
def test_runs_leave_the_weights_as_they_were(sources, monkeypatch, merged):
    llm = new_llm(sources("llama"), ADAPTERS)
    if merged is not None:
        llm.merge(merged)
    before = llm.base_digest()
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=0)
    prompts = [PROMPT[: LONG + n] for n in (0, 5, 9)]
    names = ["eight", "some", "one"]
    through_weights = llm.generate(prompts, params, names)
    assert llm.base_digest() == before
    monkeypatch.setattr(cpu_decoder, "RUN_TOKENS", 10**6)
    by_lanes = llm.generate(prompts, params, names)
    assert [a.outputs[0].logprobs for a in by_lanes] != [
        a.outputs[0].logprobs for a in through_weights
    ], "both ways round alike: was either taken?"


def test_window_hides_what_lies_before_it(sources):
    """Mistral's tiny window is seven tokens: what comes before two layers of it changes nothing."""
    llm = new_llm(sources("mistral"), {})
    assert llm.engine._runner._cpu_decoder is not None
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    ends = PROMPT[20:40]
    answers = [
        llm.generate([[*start, *ends]], params)[0].outputs[0].logprobs
        for start in (PROMPT[:20], PROMPT[20:0:-1])
    ]
    assert answers[0] == answers[1]
    short = llm.generate([ends[-12:]], params)[0].outputs[0].logprobs
    assert answers[0] != short, "the window is too small to show anything"


def test_adapters_come_and_go_between_steps(sources):
    """The plan of a layout holds addresses: a pool that grows or goes must not be read again."""
    source = sources("llama")
    llm = new_llm(source, {"one": ADAPTERS["one"]})
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    prompts = [PROMPT[:5]]
    expected = llm.generate(prompts, params, ["one"])[0].outputs[0].logprobs
    base = load_base(source)
    for seed in range(10, 20):
        llm.load_adapter(f"more-{seed}", adapter_for(base.model, base.spec, seed, k=1 + seed % 2))
        assert llm.generate(prompts, params, ["one"])[0].outputs[0].logprobs == expected
    for seed in range(10, 20):
        llm.unload_adapter(f"more-{seed}")
        assert llm.generate(prompts, params, ["one"])[0].outputs[0].logprobs == expected


def test_one_thread_gives_the_same(sources):
    source = sources("llama")
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    names, prompts = ["one", None, "eight"], [PROMPT[:5]] * 3
    answers, threads = [], torch.get_num_threads()
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            llm = new_llm(source, ADAPTERS)
            answers.append([a.outputs[0].logprobs for a in llm.generate(prompts, params, names)])
    finally:
        torch.set_num_threads(threads)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_as_before(sources, family):
    base = load_base(sources(family))
    attach_bypass(base.model)
    assert known_decoder(base.model) is None


def test_only_what_the_kernel_computes_is_known(sources, monkeypatch):
    def decoder(change=lambda model: None, **load):
        base = load_base(sources("llama"), **load)
        attach_bypass(base.model)
        change(base.model)
        return known_decoder(base.model)

    assert decoder() is not None
    assert decoder(dtype="float32") is None

    def other_activation(model):
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()

    assert decoder(other_activation) is None
    monkeypatch.setattr(known_code, "FAMILIES", {})
    assert decoder() is None


@pytest.mark.parametrize("missing", ["forward_kernels", "_openmp"])
def test_without_numba_or_torchs_threads_modules_run(sources, monkeypatch, missing):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        cpu_forward if missing == "forward_kernels" else cpu_team, missing, lambda: None
    )
    llm = new_llm(sources("llama"), {})
    assert llm.engine._runner._cpu_decoder is None
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    assert len(llm.generate([PROMPT[:3]], params)[0].token_ids) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_in_our_blocks_are_saved_as_they_were(sources, monkeypatch, family):
    pytest.importorskip("numba")
    monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    model = load_base(sources(family)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_bypass(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_head_of_any_size(sources):
    assert VOCAB % 32 != 0, "the tiny models' head would not end within a tile"
    decoder = known_decoder_of(sources("llama"))
    assert decoder.head.weight.d_out == VOCAB


def known_decoder_of(source):
    base = load_base(source)
    attach_bypass(base.model)
    return known_decoder(base.model)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (4, 1), (6, 1), (12, 2)])
@pytest.mark.parametrize("has_instruction", [True, False])
def test_product_of_pairs_with_and_without_the_instruction(monkeypatch, has_instruction, shape):
    """A processor without AVX-512 BF16 multiplies what is widened to float32."""
    numba = pytest.importorskip("numba")
    import numpy as np

    from neuroada_serve.ops import cpu_forward_kernels

    if has_instruction and not cpu_vectors.has_feature("avx512bf16"):
        pytest.skip("this processor has no such instruction")
    if not has_instruction:
        monkeypatch.setattr(cpu_vectors.binding, "get_host_cpu_features", dict)
    product = cpu_forward_kernels._whole_tile(*shape)

    @numba.njit
    def multiply(weight, x, x_bytes, pairs, y):
        product(weight, x, x_bytes, pairs, y)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).bfloat16()
    x = torch.randn(shape[0], 96, generator=generator).bfloat16()
    packed = weight.view(64, 48, 2).transpose(0, 1).contiguous()
    y = torch.empty(shape[0], 32)
    multiply(*(np.int64(n) for n in (packed.data_ptr(), x.data_ptr(), 192, 48, y.data_ptr())))
    torch.testing.assert_close(y, x.float() @ weight[:32].float().t(), rtol=1e-5, atol=1e-4)


def test_a_classifier_gets_what_the_head_sees(sources):
    source, labels = sources("llama"), ("no", "yes", "well")
    base = load_base(source)
    adapters = {}
    for seed, name in enumerate(("one", "two")):
        plain = adapter_for(base.model, base.spec, seed, k=1 + seed)
        head = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) / 8
        config = replace(plain.config, task_type=SEQ_CLS, labels=labels)
        adapters[name] = make_adapter(config, plain.modules, head)
    llm = LLM(str(source.path), adapters, max_num_seqs=4)
    runner = llm.engine._runner
    assert runner._cpu_decoder is not None
    prompts = [PROMPT[:5], PROMPT[5:40], PROMPT[40:42], PROMPT]
    names = ["one", "two", "one", "two"]
    for prompt, name, found in zip(prompts, names, llm.classify(prompts, names), strict=True):
        model = plain_merged(source, adapters[name])
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = (adapters[name].head @ hidden).softmax(0)
        torch.testing.assert_close(torch.tensor(found.probs), expected, atol=0.03, rtol=0.1)
