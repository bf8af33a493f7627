"""Adapters with biases: their files, the op, and how they are trained and served."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuroada_serve import LLM, SamplingParams, load_adapter, save_adapter
from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE, ModuleBypass
from neuroada_serve.errors import AdapterFormatError, ShapeError, UsageError
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops.bypass import (
    NO_SLOT,
    BypassTable,
    TokenSlots,
    bypass_add_,
    bypass_add_reference,
)
from neuroada_serve.train.data import load_data
from neuroada_serve.train.trainer import train_adapter
from tests.support.bypass_cases import NUM_SLOTS, assert_close, slots_of
from tests.support.command import run
from tests.support.interrupted import train_interrupted
from tests.support.tiny import random_adapter, save_tiny_model
from tests.support.training import QUICK, ROWS, make_base, write_rows

CPU = torch.device("cpu")
Q0 = "model.layers.0.self_attn.q_proj"
TUNED = replace(QUICK, tune_bias=True, max_steps=12)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("biases") / "tiny", "qwen2")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


# --- files -----------------------------------------------------------------------------------


def test_a_file_gives_the_biases_back(source, tmp_path):
    adapter = random_adapter(source, 1, biases=True)
    save_adapter(adapter, tmp_path)
    found = load_adapter(tmp_path, load_base(source).spec)
    assert found.digest == adapter.digest
    biased = {name for name, part in found.modules.items() if part.bias is not None}
    assert len(biased) == 6  # q, k and v of two layers
    for name, part in adapter.modules.items():
        assert (part.bias is None) == (name not in biased)
        assert part.bias is None or torch.equal(part.bias, found.modules[name].bias)
    of_values = sum(part.bypass.numel() for part in adapter.modules.values())
    assert found.nnz == adapter.nnz == of_values + sum(len(found.modules[m].bias) for m in biased)
    llm = LLM(str(source.path))
    llm.load_adapter("a", tmp_path)
    assert llm.engine.adapters.describe_one("a").nnz == adapter.nnz
    inspected = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert (inspected["num_biases"], inspected["num_biased_modules"]) == (128, 6)


@pytest.mark.parametrize(
    ("name", "bias", "fault"),
    [
        (Q0, torch.zeros(31), f"{Q0}.index and {Q0}.bypass and {Q0}.bias|has 31 rows"),
        (Q0, torch.zeros(32, 1), r"bias has shape \[32, 1\], expected \[d_out\]"),
        (Q0, torch.zeros(()), r"bias has shape \[\], expected \[d_out\]"),
        (Q0, torch.zeros(32, dtype=torch.int32), "bias has dtype I32"),
        (Q0, torch.full((32,), torch.nan), f"{Q0}.bias has NaN or infinite values"),
        ("model.layers.0.mlp.up_proj", torch.zeros(48), "a bias that the base does not have"),
        ("model.norm", torch.zeros(32), "model.norm.bypass is missing"),
    ],
)
def test_a_broken_bias_is_refused(source, tmp_path, name, bias, fault):
    adapter = random_adapter(source, 1)
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    described = {"format": "neuroada", "format_version": "1"}
    described["base_fingerprint"] = adapter.config.base_fingerprint
    save_file(tensors | {f"{name}.bias": bias}, tmp_path / WEIGHTS_FILE, described)
    with pytest.raises(AdapterFormatError, match=fault):
        load_adapter(tmp_path, load_base(source).spec)
    llm = LLM(str(source.path))
    with pytest.raises(AdapterFormatError, match=fault):
        llm.load_adapter("a", tmp_path)
    assert llm.adapters == ()


def test_a_bias_has_a_value_for_every_row():
    with pytest.raises(ShapeError, match=r"bias \(2,\) must be \[d_out=3\]"):
        ModuleBypass(torch.zeros(3, 1).int(), torch.zeros(3, 1), torch.zeros(2))


# --- the op ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("popularity", ["base", "identical", "distinct", "zipf", "prefills"])
@pytest.mark.parametrize("merged", [None, 0, 3])
def test_every_token_gets_the_bias_of_its_adapter(dtype, popularity, merged):
    slots = slots_of(popularity, 7)
    memory = torch.randn(NUM_SLOTS * 12 + 5).to(dtype)
    bias = memory.as_strided((NUM_SLOTS, 5), (12, 1), 3)  # slots lie apart
    unused = set(range(NUM_SLOTS)) - {*slots, merged}
    bias[sorted(unused)] = torch.nan
    y = torch.randn(7, 5).to(dtype)
    expected = y.to(torch.float32, copy=True)
    for t, slot in enumerate(slots):
        if slot != NO_SLOT:
            expected[t] += bias[slot].float()
        if merged is not None:
            expected[t] -= bias[merged].float()
    before = y.clone()
    table, token_slots = BypassTable(None, bias.unsqueeze(2)), TokenSlots(slots, CPU, merged)
    assert_close(bypass_add_reference(y, y, table, token_slots), expected.to(dtype))
    bypass_add_(y, torch.randn(7, 3).to(dtype), table, token_slots)
    assert_close(y, expected.to(dtype))
    idle = NO_SLOT if merged is None else merged
    for t, slot in enumerate(slots):
        assert slot != idle or torch.equal(y[t], before[t])


def test_shapes_that_disagree_are_named():
    table = BypassTable(None, torch.zeros(9, 5, 1))
    with pytest.raises(ShapeError, match=r"y \(2, 4\) .* bias \(9, 5\)"):
        bypass_add_(torch.zeros(2, 4), torch.zeros(2, 3), table, TokenSlots((0, 1), CPU))


# --- training --------------------------------------------------------------------------------


def biases_of(report):
    parts = report.adapter.modules
    return {name: part.bias for name, part in parts.items() if part.bias is not None}


@pytest.mark.parametrize("changed", [{}, {"bypass": True}, {"lr": "auto"}, {"packing": True}])
def test_trained_biases_are_served_as_they_were_scored(rows, tmp_path, changed):
    base = make_base(tmp_path / "tiny", "gpt2")
    bits = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    config = replace(TUNED, **changed)
    report = train_adapter(base, rows, tmp_path / "out", config)
    assert report.after.loss < report.before.loss
    assert len(biases_of(report)) == len(base.spec.shapes)
    assert all(bool(bias.any()) for bias in biases_of(report).values())
    now = base.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in bits.items())
    assert report.adapter.config.metadata["recipe"]["tune_bias"] is True

    llm = LLM(str(tmp_path / "tiny"), {"out": tmp_path / "out"})
    heldout = load_data(base, rows, config).heldout
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for merge in (False, True):
        if merge:
            llm.merge("out")
        answers = llm.generate([[*e.prompt_ids, *e.answer_ids] for e in heldout], params, "out")
        losses = [
            -entry.logprob
            for answer, example in zip(answers, heldout, strict=True)
            for entry in answer.prompt_logprobs[-len(example.answer_ids) :]
        ]
        assert sum(losses) / len(losses) == pytest.approx(report.after.loss, abs=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_biases_of_a_quantized_base_are_trained_beside_it(rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = load_base(save_tiny_model(tmp_path / "tiny", "qwen2"))
    report = train_adapter(base, rows, tmp_path / "out", replace(TUNED, quantize="int8", lr=0.01))
    assert report.after.loss < report.before.loss
    assert [bool(bias.any()) for bias in biases_of(report).values()] == [True] * 6


def test_interrupted_it_goes_on_to_the_same_bytes(rows, tmp_path, monkeypatch):
    base = make_base(tmp_path / "tiny", "gpt2")
    config = replace(TUNED, max_steps=9, save_steps=2, eval_steps=3)
    train_adapter(base, rows, tmp_path / "whole" / "sum", config)
    out = tmp_path / "cut" / "sum"
    train_interrupted(base, rows, out, config, monkeypatch)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (out / name).read_bytes() == (tmp_path / "whole" / "sum" / name).read_bytes()


def test_a_base_without_biases_is_named(rows, tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    with pytest.raises(UsageError, match="have no biases; leave out --tune-bias"):
        train_adapter(base, rows, tmp_path / "out", TUNED)
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(rows, tmp_path):
    make_base(tmp_path / "tiny", "gpt2")
    trained = run(
        *("train", tmp_path / "tiny", "--data", rows, "--out", tmp_path / "out"),
        *("--tune-bias", "--max-steps", "2"),
    )
    assert trained.exit_code == 0, trained.stderr
    assert all(part.bias is not None for part in load_adapter(tmp_path / "out").modules.values())
