"""The rows on which default flags are judged, and the script that judges."""

import json
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from bench import defaults
from bench.defaults_rows import FOR_CHOICES, REPORTED
from neuroada_serve.cli.main import app
from tests.support.tiny import save_tiny_model


@pytest.mark.parametrize("task", [*REPORTED, *FOR_CHOICES], ids=lambda task: task.name)
def test_rows_are_different_texts_in_five_classes_of_one_size(task):
    rows = task.rows(120, seed=0)
    assert len({text for text, _ in rows}) == 120
    assert sorted(Counter(label for _, label in rows).values()) == [24] * 5
    fresh = task.rows(100, 1000, frozenset(text for text, _ in rows))
    assert not {text for text, _ in rows} & {text for text, _ in fresh}
    assert rows == task.rows(120, seed=0) != task.rows(120, seed=1)


def train_here(arguments):
    """Training in this process, which has everything imported; scoring in one of its own."""
    if arguments[0] != "train":
        return in_a_process(arguments)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done


in_a_process = defaults.neuroada


def test_the_script_trains_with_default_flags_and_scores_fresh_rows(tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    out = tmp_path / "defaults.json"
    flags = ["--model", str(source.path), "--tasks", "home", "--rows", "20", "--fresh", "5"]
    monkeypatch.setattr(defaults, "neuroada", train_here)
    defaults.main([*flags, "--out", str(out), "--", "--max-steps=2"])
    [found] = json.loads(out.read_text())["tasks"]
    assert (found["rows"], found["fresh_rows"], found["steps"]) == (20, 5, 2)
    assert 0 <= found["fresh_exact_match"] <= 1
