"""Rotation of positions: a request's own, whatever else is in the batch, for every kind."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.config import TrainConfig
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS as BLOCK_TOKENS
from neuroada_serve.errors import ModelError, UsageError
from neuroada_serve.model.loader import load_base, with_model_len
from neuroada_serve.ops import matrix
from neuroada_serve.train.trainer import train_adapter
from tests.support.decoder_sizes import SIZES
from tests.support.tiny import FAMILIES, plain_generate, save_tiny_model

POSITIONS, ORIGINAL = 256, 64
HALF = FAMILIES["llama"]["head_dim"] // 2
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "long_factor": [1.5 + 2.0 * i for i in range(HALF)],
    "original_max_position_embeddings": ORIGINAL,
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_type": "default"}),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 3.0}),
    "yarn": ("llama", YARN),
    "llama3": ("llama", LLAMA3),
    "longrope": ("llama", LONGROPE),
    "phi3 longrope": ("phi3", LONGROPE),
    "two rotations": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "two rotations, one chosen": (
        "gemma3_text",
        {
            "full_attention": {**LONGROPE, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3},
        },
    ),
}
# Which length is served, and prompts of which lengths are then transformers' own for the whole of
# their answers: on one side of the length at which it chooses anew.
SERVED = {
    **{kind: [(None, (9, 70, 140))] for kind in KINDS},
    "dynamic": [(None, (9, 70, 140)), (700, (300, 690))],
    "longrope": [(None, (70, 140)), (ORIGINAL, (9, 40))],
    "phi3 longrope": [(None, (70, 140)), (ORIGINAL, (9, 40))],
    "two rotations, one chosen": [(None, (70, 140)), (ORIGINAL, (9, 40))],
}
CASES = [(kind, *served) for kind in KINDS for served in SERVED[kind]]
NAMES = [f"{kind}, {length or 'all'} tokens" for kind, length, _ in CASES]
TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    saved: dict[tuple[str, torch.dtype], Any] = {}

    def source(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any):
        family, parameters = KINDS[kind]
        if (kind, dtype) not in saved:
            rope = {"rope_theta": 1e4, **parameters} if "rope_type" in parameters else parameters
            sized = {**FAMILIES[family], **sizes, "rope_parameters": rope}
            if family == "gemma3_text":
                sized["layer_types"] = ["sliding_attention", "full_attention"]
            if "original_max_position_embeddings" in parameters and family == "phi3":
                sized["original_max_position_embeddings"] = ORIGINAL
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(FAMILIES, family, sized)
                saved[kind, dtype] = save_tiny_model(tmp_path_factory.mktemp("m"), family, dtype)
        return saved[kind, dtype]

    return source


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [list(r.outputs[0].token_ids) for r in llm.generate(prompts, GREEDY)]


# --- against transformers --------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "served", "lengths"), CASES, ids=NAMES)
def test_tokens_are_transformers_whatever_runs_beside(sources, kind, served, lengths):
    source = sources(kind)
    plain = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    prompts = [prompt(length) for length in lengths]
    if served is not None:  # transformers' dynamic keeps the longest it has seen
        plain(torch.zeros(1, served, dtype=torch.int64))
    expected = [plain_generate(plain, p, TOKENS, frozenset()) for p in prompts]
    others = [prompt(length, seed=9) for length in (3, 30, (served or POSITIONS) - TOKENS)]

    def new_llm(**config: Any) -> LLM:
        return LLM(str(source.path), max_model_len=served, **config)

    llm = new_llm()
    assert [answers(llm, [p])[0] for p in prompts] == expected  # alone
    assert answers(llm, [*prompts, *others])[: len(prompts)] == expected  # cached, mixed
    chunked = new_llm(max_num_batched_tokens=17, prefix_cache_memory=0)
    assert answers(chunked, [others[2], *prompts, others[0]])[1:-1] == expected


@pytest.mark.parametrize("kind", ["longrope", "phi3 longrope", "dynamic"])
def test_generate_of_transformers_gives_the_same(sources, kind):
    source = sources(kind)
    plain = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    ids = torch.tensor([prompt(100)])
    generated = plain.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    assert answers(LLM(str(source.path)), ids.tolist()) == [generated[0, 100:].tolist()]


# --- a request depends on itself alone ---------------------------------------------------------


@pytest.mark.parametrize("served", [None, ORIGINAL])
@pytest.mark.parametrize("kind", ["longrope", "phi3 longrope", "two rotations, one chosen"])
def test_short_beside_long_is_as_alone(sources, kind, served):
    llm = LLM(str(sources(kind).path), max_model_len=served, prefix_cache_memory=0)
    short, long = prompt(9), prompt((served or POSITIONS) - TOKENS, seed=1)
    (alone,) = answers(llm, [short])
    assert answers(llm, [short, long])[0] == alone
    assert answers(llm, [long, short])[1] == alone


@pytest.mark.parametrize("kind", ["longrope", "phi3 longrope"])
def test_answer_across_the_original_length_is_one_rotation(sources, kind):
    """Its keys were turned before it grew that long."""
    llm = LLM(str(sources(kind).path), prefix_cache_memory=0)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    start = prompt(ORIGINAL - 10)
    (whole,) = llm.generate([start], params)
    tokens = list(whole.outputs[0].token_ids)
    for done in (5, 14):  # as prompts, before and beyond that length
        assert answers(llm, [start + tokens[:done]]) == [tokens[done : done + TOKENS]]


@pytest.mark.parametrize("kind", ["longrope", "phi3 longrope", "two rotations, one chosen"])
def test_cached_beginning_is_turned_as_the_rest(sources, kind):
    """The beginning kept is of a short request, the rest beyond the original length."""
    path = str(sources(kind).path)
    long = prompt(ORIGINAL + 70)
    llm = LLM(path)
    (fresh,) = answers(LLM(path, prefix_cache_memory=0), [long])
    answers(llm, [long[: BLOCK_TOKENS + 1]])
    (found,) = llm.generate([long], GREEDY)
    assert found.num_cached_tokens == BLOCK_TOKENS + 1
    assert list(found.outputs[0].token_ids) == fresh


# --- the kernel for whole steps ----------------------------------------------------------------


@pytest.mark.parametrize("served", [None, ORIGINAL])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_kernel_turns_as_the_modules_do(sources, monkeypatch, kind, served):
    monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    half = SIZES["head_dim"] // 2
    grown = {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 2.0 * i for i in range(half)],
    }
    monkeypatch.setitem(KINDS, kind, ("llama", {**KINDS[kind][1], **grown}))
    source = sources(kind, torch.bfloat16, **{**SIZES, "max_position_embeddings": POSITIONS})
    llm = LLM(str(source.path), max_model_len=served, prefix_cache_memory=0)
    decoder = llm.engine._runner._cpu_decoder
    assert decoder is not None
    alone = torch.arange(9)[None]
    beside = torch.cat([alone, torch.arange((served or POSITIONS) - 1)[None]], 1)
    turn = decoder._forward._decoder.rotary
    plain = AutoModelForCausalLM.from_pretrained(source.path).model.rotary_emb
    of_length = torch.tensor([[*range(9), (served or POSITIONS) - 1]])
    for ours, mixed, theirs in zip(
        turn(alone), turn(beside), plain(torch.empty(0).bfloat16(), of_length), strict=True
    ):
        assert torch.equal(ours, mixed[:, :9])
        assert torch.equal(ours, theirs[:, :9])


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [None, ORIGINAL])
@torch.no_grad()
def test_row_beside_a_longer_one_is_as_alone(sources, served):
    """In a trainer's batch, padded."""
    base = load_base(sources("phi3 longrope"), max_model_len=served)
    row = torch.tensor([prompt(20)])
    padded = torch.zeros(2, 100, dtype=torch.int64)
    padded[0, :20] = row
    mask = torch.ones_like(padded)
    mask[0, 20:] = 0
    alone = base.model(row).logits[0]
    beside = base.model(padded, attention_mask=mask).logits[0, :20]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)


