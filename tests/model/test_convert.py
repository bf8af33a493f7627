"""Adapters of other formats: the logits of their own runtime, or a refusal that says why."""

import json
import math
import pickle
import random

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from neuroada_serve import LLM, SamplingParams, load_adapter, save_adapter
from neuroada_serve.adapters.format import is_target
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.cli.main import app
from neuroada_serve.errors import AdapterError, ModelError, UsageError
from neuroada_serve.model.convert import (
    convert_diff,
    convert_official,
    convert_shira,
    convert_supertuning,
    export_shira,
)
from neuroada_serve.model.export import export_merged
from neuroada_serve.model.loader import adaptable_modules, load_base
from neuroada_serve.model.source import ModelSource
from tests.support.convert_cases import (
    OfficialModel,
    logits,
    on_gpu,
    random_targets,
    save_shira,
    save_supertuning,
    save_tuned,
)
from tests.support.tiny import adapter_for, random_adapter, save_tiny_model

pytestmark = [  # PEFT's own doing
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning"),
]
Q0 = "model.layers.0.self_attn.q_proj"
IDS = [[7, 3, 250, 9, 11, 99, 100, 42, 8, 1], [5, 6, 7, 200, 201, 17, 3]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def engine(source):
    return LLM(str(source.path))


def assert_served_alike(engine, source, folder, expected, tmp_path):
    """In the engine, and merged into a plain checkpoint, the adapter gives these logits.

    expected: per row of IDS [tokens, vocab].
    """
    engine.load_adapter("converted", folder, replace=True)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate(IDS, params, "converted")
    export_merged(source, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for output, ids, wanted in zip(outputs, IDS, expected, strict=True):
        torch.testing.assert_close(logits(merged, ids), wanted, atol=1e-4, rtol=0)
        log_probs = wanted[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
        found = torch.tensor([p.logprob for p in output.prompt_logprobs[-len(ids) + 1 :]])
        torch.testing.assert_close(found, log_probs.flatten(), atol=1e-4, rtol=0)


def assert_differs_from_base(engine, source, expected):
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    assert (logits(plain, IDS[0]) - expected[0]).abs().max() > 0.1


# --- the official code -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peft_type", "k"),
    [
        ("perCell_mag_add", 1),
        ("perCell_mag_add", 4),
        ("perCell_mag_reverse_add", 2),
        ("perCell_mag_randomGlobal_add", 2),
        ("perCell_mag_certainCell_add", 3),
        ("perCell_mag_add_appr", 3),
    ],
)
def test_official_run_gives_its_own_logits(peft_type, k, source, engine, tmp_path):
    run = OfficialModel(source, peft_type, k)
    run.save(tmp_path / "run")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    expected = [logits(run.model, ids) for ids in IDS]
    assert_differs_from_base(engine, source, expected)
    assert_served_alike(engine, source, tmp_path / "out", expected, tmp_path)
    assert result.kept_in_all == pytest.approx(1)
    assert [w for w in result.warnings if "only fill rows up" not in w] == []
    recipe = load_adapter(tmp_path / "out").config.metadata["converted_from"]["args"]
    assert recipe["times_num"] == k


def test_official_magnitude_run_gets_the_index_that_trained_adapters_have(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 4).save(tmp_path / "run")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    base = load_base(source)
    assert result.adapter.config.k == 4
    assert result.adapter.config.selection == "magnitude"
    assert result.adapter.config.target_modules == tuple(
        sorted({name.rpartition(".")[2] for name in base.spec.shapes})
    )
    for name, part in result.adapter.modules.items():
        expected = magnitude_index(base.model.get_submodule(name).weight, 4)
        assert torch.equal(part.index, expected), name


def test_official_checkpoint_folder_is_read_with_the_positions_above_it(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 2).save(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    (tmp_path / "run" / "tunable_para").rename(checkpoint)
    assert convert_official(source, checkpoint, tmp_path / "out").adapter.config.k == 2


def test_official_run_of_some_layers_names_them(source, tmp_path):
    run = OfficialModel(source, "perCell_mag_add", 1, modules=(Q0, "model.layers.0.mlp.up_proj"))
    run.save(tmp_path / "run")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    assert result.adapter.config.target_modules == ("model.layers.0.mlp.up_proj", Q0)


def test_official_run_of_another_base_is_told_of(source, tmp_path):
    other = save_tiny_model(tmp_path / "other", "mistral")
    OfficialModel(other, "perCell_mag_add", 2).save(tmp_path / "run")
    (warning,) = convert_official(source, tmp_path / "run", tmp_path / "out").warnings
    assert "is this the base it was trained on?" in warning


def test_official_bfloat16_values_stay_so(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, dtype=torch.bfloat16).save(tmp_path / "run")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    assert {p.bypass.dtype for p in result.adapter.modules.values()} == {torch.bfloat16}


def rewrite_args(run, **changes):
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | changes))


def rewrite_values(run, change):
    file = run / "tunable_para" / "state_dict_tunable.pt"
    values = torch.load(file, weights_only=True)
    torch.save(change(values) or values, file)


def rewrite_positions(run, change):
    positions = np.load(run / "positions.npy", allow_pickle=True).item()
    np.save(run / "positions.npy", change(positions) or positions)


BROKEN_RUNS = {
    "mask run": (
        lambda run: rewrite_args(run, peft_type="perCell_mag"),
        "'perCell_mag', which trains dense weights.*neuroada convert diff",
    ),
    "dense tensors": (
        lambda run: rewrite_values(run, lambda v: v.update({"classifier.weight": torch.ones(2)})),
        "classifier.weight densely too.*without --selectallhead",
    ),
    "no values": (
        lambda run: (run / "tunable_para" / "state_dict_tunable.pt").unlink(),
        "has no tunable_para/state_dict_tunable.pt; name the folder",
    ),
    "no positions": (lambda run: (run / "positions.npy").unlink(), "has no positions.npy"),
    "values are text": (
        lambda run: (run / "tunable_para" / "state_dict_tunable.pt").write_text("hello"),
        "is no file of tensors",
    ),
    "values are a list": (lambda run: rewrite_values(run, lambda v: [1]), "tensors by name"),
    "integer values": (
        lambda run: rewrite_values(run, lambda v: {n: t.int() for n, t in v.items()}),
        "has dtype torch.int32, values are floats",
    ),
    "fewer values than positions": (
        lambda run: rewrite_values(run, lambda v: {n: t[1:] for n, t in v.items()}),
        r"values \[31\] at positions \[32, 2\]",
    ),
    "infinite value": (
        lambda run: rewrite_values(run, lambda v: {n: t / 0 for n, t in v.items()}),
        "NaN or infinite values",
    ),
    "a module without positions": (
        lambda run: rewrite_positions(run, lambda p: p.pop(f"{Q0}.weight") is None),
        f"positions.npy has no positions of {Q0}",
    ),
    "column beyond the base": (
        lambda run: rewrite_positions(run, lambda p: {n: t * 2 + 1 for n, t in p.items()}),
        "has rows 1 to 63, the base has 32",
    ),
    "an entry twice": (
        lambda run: rewrite_positions(run, lambda p: {n: t * 0 for n, t in p.items()}),
        "has an entry twice",
    ),
    "float positions": (
        lambda run: rewrite_positions(run, lambda p: {n: t.float() for n, t in p.items()}),
        "must hold int64 positions",
    ),
    "positions are an array": (
        lambda run: np.save(run / "positions.npy", np.ones(3)),
        "is an array, not positions by name",
    ),
    "positions are text": (
        lambda run: (run / "positions.npy").write_text("hello"),
        "positions.npy is no .npy file",
    ),
    "args are text": (lambda run: (run / "args.json").write_text("hi"), "args.json is not JSON"),
    "appr run without indices": (
        lambda run: rewrite_args(run, peft_type="perCell_mag_add_appr"),
        "has no indices.npy",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_RUNS)
def test_broken_official_run_is_refused_and_nothing_written(fault, source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    spoil, message = BROKEN_RUNS[fault]
    spoil(tmp_path / "run")
    with pytest.raises(AdapterError, match=message):
        convert_official(source, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_official_module_that_the_base_lacks_is_named(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    name = "roberta.encoder.layer.0.attention.self.query"
    rewrite_values(tmp_path / "run", lambda v: {f"{name}.weight_new": v[f"{Q0}.weight_new"]})
    rewrite_positions(tmp_path / "run", lambda p: {f"{name}.weight": p[f"{Q0}.weight"]})
    with pytest.raises(AdapterError, match=f"{name} is no linear layer in the blocks of"):
        convert_official(source, tmp_path / "run", tmp_path / "out")


def test_files_of_numpy_1_and_of_a_gpu_are_read(source, tmp_path):
    """They name numpy.core, use an older pickle, and the values say that they lie on cuda:0."""
    OfficialModel(source, "perCell_mag_add", 2).save(tmp_path / "run")
    expected = convert_official(source, tmp_path / "run", tmp_path / "expected")
    file = tmp_path / "run" / "positions.npy"
    array = np.load(file, allow_pickle=True)
    header = file.read_bytes().partition(b"\n")[0] + b"\n"
    pickled = pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in pickled
    file.write_bytes(header + pickled)
    on_gpu(tmp_path / "run" / "tunable_para" / "state_dict_tunable.pt")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    assert result.adapter.digest == expected.adapter.digest


def test_official_run_without_args_is_read_and_told_of(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 2).save(tmp_path / "run")
    (tmp_path / "run" / "args.json").unlink()
    (warning,) = convert_official(source, tmp_path / "run", tmp_path / "out").warnings
    assert "it has no args.json" in warning


def test_settings_that_are_no_json_are_left_out_of_the_metadata(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    rewrite_args(tmp_path / "run", lr=math.nan, task="\ud800" + "x" * 1000, deep=[[]])
    convert_official(source, tmp_path / "run", tmp_path / "out")
    args = load_adapter(tmp_path / "out").config.metadata["converted_from"]["args"]
    assert "lr" not in args
    assert "deep" not in args
    assert args["task"] == "?" + "x" * 199


@pytest.mark.parametrize("kind", ["perCell_mag_add", "perCell_mag_add_appr"])
@pytest.mark.parametrize("tune_bias", [False, True])
def test_official_run_of_layers_with_biases_gives_the_same_logits(kind, tune_bias, tmp_path):
    qwen = save_tiny_model(tmp_path / "base", "qwen2")
    run = OfficialModel(qwen, kind, 2, tune_bias=tune_bias)
    run.save(tmp_path / "run")
    expected = [logits(run.model, ids) for ids in IDS]
    result = convert_official(qwen, tmp_path / "run", tmp_path / "out")
    biased = [name for name, part in result.adapter.modules.items() if part.bias is not None]
    # An '_appr' run adds every bias twice, so its layers differ by a bias from the base's.
    assert len(biased) == (6 if tune_bias or kind.endswith("_appr") else 0)
    assert_served_alike(LLM(str(qwen.path)), qwen, tmp_path / "out", expected, tmp_path)


def test_trained_bias_that_the_base_lacks_or_of_another_size_is_refused(source, tmp_path):
    for number, (base, module, size) in enumerate(
        [(source, Q0, 32), (save_tiny_model(tmp_path / "qwen", "qwen2"), Q0, 7)]
    ):
        folder = tmp_path / f"run{number}"
        OfficialModel(base, "perCell_mag_add", 2).save(folder)
        file = folder / "tunable_para" / "state_dict_tunable.pt"
        values = torch.load(file, weights_only=True)
        torch.save(values | {f"{module}.bias": torch.zeros(size)}, file)
        with pytest.raises(AdapterError, match=r"no bias in the base|\.bias is \[7\]"):
            convert_official(base, folder, tmp_path / "out")
        torch.save({f"{module}.bias": torch.zeros(size)}, file)
        with pytest.raises(AdapterError, match="without values"):
            convert_official(base, folder, tmp_path / "out")


# --- hostile pickles ---------------------------------------------------------------------------


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(marker):
    import os
    import subprocess

    command = f"touch {marker}"
    tensor = torch.tensor([[0, 0]])
    inner = Calls(os.system, command)
    inner_file = marker.parent / "inner.pt"
    torch.save(inner, inner_file)
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, f"__import__('os').system({command!r})"),
        "exec": Calls(exec, f"import os; os.system({command!r})"),
        "subprocess": Calls(subprocess.check_call, command.split()),
        "getattr": Calls(getattr, "x", "upper"),
        "torch.load": Calls(torch.load, str(inner_file), None, None),
        "numpy.load": Calls(np.load, str(inner_file), None, True),
        "nested torch file": Calls(torch.storage._load_from_bytes, inner_file.read_bytes()),
        "beside a tensor": {f"{Q0}.weight": tensor, "x": Calls(os.system, command)},
        "state of an object": {f"{Q0}.weight": random.Random(1)},
    }


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "eval",
        "exec",
        "subprocess",
        "getattr",
        "torch.load",
        "numpy.load",
        "nested torch file",
        "beside a tensor",
        "state of an object",
    ],
)
def test_hostile_positions_are_refused_and_never_run(name, source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    marker = tmp_path / "marker"
    np.save(tmp_path / "run" / "positions.npy", np.array(hostile(marker)[name], dtype=object))
    with pytest.raises(AdapterError, match="positions.npy is not read, and nothing in it was run"):
        convert_official(source, tmp_path / "run", tmp_path / "out")
    assert not marker.exists()


def test_hostile_values_are_refused_and_never_run(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    marker = tmp_path / "marker"
    hostile_values = {f"{Q0}.weight_new": hostile(marker)["os.system"]}
    torch.save(hostile_values, tmp_path / "run" / "tunable_para" / "state_dict_tunable.pt")
    with pytest.raises(AdapterError, match="more than tensors is in it"):
        convert_official(source, tmp_path / "run", tmp_path / "out")
    assert not marker.exists()


OPCODES = {
    "a memo of 64 GB": b"\x80\x04}r\xff\xff\xff\xff.",
    "a string of 2 EB": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x1f.",
    "a bytearray": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
    "no end": b"\x80\x04}",
    "nothing": b"",
    "an empty stack": b"\x80\x040.",
    "a key that nests without end": b"\x80\x04}" + b")" + b"\x85" * 100_000 + b"Ks.",
    "an instance": b"(ios\nsystem\n.",
    "a persistent name": b"\x80\x04K\x01Q.",
}


@pytest.mark.parametrize("name", OPCODES)
def test_strange_pickle_is_refused(name, source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    file = tmp_path / "run" / "positions.npy"
    header = file.read_bytes().partition(b"\n")[0] + b"\n"
    file.write_bytes(header + OPCODES[name])
    with pytest.raises(AdapterError, match="positions.npy"):
        convert_official(source, tmp_path / "run", tmp_path / "out")


def test_flipped_bytes_in_positions_end_in_a_refusal_or_another_adapter(source, tmp_path):
    from neuroada_serve.adapters.official import read_official

    OfficialModel(source, "perCell_mag_add", 1, modules=(Q0,)).save(tmp_path / "run")
    file = tmp_path / "run" / "positions.npy"
    whole, generator, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(data)
        try:
            read_official(tmp_path / "run")
        except AdapterError:
            refused += 1
    assert refused > 50


# --- PEFT: SHiRA -------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "down_proj", "o_proj"]])
def test_shira_gives_its_own_logits(targets, source, engine, tmp_path):
    model = save_shira(source, tmp_path / "shira", r=2, targets=targets)
    expected = [logits(model, ids) for ids in IDS]
    assert_differs_from_base(engine, source, expected)
    result = convert_shira(source, tmp_path / "shira", tmp_path / "out")
    assert_served_alike(engine, source, tmp_path / "out", expected, tmp_path)
    assert result.kept_in_all == pytest.approx(1)
    assert 0 < result.filled < 1
    assert result.adapter.config.target_modules == tuple(sorted(targets))


def test_shira_trimmed_to_k_tells_how_much_is_kept(source, tmp_path):
    save_shira(source, tmp_path / "shira", r=2, targets=["q_proj"])
    whole = convert_shira(source, tmp_path / "shira", tmp_path / "whole")
    result = convert_shira(source, tmp_path / "shira", tmp_path / "out", k=2)
    assert result.adapter.config.k == 2 < whole.adapter.config.k
    for name, part in result.adapter.modules.items():
        before = whole.adapter.modules[name].bypass.square()
        largest = before.topk(2, dim=1).values
        torch.testing.assert_close(part.bypass.square().sort(descending=True).values, largest)
        assert result.kept[name] == pytest.approx(float(largest.sum() / before.sum()))
    (warning,) = result.warnings
    assert f"only {result.kept_in_all:.1%} of the energy is kept with k=2" in warning


def test_shira_indices_from_windows_are_floats(source, engine, tmp_path):
    model = save_shira(source, tmp_path / "shira", r=1, targets=["q_proj"])
    file = tmp_path / "shira" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t.float() for n, t in tensors.items()}, file, {"format": "pt"})
    convert_shira(source, tmp_path / "shira", tmp_path / "out")
    expected = [logits(model, ids) for ids in IDS]
    assert_served_alike(engine, source, tmp_path / "out", expected, tmp_path)


# --- PEFT: Super-Tuning ------------------------------------------------------------------------


@pytest.mark.parametrize("select_top", [True, False])
@pytest.mark.parametrize("indices", [True, False])
def test_supertuning_gives_its_own_logits(indices, select_top, source, engine, tmp_path):
    model = save_supertuning(
        source,
        tmp_path / "super",
        sparsity=0.95,
        select_top=select_top,
        save_precomputed_indices=indices,
    )
    expected = [logits(model, ids) for ids in IDS]
    assert_differs_from_base(engine, source, expected)
    result = convert_supertuning(source, tmp_path / "super", tmp_path / "out")
    assert_served_alike(engine, source, tmp_path / "out", expected, tmp_path)
    assert any("without indices" in w for w in result.warnings) == (not indices)


def test_supra_hybrid_is_refused_by_name(source, tmp_path):
    save_supertuning(source, tmp_path / "super", sparsity=0.95, r=2)
    with pytest.raises(AdapterError, match="supertuning_lora_A.weight.* dense tensors"):
        convert_supertuning(source, tmp_path / "super", tmp_path / "out")


# --- PEFT: broken ------------------------------------------------------------------------------


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


KEY = f"base_model.model.{Q0}"
BROKEN_SHIRA = {
    "modules to save": (
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})
        ),
        "it has lm_head.weight, and an adapter has no place for dense tensors",
    ),
    "no indices": (
        lambda f: rewrite_tensors(f, lambda t: t.pop(f"{KEY}.shira_indices") is None),
        f"{Q0} has no shira_indices",
    ),
    "no values": (
        lambda f: rewrite_tensors(f, lambda t: t.pop(f"{KEY}.shira_weight") is None),
        f"{Q0} has no shira_weight",
    ),
    "other shapes": (
        lambda f: rewrite_tensors(f, lambda t: t.update({f"{KEY}.shira_weight": torch.ones(3)})),
        r"shira_weight \[3\] and shira_indices \[2, 64\]",
    ),
    "half a column": (
        lambda f: rewrite_tensors(f, lambda t: {n: v + 0.5 for n, v in t.items()}),
        "shira_indices are not integers",
    ),
    "column beyond the base": (
        lambda f: rewrite_tensors(f, lambda t: {n: v + 30 for n, v in t.items()}),
        "has rows 30 to .*, the base has 32",
    ),
    "not finite": (
        lambda f: rewrite_tensors(
            f, lambda t: t.update({f"{KEY}.shira_weight": torch.full((64,), math.nan)})
        ),
        "NaN or infinite",
    ),
    "other type": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "peft_type is 'LORA', not 'SHIRA'",
    ),
    "config is text": (
        lambda f: (f / "adapter_config.json").write_text("hello"),
        "adapter_config.json is not JSON",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which is not read",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08\x00"),
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SHIRA)
def test_broken_shira_is_refused_and_nothing_written(fault, source, tmp_path):
    save_shira(source, tmp_path / "shira", r=1, targets=["q_proj"])
    spoil, message = BROKEN_SHIRA[fault]
    spoil(tmp_path / "shira")
    with pytest.raises(AdapterError, match=message):
        convert_shira(source, tmp_path / "shira", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{KEY}.supertuning_values": torch.ones(3)}), r"values \[3\]"),
        (lambda t: t.update({f"{KEY}.supertuning_indices": torch.ones(51)}), "integers"),
        (lambda t: {n: v * 0 for n, v in t.items()}, "an entry twice"),
        (lambda t: {n: v + 1024 for n, v in t.items()}, "the base has 32"),
        (lambda t: {f"{KEY}.supertuning_values": torch.ones(2000)}, "only 1024 weights"),
        (lambda t: {f"{KEY[:-6]}.supertuning_values": torch.ones(2)}, "no linear layer"),
    ],
)
def test_broken_supertuning_is_refused(change, message, source, tmp_path):
    save_supertuning(source, tmp_path / "super", sparsity=0.95)
    rewrite_tensors(tmp_path / "super", change)
    with pytest.raises(AdapterError, match=message):
        convert_supertuning(source, tmp_path / "super", tmp_path / "out")


