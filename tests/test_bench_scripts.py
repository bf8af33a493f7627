"""The script for host work runs, on a tiny model, and says what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tiny import save_tiny_model

from bench import abuse

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "host.py"


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


def test_training_steps_of_methods_are_measured(tmp_path):
    source = save_tiny_model(tmp_path / "model")
    flags = [str(source.path), "--rounds", "1", "--rows", "2", "--width", "12", "--out", tmp_path]
    flags += ["--only", "neuroada k=8;official k=8;mask k=8"]
    command = [sys.executable, "-m", "bench.training", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=SCRIPT.parent.parent
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "training.json").read_text())
    assert all(one["ok"] for one in result["checks"].values())
    assert len(result["methods"]) == 3
    for name, one in result["methods"].items():
        assert len(one["step_s"]) == 1, name
        assert one["extra_bytes"] >= 0
    ours, official = result["methods"]["neuroada k=8"], result["methods"]["official k=8"]
    assert (
        ours["parameters"] == official["parameters"] == result["methods"]["mask k=8"]["parameters"]
    )
    assert (tmp_path / "training.png").stat().st_size > 1000


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