def test_training_turns_as_the_server_will(sources, tmp_path):
    base = load_base(sources("longrope"))
    long = base.model.model.rotary_emb.inv_freq.clone()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab", "completion": "c"}\n' * 4)
    config = TrainConfig(max_model_len=ORIGINAL, max_steps=1, eval_fraction=0)
    train_adapter(base, rows, tmp_path / "adapter", config)
    short = base.model.model.rotary_emb.inv_freq
    served = LLM(str(sources("longrope").path), max_model_len=ORIGINAL).engine.base
    assert torch.equal(short, served.model.model.rotary_emb.inv_freq)
    assert not torch.equal(short, long)


# --- what is said and refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "served", "said"),
    [
        ("longrope", None, f"long factors, since up to {POSITIONS} tokens are served"),
        ("longrope", ORIGINAL, f"short factors, for up to {ORIGINAL} tokens"),
        ("dynamic", None, f"up to {3 * POSITIONS}, would stretch them"),
        ("dynamic", 700, f"stretched from {POSITIONS} to 700 tokens"),
    ],
)
def test_choice_by_the_length_is_said_at_start(sources, kind, served, said):
    told: list[str] = []
    LLM(str(sources(kind).path), max_model_len=served, notify=told.append)
    assert any(said in message for message in told)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3", "two rotations"])
def test_nothing_is_said_where_nothing_is_chosen(sources, kind):
    assert LLM(str(sources(kind).path)).engine.rotation is None


def test_unknown_kind_is_refused_by_name(sources, monkeypatch):
    base = load_base(sources("default"))
    base.model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(ModelError, match="LlamaRotaryEmbedding has rope_type 'spiral'; known are"):
        with_model_len(base, 64)


def test_more_tokens_than_the_positions_allow_are_refused(sources):
    with pytest.raises(UsageError, match=f"max_model_len is 257, .* allow {POSITIONS}"):
        load_base(sources("linear"), max_model_len=POSITIONS + 1)
    with pytest.raises(UsageError, match=f"allow {3 * POSITIONS}"):
        load_base(sources("dynamic"), max_model_len=3 * POSITIONS + 1)


def test_length_may_be_chosen_again(sources):
    base = load_base(sources("longrope"))
    first = base.model.model.rotary_emb.inv_freq.clone()
    short = with_model_len(base, ORIGINAL)
    assert short.max_model_len == ORIGINAL
    with_model_len(short, POSITIONS)
    assert torch.equal(base.model.model.rotary_emb.inv_freq, first)