# --- two checkpoints ---------------------------------------------------------------------------


def test_diff_of_all_entries_is_the_checkpoint(source, engine, tmp_path):
    tuned, model = save_tuned(source, tmp_path / "tuned", scale=0.1)
    result = convert_diff(source, tuned, tmp_path / "out", k=32)
    expected = [logits(model, ids) for ids in IDS]
    # down_proj has 48 inputs, of which the 32 that differ most are kept: not all of it.
    assert result.kept[Q0] == pytest.approx(1)
    assert result.kept["model.layers.1.mlp.down_proj"] == pytest.approx(result.kept_in_all, abs=0.2)
    assert_differs_from_base(engine, source, expected)
    merged = AutoModelForCausalLM.from_pretrained(source.path)
    part = result.adapter.modules[Q0]
    weight = merged.get_submodule(Q0).weight.detach()
    both = weight.scatter_add(1, part.index.long(), part.bypass)
    torch.testing.assert_close(both, model.get_submodule(Q0).weight)


def test_diff_with_a_merged_adapter_gives_the_adapter_back(source, engine, tmp_path):
    base = load_base(source)
    adapter = adapter_for(base.model, base.spec, seed=3, k=3, scale=0.05)
    save_adapter(adapter, tmp_path / "adapter")
    export_merged(source, tmp_path / "adapter", tmp_path / "tuned")
    tuned = ModelSource("tuned", tmp_path / "tuned")
    result = convert_diff(source, tuned, tmp_path / "out", k=16)
    assert result.adapter.config.k == 3
    assert result.kept_in_all == pytest.approx(1)
    assert result.warnings == ()
    for name, part in adapter.modules.items():
        assert torch.equal(result.adapter.modules[name].index, part.index)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    expected = [logits(model, ids) for ids in IDS]
    assert_served_alike(engine, source, tmp_path / "out", expected, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diff_in_float32_gives_the_checkpoint_back_to_the_bit(dtype, tmp_path):
    base = save_tiny_model(tmp_path / "base", dtype=dtype)
    save_adapter(random_adapter(base, seed=1, k=3), tmp_path / "adapter")
    export_merged(base, tmp_path / "adapter", tmp_path / "tuned")
    convert_diff(base, ModelSource("tuned", tmp_path / "tuned"), tmp_path / "out", k=3)
    export_merged(base, tmp_path / "out", tmp_path / "again")
    tuned, again = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "again"))
    for name, tensor in tuned.items():
        assert torch.equal(again[name], tensor), name


