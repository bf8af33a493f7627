"""bench/training on a tiny model: steps, gradients, and ratios of made-up times."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest

from bench.training import __main__ as training
from bench.training import check
from bench.training.methods import Job, Method, random_batch
from bench.training.report import summary
from neuroada_serve.model.loader import load_base
from tests.support.tiny import VOCAB, save_tiny_model


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
    checked = check.CHECKED
    monkeypatch.setattr(check, "CHECKED", replace(checked, model=checked.model | small))
    out = tmp_path / "training.json"
    flags = [str(source.path), "--rounds", "1", "--rows", "2", "--width", "12"]
    assert training.main([*flags, "--only", ";".join(names), "--out", str(out)]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
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
    batch = random_batch(2, 12, VOCAB, "cpu")
    num_trained = set()
    for way in ("neuroada", "official", "mask"):
        model = load_base(source, device="cpu").model
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        with ExitStack() as stack:
            job = Job(model, Method(way, 8), batch, stack)
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
    made = summary({"neuroada k=8": ours, "official k=8": other})
    assert made["neuroada k=8"]["step_s"] == 3.0
    assert made["neuroada k=8"]["of official k=8"] == {"step": 0.5, "memory": 0.5}
    assert "of neuroada k=8" not in made["official k=8"]
