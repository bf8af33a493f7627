"""Classifiers of one label, which give a number: trained, served, scored and merged."""

import json
from dataclasses import replace

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from neuroada_serve import LLM, save_adapter
from neuroada_serve.adapters.card import model_card
from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.config import ServerConfig, TrainConfig
from neuroada_serve.errors import DataError
from neuroada_serve.model.export import export_merged
from neuroada_serve.model.loader import adaptable_modules, is_transposed, load_base
from neuroada_serve.server.app import create_app
from neuroada_serve.server.worker import Worker
from neuroada_serve.tasks import Regress
from neuroada_serve.train.batches import collate, collate_packed, predict
from neuroada_serve.train.correlation import pearson, spearman
from neuroada_serve.train.data import load_data
from neuroada_serve.train.examples import Example
from neuroada_serve.train.head import task_head
from neuroada_serve.train.inplace import inplace_training, magnitude_selections
from neuroada_serve.train.objectives import GiveNumber
from neuroada_serve.train.trainer import train_adapter
from tests.support.classifiers import TEXTS, classifier
from tests.support.command import run
from tests.support.tiny import save_tiny_model
from tests.support.training import make_base, write_rows

LABELS = ("score",)
# How much of a text is "9"s: from 0 to 4.
ROWS = [
    {"text": "".join(word) + f" {n}", "label": word.count("9") / 1.0}
    for n in range(6)
    for word in ("1234", "1934", "9294", "9939", "9999", "9123", "1299")
]
QUICK = TrainConfig(
    task_type="SEQ_CLS",
    labels=LABELS,
    k=4,
    max_steps=80,
    eval_fraction=0.25,
    lr=0.02,
    head_lr=0.05,
)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("regression") / "tiny")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_transformers_own_regression(family, packed, tmp_path):
    source = save_tiny_model(tmp_path / "tiny", family)
    model = load_base(source, "float32", "cpu").model
    rows = [Example((5, 6, 7), (0,), 2.5), Example((9, 8, 7, 6), (0,), -1.0)]
    if packed and family == "gpt2":
        rows = rows[:1]  # it cannot tell packed rows apart
    modules = adaptable_modules(model)
    selections = magnitude_selections(modules, 3)
    with task_head(model, 1, seed=1) as head, inplace_training(model, modules, selections) as ours:
        head.requires_grad_(True)
        head.weight.data.mul_(50)
        batch = (collate_packed if packed else collate)(rows)
        (GiveNumber(Regress(LABELS)).loss(predict(model, batch)) / len(rows)).backward()
        found = {name: layer.value.grad for name, layer in ours.items()}
        of_head, weight = head.weight.grad, head.weight.detach().clone()

    other = AutoModelForSequenceClassification.from_pretrained(
        source.path, num_labels=1, pad_token_id=257
    ).eval()
    other.score.weight.data.copy_(weight)
    for row in rows:
        label = torch.tensor([row.target])
        (other(torch.tensor([row.prompt_ids]), labels=label).loss / len(rows)).backward()
    torch.testing.assert_close(of_head, other.score.weight.grad, atol=1e-4, rtol=1e-3)
    for name, gradient in found.items():
        module = other.get_submodule(name)
        full = module.weight.grad.t() if is_transposed(module) else module.weight.grad
        expected = full.gather(1, selections[name].index.long())
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changed", [{}, {"lr": "auto"}, {"selection": "gradient"}])
def test_a_number_is_learnt_and_served_as_it_was_scored(base, data, tmp_path, changed):
    config = replace(QUICK, **changed)
    report = train_adapter(base, data, tmp_path / "nines", config)
    assert "; labels from 0 to 4" in str(report.data)
    assert report.after.figure > 0.7
    assert report.after.loss < 0.5 * report.before.loss
    adapter = load_adapter(tmp_path / "nines", base.spec)
    assert adapter.config.labels == LABELS
    scores = adapter.config.metadata["scores"]
    assert scores["after"] == {"loss": report.after.loss, "pearson": report.after.figure}

    llm = LLM(str(tmp_path / "tiny"), {"nines": adapter})
    heldout = load_data(base, data, config).heldout
    found = llm.classify([list(e.prompt_ids) for e in heldout], "nines")
    errors = [(o.probs[0] - e.target) ** 2 for o, e in zip(found, heldout, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(report.after.loss, rel=1e-2)
    assert {output.label for output in found} == {"score"}


def test_rows_without_numbers_are_refused(base, tmp_path):
    for label in ("good", "nan", "inf"):
        rows = write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], {"text": "1", "label": label}])
        with pytest.raises(DataError, match=r"line 4: label '.*' is not a number"):
            load_data(base, rows, QUICK)
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": "1", "label": "2.5"}])
    assert load_data(base, numbers, QUICK).train[0].target == 2.5
    same = write_rows(tmp_path / "same.jsonl", [{"text": f"{n}", "label": "a"} for n in range(4)])
    with pytest.raises(DataError, match=r"all rows have the label 'a'.*To learn numbers"):
        load_data(base, same, replace(QUICK, labels=()))