def test_diff_keeps_the_largest_and_tells_how_much(source, tmp_path):
    tuned, model = save_tuned(source, tmp_path / "tuned", scale=0.1)
    result = convert_diff(source, tuned, tmp_path / "out", k=2)
    base = AutoModelForCausalLM.from_pretrained(source.path).requires_grad_(False)
    model.requires_grad_(False)
    kept = total = 0.0
    for name in result.kept:
        difference = model.get_submodule(name).weight - base.get_submodule(name).weight
        largest = difference.abs().topk(2, dim=1).values.square().sum()
        assert result.kept[name] == pytest.approx(float(largest / difference.square().sum()))
        kept, total = kept + float(largest), total + float(difference.square().sum())
    assert result.kept_in_all == pytest.approx(kept / total)
    assert f"only {result.kept_in_all:.1%} of the energy is kept with k=2" in result.warnings[-1]


def test_diff_names_what_an_adapter_cannot_change(source, tmp_path):
    tuned, _ = save_tuned(source, tmp_path / "tuned", scale=0.1, others=True)
    first, *_ = convert_diff(source, tuned, tmp_path / "out", k=32).warnings
    assert "model.embed_tokens.weight, model.layers.0.input_layernorm.weight" in first
    assert "stay those of the base" in first


def test_diff_takes_biases_too_and_shira_refuses_them(tmp_path):
    qwen = save_tiny_model(tmp_path / "base", "qwen2")
    adapter = random_adapter(qwen, seed=3, k=2, scale=0.05, biases=True)
    save_adapter(adapter, tmp_path / "adapter")
    export_merged(qwen, tmp_path / "adapter", tmp_path / "tuned")
    result = convert_diff(qwen, ModelSource("t", tmp_path / "tuned"), tmp_path / "out", k=4)
    assert result.warnings == ()
    for name, part in adapter.modules.items():
        found = result.adapter.modules[name].bias
        assert (found is None) == (part.bias is None)
        if found is not None:
            torch.testing.assert_close(found, part.bias.float(), atol=1e-6, rtol=0)
    with pytest.raises(AdapterError, match="has biases"):
        export_shira(qwen, tmp_path / "out", tmp_path / "shira")


