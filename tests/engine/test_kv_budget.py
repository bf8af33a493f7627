"""The size of the KV cache: what a token of each model needs, and what the memory has room for."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroada_serve import SamplingParams
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import kv_budget as module
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS, KVBudget, kv_budget, kv_layout
from neuroada_serve.engine.kv_cache import KVLayout, LayerLayout, block_bytes
from neuroada_serve.errors import RequestError, UsageError
from neuroada_serve.model.loader import load_base
from tests.support.tiny import FAMILIES, plain_generate, save_tiny_model

GIB = 1 << 30
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(source):
    return load_base(source)


@pytest.fixture(scope="module")
def size(base):
    """Bytes of a block."""
    return block_bytes(kv_layout(base), CPU_BLOCK_TOKENS, base.device)


# --- what a token needs ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_that_of_the_models_layers(family, tmp_path):
    base = load_base(save_tiny_model(tmp_path, family, torch.bfloat16))
    heads = FAMILIES[family].get("num_key_value_heads", 4)
    layout = kv_layout(base)
    assert dict(layout.layers) == {0: LayerLayout(heads, 8, 8), 1: LayerLayout(heads, 8, 8)}
    assert layout.dtype == torch.bfloat16
    assert layout.bytes_per_token == 2 * 2 * heads * 16


# Keys are a part with positions and one without; values have a dimension of their own.
LATENT = {
    **{name: value for name, value in FAMILIES["llama"].items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,  # no layer with experts
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}


def test_values_may_have_a_dimension_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "deepseek_v3", LATENT)
    source = save_tiny_model(tmp_path, "deepseek_v3")
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=2, max_num_batched_tokens=48))
    assert dict(engine.kv_budget.layout.layers) == dict.fromkeys((0, 1), LayerLayout(4, 8, 12))
    prompt = [(7 * i) % 250 for i in range(70)]
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    expected = plain_generate(plain, prompt, 8, frozenset())
    for num_cached in (0, 69):
        engine.add_request("r", prompt, replace(ONE, max_tokens=8))
        outputs = [output for _ in range(10) for output in engine.step()]
        assert [token for output in outputs for token in output.token_ids] == expected
        assert outputs[-1].num_cached_tokens == num_cached


def test_measuring_leaves_the_model_as_it_was(source):
    base = load_base(source)
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        before = base.model(input_ids=ids).logits
        attention = base.model.config._attn_implementation
        kv_layout(base)
        assert base.model.config._attn_implementation == attention
        assert torch.equal(base.model(input_ids=ids).logits, before)


# --- what there is room for ------------------------------------------------------------------


def test_budget_is_the_memory_that_was_named(base, size):
    config = EngineConfig(max_num_seqs=8, kv_cache_memory=10 * size + size // 2)
    budget = kv_budget(base, config, 256)
    assert (budget.num_blocks, budget.block_tokens) == (10, CPU_BLOCK_TOKENS)
    assert budget.num_tokens == 10 * CPU_BLOCK_TOKENS


@pytest.mark.parametrize(("free", "expected"), [(40 * GIB, 8 * GIB), (4 * GIB, GIB), (0, 0)])
def test_cpu_takes_a_quarter_of_what_is_free_but_no_more_than_8_gib(free, expected, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda: free)
    assert module._free_on_cpu() == expected


def test_budget_follows_what_is_free(base, size, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda: 4 * 20 * size)
    assert kv_budget(base, EngineConfig(max_num_seqs=8), 256).num_blocks == 20


def test_no_more_is_taken_than_could_be_used(base, size):
    config = EngineConfig(max_num_seqs=3, kv_cache_memory=GIB, prefix_cache_memory=5 * size)
    budget = kv_budget(base, config, 100)
    assert budget.num_blocks == 3 * -(-100 // CPU_BLOCK_TOKENS) + 5
    assert budget.idle_blocks == 5


def test_idle_blocks_are_the_prefix_caches_memory(base, size):
    config = EngineConfig(kv_cache_memory=10 * size, prefix_cache_memory=0)
    budget = kv_budget(base, config, 256)
    assert budget.idle_blocks == 0
    blocks = budget.new_blocks()
    assert (blocks.num_blocks, blocks.block_tokens) == (10, CPU_BLOCK_TOKENS)
    assert len(blocks.allocate(10)) == 10
    config = EngineConfig(kv_cache_memory=10 * size, prefix_cache_memory=GIB)
    assert kv_budget(base, config, 256).idle_blocks == 10


def test_sequence_that_cannot_fit_is_refused_with_the_flag(base, size):
    config = EngineConfig(max_model_len=200, kv_cache_memory=4 * size)
    with pytest.raises(UsageError) as refused:
        kv_budget(base, config, 200)
    said = str(refused.value)
    assert said.startswith("one sequence of 224 tokens needs ")
    assert said.endswith("lower --max-model-len, or raise --kv-cache-memory")
    config = EngineConfig(max_model_len=128, kv_cache_memory=4 * size)
    assert kv_budget(base, config, 128).num_blocks == 4


def test_memory_of_no_block_at_all_is_refused(base, size):
    config = EngineConfig(kv_cache_memory=size - 1)
    with pytest.raises(UsageError, match=f"one sequence of {CPU_BLOCK_TOKENS} tokens needs"):
        kv_budget(base, config, 256)


def test_refusal_names_the_shares_of_a_gpu(base, monkeypatch):
    class Gpu:
        model = base.model
        device = torch.device("cuda")

    monkeypatch.setattr(module, "kv_layout", lambda _: kv_layout(base))
    monkeypatch.setattr(module, "_free_on_gpu", lambda *_: -5 * GIB)
    with pytest.raises(UsageError, match="there is room for 0 MiB; .* --gpu-memory-utilization or"):
        kv_budget(Gpu(), EngineConfig(), 256)


def test_length_beyond_the_models_own_needs_no_more_room_than_that(base, size):
    """The engine bounds max_model_len by the model's."""
    config = EngineConfig(max_model_len=10_000, max_num_seqs=1, kv_cache_memory=8 * size)
    assert kv_budget(base, config, 256).num_blocks == 8


