"""The script for host work runs, on a tiny model, and says what it promises."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import abuse, training
from neuroada_serve.model.loader import load_base
from tests.support.tiny import VOCAB, save_tiny_model

SCRIPT = Path(__file__).resolve().parent.parent.parent / "bench" / "host.py"


def test_host_work_is_what_forward_and_sampling_leave(tmp_path):
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    flags = ["--batch", "3", "--steps", "4", "--out", tmp_path]
    command = [sys.executable, SCRIPT, source.path, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "host.json").read_text())
    for found in result["sampling"].values():
        parts = (found[name] for name in ("step_ms", "forward_ms", "sampling_ms"))
        for step, forward, sampling in zip(*parts, strict=True):
            assert forward > 0
            assert sampling > 0
            assert forward + sampling < step
        assert len(found["step_ms"]) == 4
        assert 0 < found["host_share"] < 1


@pytest.mark.parametrize(
    "names",
    [
        ["neuroada k=8"],
        pytest.param(["neuroada k=8", "official k=8", "mask k=8"], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_training_steps_of_methods_are_measured(tmp_path, monkeypatch, capfd, names):
    """Two processes per method; gradients are checked on layers smaller than the script's."""
    source = save_tiny_model(tmp_path / "model")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16}
    checked = training.CHECKED
    monkeypatch.setattr(training, "CHECKED", replace(checked, model=checked.model | small))
    flags = [str(source.path), "--rounds", "1", "--rows", "2", "--width", "12"]
    assert training.main([*flags, "--only", ";".join(names), "--out", str(tmp_path)]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "training.json").read_text())
    assert len(result["checks"]) == 12
    assert all(one["ok"] for one in result["checks"].values())
    assert list(result["methods"]) == names
    for name, one in result["methods"].items():
        assert len(one["step_s"]) == 1, name
        assert one["extra_bytes"] >= 0
    assert len({one["parameters"] for one in result["methods"].values()}) == 1
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_ways_to_train_the_same_entries_change_as_many_weights(tmp_path):
    source = save_tiny_model(tmp_path)
    batch = training.random_batch(2, 12, VOCAB, "cpu")
    num_trained = set()
    for way in ("neuroada", "official", "mask"):
        model = load_base(source, device="cpu").model
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        with ExitStack() as stack:
            job = training.Job(model, training.Method(way, 8), batch, stack)
            job.step()
            job.step()  # the bypass's values come into the weights with the next forward
            num_trained.add(job.parameters)
            module = model.model.layers[0].mlp.up_proj
            moved = (module.weight.detach() != before).sum(1).max()
            assert (moved == 0) if way == "official" else (0 < moved <= 8), way
    assert len(num_trained) == 1


def test_methods_are_compared_within_rounds():
    ours = {"step_s": [1.0, 4.0, 3.0], "extra_bytes": 2**30}
    other = {"step_s": [2.0, 4.0, 12.0], "extra_bytes": 2**31}
    made = training.summary({"neuroada k=8": ours, "official k=8": other})
    assert made["neuroada k=8"]["step_s"] == 3.0
    assert made["neuroada k=8"]["of official k=8"] == {"step": 0.5, "memory": 0.5}
    assert "of neuroada k=8" not in made["official k=8"]


def test_abuse_is_measured(tmp_path, monkeypatch):
    """Less of it, against a tiny model."""
    source = save_tiny_model(tmp_path / "model")
    for name, value in {"NUM_LARGE": 2, "NUM_HALF_OPEN": 3, "NUM_SILENT": 3}.items():
        monkeypatch.setattr(abuse, name, value)
    few = dict(list(abuse.bombs().items())[:2])
    monkeypatch.setattr(abuse, "bombs", lambda: few)
    with abuse.server(str(source.path), SCRIPT.parent.parent) as running:
        found = abuse.measure_bombs(running, rounds=1)
        assert found.keys() == {"nothing", *few}
        assert all(one["held_ms"][0] > 0 for one in found.values())
        large = abuse.measure_large_prompts(running, rounds=1)
        assert all(0 < time < abuse.ANSWER_TIMEOUT_S for times in large.values() for time in times)
        half_open = abuse.measure_half_open(running, wait_s=0.3)
        assert half_open["gone"] == 0
        assert half_open["beside_them_s"]
        descriptors = abuse.measure_descriptors(running)
        assert descriptors["log_lines"] == 0
    abuse.print_table(
        {
            "bombs": found,
            "large_prompts": large,
            "half_open": half_open,
            "descriptors": descriptors,
        }
    )
