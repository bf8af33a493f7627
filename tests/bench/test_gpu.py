"""bench/gpu: its whole logic on the CPU with a toy model, and its verdicts on made-up times."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu import __main__ as gpu
from bench.gpu.model import LLAMA_8B, TINY
from bench.gpu.report import Report, met_targets
from bench.gpu.serving import count_launches
from bench.gpu.steps import floor_ms
from bench.gpu.tiles import candidates
from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.model.loader import BaseModel
from tests.support.python import needs_triton, run_interpreted

CPU = torch.device("cpu")


def new_report(minutes: float = 5) -> Report:
    return Report(time.monotonic() + minutes * 60, CPU)


def test_tiny_run_measures_every_part(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["errors"] == {}
    assert result["skipped"] == ["attention kernels"]  # where is no GPU, only interpreted
    assert all(result["checks"].values())
    names = ["decode/1/base", "decode/4/k2/4", "prefill/k1/4/gather", "swap/k1", "lora/4/4"]
    for name in [*names, "mixed/base/both", "mixed/k1/one after the other"]:
        assert len(result["samples_ms"][name]) == TINY.samples, name
    assert result["facts"]["adapters resident"] == 40
    assert len(result["samples_ms"]["resident/many"]) == 2 * TINY.samples
    assert result["facts"]["warm-up"]["graphs"] == 3
    assert result["facts"]["launches"]["mixed/k1/both"]["a layer"] > 10
    filled = result["facts"]["filled card"]
    assert filled["preemptions"] > 0
    assert filled["most blocks used, of all"] > 0.7
    assert result["floors_ms"]["floor/4/k2/4"] > result["floors_ms"]["floor/4/base"]


def test_no_time_leaves_everything_out_and_says_so(tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--minutes", "0"]) == 0
    result = json.loads(out.read_text())
    assert "decode/1/base" in result["skipped"]
    assert not any(name.startswith("decode") for name in result["samples_ms"])
    assert result["targets"]["64 distinct k=1, of the base step"]["met"] is None


def test_broken_part_is_reported_and_the_next_one_runs():
    report = new_report()
    with report.part("first"):
        raise RuntimeError("no such kernel")
    with report.part("second"):
        report.samples_ms["second"] = [1.0]
    assert "no such kernel" in report.errors["first"]
    assert report.median("second") == 1.0


@pytest.mark.parametrize(("times", "met"), [([10.2, 20.4], True), ([10.4, 20.8], False)])
def test_ratio_is_taken_round_by_round(times, met):
    report = new_report()
    report.samples_ms = {"decode/64/k1/64": times, "decode/64/base": [10.0, 20.0]}
    report.floors_ms = {"floor/1/base": 5.0}
    report.samples_ms["decode/1/base"] = [6.5, 6.5, 9.0]
    targets = met_targets(report)
    assert targets["64 distinct k=1, of the base step"]["met"] is met
    assert targets["base step at batch 1, of the floor"]["ratio"] == pytest.approx(1.3)


def test_floor_counts_the_bytes_of_llama_8b():
    """15 GB of weights at batch 1; 64 distinct k=1 adapters add 176 MB (design.md, fact 2)."""
    config = AutoConfig.for_model("llama", **LLAMA_8B.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    class Meta:
        base = BaseModel(
            model=model,
            tokenizer=None,
            spec=BaseSpec("", "", {}),
            path=Path(),
            dtype=torch.bfloat16,
            device=CPU,
            eos_token_ids=frozenset(),
            max_model_len=1,
            vocab_size=1,
        )

    base = floor_ms(Meta(), LLAMA_8B, 1.0, 1, 0, 0)
    assert base == pytest.approx(15.0e9 + 1024 * 131072, rel=0.01)
    mixed = floor_ms(Meta(), LLAMA_8B, 1.0, 1, 64 * 1376256, 0)
    assert mixed - base == 64 * 1376256 * 2


@needs_triton
def test_attention_kernels_are_measured_in_the_interpreter():
    run_interpreted("gpu_bench")


def test_launches_are_counted_by_name():
    x = torch.ones(4)
    launches = count_launches(lambda: [torch.mul(x, x) for _ in range(3)], CPU)
    assert launches["aten::mul"] == 3


def test_candidate_tiles_differ():
    for num_tokens in (1, 64):
        tiles = candidates(num_tokens)
        assert len(set(tiles)) == len(tiles)
        assert any(tile.early for tile in tiles)
