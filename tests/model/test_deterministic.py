"""--deterministic: an answer's bits are a request's own, in bfloat16 too."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS as BLOCK_TOKENS
from neuroada_serve.errors import ModelError, UsageError
from neuroada_serve.model.bypass_linear import DECODE_ROWS, PROMPT_ROWS, BypassContext
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops.matrix import DenseMatrix, frozen_matrix, multiply_in_pieces
from tests.support.decoder_sizes import SIZES
from tests.support.tiny import FAMILIES, adapter_for, save_tiny_model

LONG = 200  # tokens, more than repay a run through the weights
BEGINNING = [(7 * i) % 250 for i in range(100)]
PROMPTS = [
    [*BEGINNING, *((11 * i) % 250 for i in range(n))] for n in (3, LONG - 100, 28, 29, 60, 1)
]
NAMES = [None, "one", "eight", "one", None, "three"]
ADAPTERS = {
    "one": {"seed": 1, "k": 1},
    "three": {"seed": 2, "k": 3, "targets": ("k_proj", "up_proj", "o_proj", "c_fc", "qkv_proj")},
    "eight": {"seed": 3, "k": 8, "biases": True},
}
PARAMS = SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    saved = {}

    def source(family: str, dtype: torch.dtype = torch.bfloat16):
        if (family, dtype) not in saved:
            with pytest.MonkeyPatch.context() as patch:
                sized = FAMILIES[family] | ({} if family == "gpt2" else SIZES)
                patch.setitem(FAMILIES, family, sized)
                saved[family, dtype] = save_tiny_model(tmp_path_factory.mktemp("m"), family, dtype)
        return saved[family, dtype]

    return source


def new_llm(source, **config) -> LLM:
    llm = LLM(str(source.path), **{"deterministic": True, **config})
    base = load_base(source)
    for name, kind in ADAPTERS.items():
        llm.load_adapter(name, adapter_for(base.model, base.spec, **kind))
    return llm


def answers(llm: LLM, prompts=PROMPTS, names=NAMES) -> list[tuple]:
    """Tokens and their log probabilities, to the last bit."""
    found = llm.generate(prompts, PARAMS, names)
    return [(r.outputs[0].token_ids, [p.logprob for p in r.outputs[0].logprobs]) for r in found]


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in ("llama", "mistral", "qwen2", "gemma2", "phi3")),
        ("gpt2", torch.bfloat16),
        ("llama", torch.float32),
    ],
    ids=str,
)
def test_answer_has_the_same_bits_alone_mixed_chunked_and_cached(sources, family, dtype):
    source = sources(family, dtype)
    llm = new_llm(source, prefix_cache_memory=0)
    alone = [answers(llm, [p], [n])[0] for p, n in zip(PROMPTS, NAMES, strict=True)]
    assert answers(llm) == alone
    assert answers(llm, PROMPTS[::-1], NAMES[::-1])[::-1] == alone
    chunked = new_llm(source, prefix_cache_memory=0, max_num_seqs=4, max_num_batched_tokens=37)
    assert answers(chunked) == alone
    cached = new_llm(source)
    assert answers(cached) == alone
    assert cached.generate(PROMPTS, PARAMS, NAMES)[1].num_cached_tokens == LONG - LONG % 32
    assert answers(cached) == alone
    assert answers(cached, PROMPTS[1:2], NAMES[1:2]) == alone[1:2]


@pytest.mark.parametrize("merged", ["one", "eight"])
def test_neighbours_of_a_merged_adapter_keep_their_bits(sources, merged):
    llm = new_llm(sources("qwen2"), prefix_cache_memory=0)
    llm.merge(merged)
    alone = [answers(llm, [p], [n])[0] for p, n in zip(PROMPTS, NAMES, strict=True)]
    assert answers(llm) == alone


def test_more_decodes_than_a_piece_has_rows_keep_their_bits(sources):
    llm = new_llm(sources("llama"), prefix_cache_memory=0, max_num_seqs=DECODE_ROWS + 3)
    prompts = [[i, i + 1, i + 2] for i in range(DECODE_ROWS + 3)]
    alone = [answers(llm, [p], [None])[0] for p in prompts]
    assert answers(llm, prompts, [None] * len(prompts)) == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_out", "d_in"), [(576, 1536), (3072, 576), (48, 96), (33, 7)])
@pytest.mark.parametrize("rows", [DECODE_ROWS, PROMPT_ROWS])
def test_rows_of_a_product_in_pieces_depend_on_nothing_beside_them(dtype, d_out, d_in, rows):
    generator = torch.Generator().manual_seed(d_out)
    weight = torch.randn(d_out, d_in, generator=generator).to(dtype)
    x = torch.randn(2 * rows + 5, d_in, generator=generator).to(dtype)
    for matrix in (frozen_matrix(weight), DenseMatrix(weight)):
        whole = multiply_in_pieces(matrix, x, None, rows)
        order = torch.randperm(len(x), generator=generator)
        assert torch.equal(multiply_in_pieces(matrix, x[order], None, rows), whole[order])
        for row in (0, rows, len(x) - 1):
            alone = multiply_in_pieces(matrix, x[row : row + 1], None, rows)
            assert torch.equal(alone[0], whole[row])


def test_decodes_and_prompts_of_a_step_are_multiplied_apart():
    shapes = []

    class Counting(DenseMatrix):
        def multiply(self, x, bias):
            shapes.append(len(x))
            return super().multiply(x, bias)

    context = BypassContext(fixed_shapes=True)
    with context.applying(None, num_decodes=3):
        y = context.multiply(Counting(torch.eye(4)), torch.ones(3 + PROMPT_ROWS + 1, 4), None)
    assert shapes == [DECODE_ROWS, PROMPT_ROWS, PROMPT_ROWS]
    assert torch.equal(y, torch.ones(3 + PROMPT_ROWS + 1, 4))


# --- what it takes ---------------------------------------------------------------------------


def test_answers_are_not_kept_as_beginnings(sources):
    """A prompt that continues an answer computes it as a prompt."""
    llm = new_llm(sources("llama"))
    params = SamplingParams(temperature=0, max_tokens=3 * BLOCK_TOKENS, ignore_eos=True)
    (first,) = llm.generate([BEGINNING], params)
    turn = [*BEGINNING, *first.outputs[0].token_ids, 1, 2, 3]
    (second,) = llm.generate([turn], PARAMS)
    assert second.num_cached_tokens == len(BEGINNING) // BLOCK_TOKENS * BLOCK_TOKENS
    fresh = new_llm(sources("llama"), prefix_cache_memory=0)
    assert answers(fresh, [turn], [None]) == [
        (second.outputs[0].token_ids, [p.logprob for p in second.outputs[0].logprobs])
    ]


def test_merging_by_load_is_refused():
    with pytest.raises(UsageError, match="deterministic and merge=auto exclude each other"):
        EngineConfig(deterministic=True, merge="auto")


def test_steps_without_room_for_a_block_are_refused():
    with pytest.raises(UsageError, match=r"at least max_num_seqs \+ 32 \(48\)"):
        EngineConfig(deterministic=True, max_num_batched_tokens=47)
    EngineConfig(deterministic=True, max_num_batched_tokens=48)


def test_gpu_is_refused(sources):
    base = replace(load_base(sources("llama")), device=torch.device("cuda"))
    with pytest.raises(UsageError, match="deterministic holds on the CPU alone, not on cuda"):
        Engine(base, EngineConfig(deterministic=True))


def test_model_with_products_of_its_own_is_refused_by_name(sources):
    base = load_base(sources("llama"))
    base.model.model.router = nn.Linear(64, 4)
    with pytest.raises(ModelError, match=r"cannot be deterministic: model\.router is computed"):
        Engine(base, EngineConfig(deterministic=True))
