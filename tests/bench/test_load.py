"""bench/load.py, smaller, on a tiny model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench import load, load_engine
from bench.load_engine import Load
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.pace import StepPace
from neuroada_serve.model.loader import load_base
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"vocab_size": 512, "max_position_embeddings": 1024}
    return save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **sizes)


def test_load_is_measured_with_every_way_to_leave(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StepPace, "budget", lambda *args: math.inf)  # the same steps in each round
    flags = ["--streams", 3, "--prompt-len", 200, "--steps", 6, "--rounds", 2]
    flags += ["--memory-rounds", 1, "--max-num-batched-tokens", 64, "--out", tmp_path / "load.json"]
    load.main([str(source.path), *map(str, flags)])
    result = json.loads((tmp_path / "load.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    alone, beside, prompt = (
        result["rounds"][way] for way in (load.ALONE, load.BESIDE, load.PROMPT)
    )
    assert len({one["gap_ms"]["count"] for one in [*alone, *beside]}) == 1  # equal contexts
    for one in beside:
        assert one["gap_ms"]["count"] == 3 * len(one["step_end_ms"])
        assert len(one["step_end_ms"]) >= 200 // 61
        pairs = zip(one["kv_used_bytes"], one["kv_needed_bytes"], strict=True)
        assert all(used >= needed > 0 for used, needed in pairs)
    assert all(one["prompt_s"] > 0 for one in [*beside, *prompt])
    assert result["memory"].keys() == {"end", "abort", "disconnect"}
    for way in result["memory"].values():
        assert way["rounds"][0]["peak_rss"] >= way["rounds"][0]["before_rss"] > 0
        assert way["rounds"][0]["after_kv_blocks"] == 0


def test_gap_of_a_stream_that_is_left_out_is_seen(source, monkeypatch):
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=3, prefix_cache_memory=0))
    ours = Load(engine, num_streams=2, stream_len=4, prompt_len=50, steps=4, seed=0)
    step, steps = engine.step, []

    def without_second(*args):
        steps.append(step())
        is_late = 3 <= len(steps) <= 4
        return [o for o in steps[-1] if not (is_late and o.request_id == "stream1")]

    monkeypatch.setattr(engine, "step", without_second)
    monkeypatch.setattr(load_engine, "time", SimpleNamespace(perf_counter=lambda: len(steps)))
    gaps = ours.run_alone(0)["gap_ms"]  # a step takes a second
    assert (gaps["count"], gaps["median"], gaps["worst"]) == (6, 1000, 3000)


def test_promises_are_other_ones_with_a_target():
    gaps = {"median_ratio": 2.6, "worst_ratio": 4.0, "kv_used_to_needed": 1.05}
    kept = load.promises_of({"gaps": gaps, "memory": {"end": {"after_to_before": 1.2}}})
    assert list(kept.values()) == [True, False, True, False]
    kept = load.promises_of({"gaps": {**gaps, "p99_to_target": 1.4}, "memory": {}})
    assert list(kept.values()) == [True, True]
