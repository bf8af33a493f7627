"""bench/host.py on a tiny model."""

import json
import subprocess
import sys

import torch

from bench.harness import ROOT
from tests.support.tiny import save_tiny_model


def test_host_work_is_what_forward_and_sampling_leave(tmp_path):
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    flags = ["--batch", "3", "--steps", "4", "--out", tmp_path / "host.json"]
    command = [sys.executable, "-m", "bench.host", source.path, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
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
