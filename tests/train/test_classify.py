"""Training classifiers: gradients as transformers' own have them, and adapters that are served."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from neuroada_serve import LLM
from neuroada_serve.adapters.format import CONFIG_FILE, HEAD, WEIGHTS_FILE
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.model.loader import adaptable_modules, is_transposed, load_base
from neuroada_serve.train.batches import collate, predict
from neuroada_serve.train.data import load_data
from neuroada_serve.train.examples import Example
from neuroada_serve.train.head import task_head
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.shapes import read_rows
from neuroada_serve.train.trainer import train_adapter
from tests.support.command import run
from tests.support.interrupted import train_interrupted
from tests.support.tiny import save_tiny_model
from tests.support.training import make_base, write_rows

WORDS = {"good": ["fine", "nice", "great"], "bad": ["poor", "grim", "awful"]}
ROWS = [
    {"text": f"{word} {n}", "label": label}
    for n in range(12)
    for label, words in WORDS.items()
    for word in words
]
QUICK = TrainConfig(
    task_type="SEQ_CLS", k=2, max_steps=60, eval_fraction=0.25, lr=0.02, head_lr=0.02
)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def files_of(folder):
    names = (WEIGHTS_FILE, CONFIG_FILE, "loss.jsonl", "README.md")
    return {name: (folder / name).read_bytes() for name in names}


# gemma2 caps the logits of its own head, and of no classifier's
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_gradients_are_those_of_transformers_own_classifier(family, tmp_path):
    source = save_tiny_model(tmp_path / "tiny", family)
    base = load_base(source, "float32", "cpu")
    model = base.model.double()
    own = model.get_output_embeddings()
    rows = [Example((5, 6, 7), (2,)), Example((9, 8, 7, 6, 5), (0,)), Example((4,), (1,))]
    modules = adaptable_modules(model)
    selections = magnitude_selections(modules, 3)
    with task_head(model, 3, seed=1) as head, inplace_training(model, modules, selections) as ours:
        head.double().requires_grad_(True)
        head.weight.data.mul_(50)
        # float32 is the head's own; here all is float64
        head.forward = lambda x: setattr(head, "output", F.linear(x, head.weight)) or head.output
        logits, targets, _ = predict(model, collate(rows))
        assert logits.shape == (3, 3)
        loss = F.cross_entropy(head_output := logits.double(), targets)
        loss.backward()
        found = {name: layer.value.grad for name, layer in ours.items()}
        of_head, weight = head.weight.grad, head.weight.detach().clone()
    assert model.get_output_embeddings() is own

    other = AutoModelForSequenceClassification.from_pretrained(
        source.path, num_labels=3, pad_token_id=257, dtype=torch.float64
    ).eval()
    other.score.weight.data.copy_(weight)
    losses, theirs = [], []
    for row in rows:  # one by one: no padding
        theirs.append(other(torch.tensor([row.prompt_ids])).logits[0])
        losses.append(F.cross_entropy(theirs[-1], torch.tensor(row.answer_ids[0])))
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(head_output.float(), torch.stack(theirs).float())
    torch.testing.assert_close(of_head, other.score.weight.grad, atol=1e-6, rtol=1e-5)
    for name, gradient in found.items():
        module = other.get_submodule(name)
        full = module.weight.grad.t() if is_transposed(module) else module.weight.grad
        expected = full.gather(1, selections[name].index.long())
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_a_classifier_learns_and_serves_what_was_scored(base, data, tmp_path):
    bits = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    report = train_adapter(base, data, tmp_path / "mood", QUICK)
    assert report.before.figure < 0.8
    assert report.after.figure == 1.0
    now = base.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in bits.items())

    adapter = load_adapter(tmp_path / "mood", base.spec)
    assert adapter.config.labels == ("bad", "good")
    assert adapter.config.metadata["recipe"]["prompt_format"] == "plain"
    assert adapter.config.metadata["scores"]["after"].keys() == {"loss", "accuracy"}
    assert adapter.head.abs().max() > 0.02
    llm = LLM(str(tmp_path / "tiny"), {"mood": tmp_path / "mood"})
    loaded = load_data(base, data, QUICK)
    found = llm.classify([list(e.prompt_ids) for e in loaded.heldout], "mood")
    losses = [
        -torch.tensor(output.probs[example.answer_ids[0]]).log()
        for output, example in zip(found, loaded.heldout, strict=True)
    ]
    assert torch.stack(losses).mean() == pytest.approx(report.after.loss, abs=1e-3)
    # A text over HTTP or in Python is encoded as a row's was.
    rows = read_rows(data).rows[:5]
    texts = llm.classify([row.text.removesuffix("\n") for row in rows], "mood")
    for row, output in zip(rows, texts, strict=True):
        assert output.prompt_token_ids == loaded.objective.encode(base, row).prompt_ids
        assert output.label == row.answer


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": "auto"},
        {"packing": True},
        {"bypass": True},
        {"selection": "gradient"},
        {"recompute": "all"},
        {"labels": ("good", "unused", "bad")},
    ],
)
def test_other_ways_of_training_take_classifiers(base, data, tmp_path, changed):
    report = train_adapter(base, data, tmp_path / "mood", replace(QUICK, **changed))
    assert report.after.figure > 0.8
    labels = changed.get("labels", ("bad", "good"))
    assert load_adapter(tmp_path / "mood", base.spec).config.labels == labels


def test_interrupted_it_goes_on_to_the_same_bytes(base, data, tmp_path, monkeypatch):
    config = replace(QUICK, max_steps=9, save_steps=2, eval_steps=3)
    train_adapter(base, data, tmp_path / "whole" / "mood", config)
    out = tmp_path / "cut" / "mood"
    train_interrupted(base, data, out, config, monkeypatch)
    assert files_of(out) == files_of(tmp_path / "whole" / "mood")


def test_the_report_counts_classes(base, data):
    report = str(load_data(base, data, QUICK).report)
    assert "2 classes: bad " in report
    assert "answers" not in report.replace("of the answers", "")


def test_pairs_are_one_text_below_the_other(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "label": "same", "idx": 1},
        {"premise": "a", "hypothesis": "b", "label": 0},
        {"question1": "a", "question2": "b", "label": True},
        {"question": "a", "sentence": "b", "label": "same"},
    ]
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows)).rows
    assert [row.text for row in found] == ["a\nb\n"] * 4
    assert [row.answer for row in found] == ["same", "0", "True", "same"]


def test_rows_that_make_no_classifier_are_refused(base, data, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"text": f"a{n}", "label": "x"} for n in range(8)])
    with pytest.raises(DataError, match="all rows have the label 'x'; a classifier needs two"):
        load_data(base, one, QUICK)
    with pytest.raises(DataError, match=r"lines 2, .*: label 'good' is none of bad, fair"):
        load_data(base, data, replace(QUICK, labels=("bad", "fair")))
    other = write_rows(tmp_path / "other.jsonl", [{"text": "fair", "label": "fair"}])
    with pytest.raises(DataError, match=r"other.jsonl .*\n.*label 'fair' is none of bad, good"):
        load_data(base, data, replace(QUICK, eval_data=other))
    with pytest.raises(UsageError, match="give --task-type SEQ_CLS too"):
        TrainConfig(labels=("a", "b"))
    with pytest.raises(UsageError, match="task_type must be one of CAUSAL_LM, SEQ_CLS"):
        TrainConfig(task_type="TOKEN_CLS")


def test_from_the_command_line(base, data, tmp_path):
    trained = run(
        *("train", tmp_path / "tiny", "--data", data, "--out", tmp_path / "mood"),
        *("--task-type", "SEQ_CLS", "--labels", "good,bad", "--max-steps", "3"),
    )
    assert trained.exit_code == 0, trained.stderr
    assert "accuracy" in trained.stdout
    config = json.loads((tmp_path / "mood" / CONFIG_FILE).read_text())
    assert (config["task_type"], config["labels"]) == ("SEQ_CLS", ["good", "bad"])
    assert HEAD.encode() in (tmp_path / "mood" / WEIGHTS_FILE).read_bytes()