def test_diff_of_unchanged_modules_leaves_them_out(source, tmp_path):
    tuned, _ = save_tuned(source, tmp_path / "tuned", scale=0.1, only="v_proj")
    result = convert_diff(source, tuned, tmp_path / "out", k=4)
    assert result.adapter.config.target_modules == ("v_proj",)


def test_diff_of_conv1d_modules_is_in_rows_of_outputs(tmp_path):
    gpt2 = save_tiny_model(tmp_path / "base", "gpt2")
    save_adapter(random_adapter(gpt2, seed=1, k=2), tmp_path / "adapter")
    export_merged(gpt2, tmp_path / "adapter", tmp_path / "tuned")
    result = convert_diff(gpt2, ModelSource("t", tmp_path / "tuned"), tmp_path / "out", k=8)
    for name, part in load_adapter(tmp_path / "adapter").modules.items():
        assert torch.equal(result.adapter.modules[name].index, part.index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, f: s, "there is nothing to convert"),
        (lambda s, f: save_tiny_model(f, "qwen3"), "is a qwen3 model, 'tiny-llama' a llama"),
        (lambda s, f: save_tuned(s, f, 0.1, layers=1)[0], "layers.1.*is absent, not"),
        (lambda s, f: save_tuned(s, f, 0.1, intermediate=40)[0], r"is \[32, 40\], not \[32, 48\]"),
        (lambda s, f: save_tuned(s, f, math.nan)[0], "NaN or infinite weights in"),
    ],
)
def test_diff_of_what_does_not_compare_is_refused(make, message, source, tmp_path):
    tuned = make(source, tmp_path / "tuned")
    with pytest.raises(ModelError, match=message):
        convert_diff(source, tuned, tmp_path / "out", k=1)