def test_a_merged_checkpoint_is_transformers_own_regression(source, tmp_path):
    adapter = classifier(source, 1, LABELS)
    save_adapter(adapter, tmp_path / "nines")
    export_merged(source, tmp_path / "nines", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    outputs = LLM(str(source.path), {"nines": adapter}).classify(TEXTS, "nines")
    for output in outputs:
        with torch.no_grad():
            expected = model(torch.tensor([output.prompt_token_ids])).logits[0, 0].item()
        assert output.probs[0] == pytest.approx(expected, abs=1e-4)
    assert any(not 0 <= output.probs[0] <= 1 for output in outputs)
    card = model_card(load_adapter(tmp_path / "nines").config, "nines")
    assert "- task: regression of `score`" in card


@pytest.mark.anyio
async def test_over_http_probs_is_the_number(source):
    llm = LLM(str(source.path), {"nines": classifier(source, 1, LABELS)})
    [expected] = llm.classify(["a"], "nines")
    async with Worker(llm.engine) as worker:
        app = httpx.ASGITransport(create_app(worker, ServerConfig()))
        async with httpx.AsyncClient(transport=app, base_url="http://127.0.0.1") as client:
            reply = await client.post("/v1/classify", json={"model": "nines", "input": "a"})
    [found] = reply.json()["data"]
    assert found["probs"] == pytest.approx(expected.probs, abs=1e-5)
    assert (found["label"], found["num_classes"]) == ("score", 1)


def test_eval_gives_correlations(source, tmp_path):
    adapter = classifier(source, 1, LABELS)
    save_adapter(adapter, tmp_path / "nines")
    texts = [f"text {n}" for n in range(30)]
    given = [o.probs[0] for o in LLM(str(source.path), {"n": adapter}).classify(texts, "n")]
    true = [value + (n % 5) * 0.1 for n, value in enumerate(given)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, true, strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = "eval", source.path, "--data", data, "--adapter", tmp_path / "nines"
    scored = run(*flags, "--save", "--json", "--out", tmp_path / "scores.json")
    assert scored.exit_code == 0, scored.stderr
    found = json.loads(scored.stdout)
    assert found["metrics"] == ["mse", "pearson", "spearman"]
    assert found["mse"] == pytest.approx(0.06, rel=1e-3)
    assert found["pearson"] == pytest.approx(pearson(given, true), abs=1e-4)
    assert found["scores"]["nines"]["pearson"]["low"] < found["pearson"]
    saved = json.loads((tmp_path / "nines" / CONFIG_FILE).read_text())["metadata"]
    assert saved["scores"]["evaluated"]["rows.jsonl"]["adapter"].keys() == set(found["metrics"])
    predictions = (tmp_path / "scores.predictions.jsonl").read_text().splitlines()
    assert json.loads(predictions[7])["value"] == pytest.approx(given[7], abs=1e-4)
    assert (tmp_path / "scores.scores.png").exists()
    own = write_rows(
        tmp_path / "own.jsonl", [{"said": r["text"], "stars": r["label"]} for r in rows]
    )
    named = run(
        *flags[:2], "--data", own, *flags[4:], "--columns", "text=said,label=stars", "--json"
    )
    assert json.loads(named.stdout)["mse"] == found["mse"]
    save_adapter(classifier(source, 1), tmp_path / "mood")
    mixed = run(*flags, "--adapter", tmp_path / "mood")
    assert "nines is a regression and mood a classifier; score them apart" in mixed.stderr


def test_correlations_are_the_textbooks():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.5]
    assert pearson(x, y) == pytest.approx(torch.corrcoef(torch.tensor([x, y]))[0, 1].item())
    assert spearman(x, y) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # ties share a rank
    assert pearson([1, 1], [1, 2]) == spearman([1, 2], [3, 3]) == 0
