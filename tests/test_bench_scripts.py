"""The scripts under bench/ run, on a tiny model, and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("host", ["--batch", "3", "--steps", "4"]),
        ("scaling", ["--max-batch", "4", "--rounds", "1", "--steps", "2"]),
    ],
)
def test_script_writes_what_it_prints(tmp_path, script, flags):
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    command = [sys.executable, BENCH / f"{script}.py", source.path, *flags, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / f"{script}.json").read_text())
    assert result["benchmark"] == script
    assert result["commit"]
    if script == "host":
        greedy = result["sampling"]["greedy"]
        assert len(greedy["step_ms"]) == len(greedy["forward_ms"]) == 4
        assert all(0 < f < s for f, s in zip(greedy["forward_ms"], greedy["step_ms"], strict=True))
    else:
        assert set(result["series"]) == {"adapters", "k", "batch", "context", "nnz"}
        assert all((tmp_path / f"scaling_{name}.png").exists() for name in result["series"])