# --- to SHiRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_exported_shira_gives_the_same_logits_in_peft(k, targets, source, tmp_path):
    base = load_base(source)
    save_adapter(adapter_for(base.model, base.spec, 1, k, targets), tmp_path / "adapter")
    r = export_shira(source, tmp_path / "adapter", tmp_path / "shira")
    export_merged(source, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "shira")
    assert model.peft_config["default"].r == r
    for ids in IDS:
        torch.testing.assert_close(logits(model, ids), logits(merged, ids), atol=1e-4, rtol=0)


def test_exported_shira_comes_back_as_it_was(source, tmp_path):
    adapter = random_adapter(source, seed=2, k=3)
    save_adapter(adapter, tmp_path / "adapter")
    export_shira(source, tmp_path / "adapter", tmp_path / "shira")
    result = convert_shira(source, tmp_path / "shira", tmp_path / "out", dtype="bfloat16")
    assert result.adapter.digest == adapter.digest


def test_shira_too_small_for_an_adapter_names_the_k_that_fits(source, tmp_path):
    save_adapter(random_adapter(source, seed=2, k=24), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"_proj \[16, 32\] allows no more than r=10; .* k up to"):
        export_shira(source, tmp_path / "adapter", tmp_path / "shira")
    assert not (tmp_path / "shira").exists()
    fits = 15  # r = 10 has 800 entries in up_proj [48, 32], 16 a row; 640 in q_proj, 20 a row
    save_adapter(random_adapter(source, seed=2, k=fits), tmp_path / "fitting")
    assert export_shira(source, tmp_path / "fitting", tmp_path / "out") <= 10