def test_engine_bounds_the_length_that_nobody_asked_for(source, size):
    engine = Engine(load_base(source), EngineConfig(kv_cache_memory=3 * size))
    assert engine.max_model_len == 3 * CPU_BLOCK_TOKENS
    with pytest.raises(RequestError, match=str(3 * CPU_BLOCK_TOKENS)):
        engine.add_request("r", [1] * 97, ONE)
    engine.add_request("r", [1] * 95, ONE)
    (output,) = engine.step()
    assert len(output.token_ids) == 1


# --- the process's own limits ----------------------------------------------------------------

LIMITED = """
import resource, sys
from neuroada_serve.engine.kv_budget import free_bytes
pages = int(open("/proc/self/statm").read().split()[0])
used = pages * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))
print(free_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_limit_of_the_process_bounds_what_is_free():
    room = 64 << 20
    command = [sys.executable, "-c", LIMITED, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert room // 2 < int(done.stdout) <= room


def test_container_bounds_what_is_free(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(f"{3 << 20}\n")
    used.write_text(f"{1 << 20}\n")
    real = module.Path

    def path(name):
        return {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}.get(
            name, real(name)
        )

    monkeypatch.setattr(module, "Path", path)
    assert module.free_bytes() == 2 << 20
    used.write_text(f"{9 << 20}\n")
    assert module.free_bytes() == 0
    limit.write_text("max\n")
    assert module.free_bytes() > 9 << 20


# --- what it says ----------------------------------------------------------------------------


def new_budget(num_blocks: int) -> KVBudget:
    layout = KVLayout({i: LayerLayout(8, 128, 128) for i in range(32)}, torch.bfloat16)
    return KVBudget(layout, 16, num_blocks, num_blocks)


def test_start_says_how_many_tokens_and_sequences_fit():
    said = new_budget(4096).describe(8192)
    assert said == "KV cache: 65,536 tokens in 8.00 GiB, or 8.0 sequences of 8,192 tokens"


def test_cache_that_finds_no_memory_after_all_is_refused_with_the_flag():
    with pytest.raises(UsageError, match=re.escape("lower --kv-cache-memory")):
        new_budget(1 << 30).new_cache(1, 16, torch.device("cpu"))
