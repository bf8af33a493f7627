"""bench/scaling.py on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.mark.timeout(300)
def test_scaling_writes_its_series_and_plots(model, tmp_path):
    script = Path(__file__).resolve().parent.parent.parent / "bench" / "scaling.py"
    flags = ["--rounds", "2", "--steps", "2", "--max-batch", "4", "--out", str(tmp_path)]
    command = [sys.executable, str(script), str(model.path), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "scaling.json").read_text())
    xs = {name: [entry["x"] for entry in entries] for name, entries in found["series"].items()}
    assert xs["adapters"] == xs["batch"] == [1, 2, 4]
    assert xs["k"] == [1, 2, 4, 8, 16, 32]
    assert len(xs["nnz"]) == 7 * 3 + 6  # seven kinds of modules of three ks, and the series of k
    assert len(list(tmp_path.glob("scaling_*.png"))) == 5
    assert found["nnz_fit"]["r2"] <= 1