def test_shira_has_no_conv1d(tmp_path):
    gpt2 = save_tiny_model(tmp_path / "base", "gpt2")
    save_adapter(random_adapter(gpt2, seed=1), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="PEFT has no SHiRA for transformer.*Conv1D"):
        export_shira(gpt2, tmp_path / "adapter", tmp_path / "shira")


# --- rows --------------------------------------------------------------------------------------


def test_row_fuller_than_another_module_is_wide_names_both(source, tmp_path):
    save_supertuning(source, tmp_path / "super", sparsity=0.95, targets=["down_proj", "q_proj"])
    name = "base_model.model.model.layers.0.mlp.down_proj"

    def one_full_row(tensors):
        tensors[f"{name}.supertuning_values"] = torch.ones(40)
        tensors[f"{name}.supertuning_indices"] = torch.arange(40).int()

    rewrite_tensors(tmp_path / "super", one_full_row)
    with pytest.raises(UsageError, match="down_proj has 40 entries and .*q_proj only d_in=32"):
        convert_supertuning(source, tmp_path / "super", tmp_path / "out")
    result = convert_supertuning(source, tmp_path / "super", tmp_path / "out", k=32)
    assert result.adapter.config.k == 32


def test_suggested_k_keeps_nearly_all_energy_and_one_less_does_not(source, tmp_path):
    save_supertuning(source, tmp_path / "super", sparsity=0.9)
    (warning,) = convert_supertuning(source, tmp_path / "super", tmp_path / "whole").warnings
    k = int(warning.partition("--k ")[2].split()[0])
    for used_k in (k, k - 1):
        out = tmp_path / str(used_k)
        result = convert_supertuning(source, tmp_path / "super", out, k=used_k)
        assert (result.kept_in_all >= 0.99) == (used_k == k)


