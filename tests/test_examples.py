"""The training examples, run as scripts on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from neuroada_serve import LLM, load_adapter
from neuroada_serve.adapters.select import magnitude_index
from neuroada_serve.model.loader import load_base
from tests.support.tiny import save_tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def run_example(name, source, tmp_path, monkeypatch, *flags):
    """The adapter that it writes."""
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"say {c}", "completion": c * 3}) for c in "abcdefgh"]
    rows.write_text("\n".join(lines))
    arguments = [str(source.path), str(rows), str(tmp_path / "out"), "--k", "2", *flags]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return load_adapter(tmp_path / "out", load_base(source).spec)


def assert_trained(adapter, source, tmp_path):
    base = load_base(source)
    for name, part in adapter.modules.items():
        weight = base.model.get_submodule(name).weight
        assert torch.equal(part.index, magnitude_index(weight, 2))
        assert float(part.bypass.abs().max()) > 0
    assert adapter.modules.keys() == base.spec.shapes.keys()
    LLM(str(source.path), {"out": tmp_path / "out"}).generate([[1, 2]], None, "out")


def test_plain_pytorch_loop_learns_its_rows(source, tmp_path, monkeypatch, capsys):
    flags = ["--steps", "40", "--lr", "0.05", "--batch-size", "4"]
    adapter = run_example("train_plain_pytorch.py", source, tmp_path, monkeypatch, *flags)
    losses = [float(x.split()[-1]) for x in capsys.readouterr().out.splitlines() if "loss" in x]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    assert_trained(adapter, source, tmp_path)


@pytest.mark.filterwarnings("ignore")  # TRL's and its libraries'
def test_trl_trainer_takes_the_model_as_it_is(source, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    flags = ["--steps", "2", "--batch-size", "2"]
    adapter = run_example("train_trl.py", source, tmp_path, monkeypatch, *flags)
    assert_trained(adapter, source, tmp_path)
