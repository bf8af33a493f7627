"""The engine through its decode graphs, recorded and replayed as plain calls; run by
test_cuda_graphs.py in a process of its own (see interpreted_bypass.py)."""

import torch

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.engine import triton_attention, triton_prefill
from neuroada_serve.engine.cuda_graphs import cuda_capture
from neuroada_serve.engine.runner import ModelRunner
from neuroada_serve.model import bypass_linear
from neuroada_serve.ops.triton_bypass import bypass_add_triton_
from tests.support.tiny import random_adapter, save_tiny_model
from tests.support.triton_interpreter import DEVICE

PROMPTS = [list(range(start, start + length)) for start, length in ((5, 3), (40, 11), (90, 1))]
NAMES = [None, "a", "b", "a"]


def record(launch):
    """Stand in for `cuda_capture()` on the CPU."""
    launch()
    return launch


# Gemma 2 has a sliding window and a soft cap; here biases, too.
def test_replayed_steps_equal_eager_ones(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path, "gemma2", attention_bias=True)
    adapters = {
        "a": random_adapter(source, 1, k=2, biases=True),
        "b": random_adapter(source, 2, k=5, biases=True),
    }
    llm = LLM(str(source.path), adapters, max_num_seqs=5, device=DEVICE.type)
    engine = llm.engine
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 1, 3, 2)]
    prompts = [PROMPTS[i % 3] for i in range(4)]
    expected = [answer.token_ids for answer in llm.generate(prompts, params, NAMES)]

    plain_add_ = bypass_linear.bypass_add_

    def add_(y, x, table, token_slots):
        is_prefill = DEVICE.type == "cpu" and len(y) > 5  # never replayed
        if table.index is None or is_prefill:
            return plain_add_(y, x, table, token_slots)
        bypass_add_triton_(y, x, table.index, table.bypass, *token_slots.on_device)

    monkeypatch.setattr(triton_attention, "_MAX_SPLITS", 2)  # each program is slow interpreted
    monkeypatch.setattr(bypass_linear, "bypass_add_", add_)
    runner = ModelRunner(
        engine.base,
        engine.adapters.bank,
        engine._runner._context,
        engine._cache,
        engine.adapters.tiers.resident,
        enforce_eager=True,
        capture=record if DEVICE.type == "cpu" else cuda_capture(),
    )
    engine._runner = engine._executor._runner = runner
    graphs = runner.graphs
    assert graphs is not None
    assert [a.token_ids for a in llm.generate(prompts, params, NAMES)] == expected
    captured = len(graphs)
    assert captured >= 2, "several buckets were met"
    llm.merge("a")
    assert [a.token_ids for a in llm.generate(prompts, params, NAMES)] == expected
    llm.unmerge()
    known = len(graphs)
    assert [a.token_ids for a in llm.generate(prompts, params, NAMES)] == expected
    assert len(graphs) == known, "the last round met nothing new"
    assert not graphs.num_failed_captures
    assert not torch.cuda.is_available() or engine.base.device.type == "cuda"


def test_warm_up_of_prompts_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path, "gemma2")  # layers of two kinds
    llm = LLM(str(source.path), max_num_seqs=2, device=DEVICE.type)
    engine, warmed = llm.engine, []
    warm_up = triton_prefill.warm_up

    def noted(query, keys, values, tables, scaling, window, softcap):
        assert query.shape[0] == 1
        warmed.append(window)
        warm_up(query, keys, values, tables, scaling, window, softcap)

    monkeypatch.setattr(triton_prefill, "warm_up", noted)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = llm.generate([PROMPTS[1]], params)[0].token_ids
    before = engine._cache._pool.clone()
    engine._runner.warm_up_prompts()
    assert len(warmed) == engine.base.model.config.num_hidden_layers
    assert len(set(warmed)) == 2
    assert torch.equal(engine._cache._pool, before)
    assert llm.generate([PROMPTS[1]], params)[0].token_ids == expected