def test_targets_of_whole_and_half_endings(source):
    shapes = load_base(source).spec.shapes
    from neuroada_serve.adapters.format import target_modules

    for seed in range(20):
        modules = random_targets(shapes, seed)
        targets = target_modules(modules, shapes)
        assert {m for m in shapes if is_target(m, targets)} == set(modules)


# --- command line ------------------------------------------------------------------------------


def run_command(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_commands_convert_and_tell_what_was_kept(source, tmp_path):
    base = ["--base", source.path]
    OfficialModel(source, "perCell_mag_add", 2).save(tmp_path / "run")
    save_shira(source, tmp_path / "high", r=1, targets=["q_proj"])
    save_supertuning(source, tmp_path / "super", sparsity=0.95)
    save_tuned(source, tmp_path / "tuned", scale=0.1)
    for name, origin in (("official", "run"), ("shira", "high"), ("supertuning", "super")):
        result = run_command(name, tmp_path / origin, *base, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "100.00%" in result.stdout
        load_adapter(tmp_path / name)
    flags = [*base, "--out", tmp_path / "diff", "--k", 3, "--json", "--dtype", "bfloat16"]
    result = run_command("diff", tmp_path / "tuned", *flags)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert 0 < report["energy_kept"] < 0.9
    assert set(report["energy_kept_by_module"]) == set(load_base(source).spec.shapes)
    assert "of the energy is kept with k=3" in result.stderr
    result = run_command("to-shira", tmp_path / "diff", *base, "--out", tmp_path / "back")
    assert "SHiRA adapter with r=2 written" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "RUN"], "is not an empty folder"),
        (["--out", "OUT", "--k", "0"], "k must be at least 1"),
        (["--out", "OUT", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_mistake_ends_with_one_sentence_and_code_2(flags, message, source, tmp_path):
    save_shira(source, tmp_path / "run", r=1, targets=["q_proj"])
    places = {"RUN": tmp_path / "run", "OUT": tmp_path / "out"}
    flags = [places.get(flag, flag) for flag in flags]
    result = run_command("shira", tmp_path / "run", "--base", source.path, *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_every_flag_of_convert_has_help():
    from typer.main import get_command

    commands = get_command(app).commands["convert"].commands
    assert set(commands) == {"official", "shira", "supertuning", "diff", "to-shira"}
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_converted_adapter_covers_what_the_base_calls_adaptable(source, tmp_path):
    OfficialModel(source, "perCell_mag_add", 1).save(tmp_path / "run")
    result = convert_official(source, tmp_path / "run", tmp_path / "out")
    assert result.adapter.modules.keys() == adaptable_modules(load_base(source).model).keys()
