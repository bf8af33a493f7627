"""Classifiers: their files, the engine against transformers' own, and /v1/classify."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from neuroada_serve import LLM, SamplingParams
from neuroada_serve.adapters.card import model_card
from neuroada_serve.adapters.format import (
    CONFIG_FILE,
    HEAD,
    WEIGHTS_FILE,
    Adapter,
    make_adapter,
    save_adapter,
)
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.errors import AdapterError, AdapterFormatError, RequestError
from neuroada_serve.model.convert import export_shira
from neuroada_serve.model.export import export_merged
from neuroada_serve.model.loader import load_base
from neuroada_serve.request import CLASSIFY
from tests.support.classifiers import LABELS, TEXTS, classifier
from tests.support.command import run
from tests.support.tiny import plain_merged, random_adapter, save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("classify") / "tiny")


# --- files ----------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(source, tmp_path):
    adapter = classifier(source, 1)
    save_adapter(adapter, tmp_path)
    found = load_adapter(tmp_path, load_base(source).spec)
    assert found.digest == adapter.digest
    assert found.config == adapter.config
    assert found.nnz == adapter.nnz
    assert torch.equal(found.head, adapter.head)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"labels": ["a", "b"]}, r"score.weight has shape \[3, 32\], expected \[2, 32\]"),
        ({"labels": ["a"]}, r"score.weight has shape \[3, 32\], expected \[1, 32\]"),
        ({"labels": []}, "there are 0 labels, SEQ_CLS takes 1 to 1000"),
        ({"labels": ["a", "b", "b"]}, "labels lists one twice"),
        ({"labels": ["a", "b", ""]}, "labels must be non-empty strings"),
        ({"labels": ["a", "b", 3]}, "labels must be non-empty strings"),
        ({"labels": "abc"}, "labels must be of type list"),
        ({"task_type": "CAUSAL_LM"}, "labels are for task_type SEQ_CLS"),
        ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'; CAUSAL_LM and SEQ_CLS"),
    ],
)
def test_a_config_of_another_task_is_refused(source, tmp_path, config, fault):
    save_adapter(classifier(source, 1), tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterFormatError, match=fault):
        load_adapter(tmp_path, load_base(source).spec)


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (None, "score.weight is missing"),
        (torch.zeros(3, 31), r"score.weight has shape \[3, 31\], expected \[3, 32\]"),
        (torch.zeros(96), r"has shape \[96\]"),
        (torch.zeros(3, 32, dtype=torch.int32), "score.weight has dtype I32"),
        (torch.full((3, 32), torch.nan), "score.weight has NaN"),
    ],
)
def test_a_broken_head_is_refused(source, tmp_path, head, fault):
    adapter = classifier(source, 1)
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors.pop(HEAD)
    if head is not None:
        tensors[HEAD] = head
    described = {"format": "neuroada", "format_version": "1"}
    described["base_fingerprint"] = adapter.config.base_fingerprint
    save_file(tensors, tmp_path / WEIGHTS_FILE, described)
    with pytest.raises(AdapterFormatError, match=fault):
        load_adapter(tmp_path, load_base(source).spec)
    llm = LLM(str(source.path))
    with pytest.raises(AdapterFormatError, match=fault):
        llm.load_adapter("mood", tmp_path)
    assert llm.adapters == ()


def test_a_head_belongs_to_a_classifier(source, tmp_path):
    plain = random_adapter(source, 1)
    with pytest.raises(AdapterFormatError, match="unexpected tensor 'score.weight'"):
        make_adapter(plain.config, plain.modules, torch.zeros(2, 32))


def reference(source, adapter: Adapter, text_ids: list[int]) -> torch.Tensor:
    """Probabilities by transformers' own classifier, the adapter in its weights."""
    merged = plain_merged(source, adapter)
    model = AutoModelForSequenceClassification.from_pretrained(
        source.path, num_labels=len(adapter.config.labels), dtype=torch.float32
    )
    wanted = merged.base_model.state_dict()
    model.base_model.load_state_dict(wanted)
    model.score.weight.data.copy_(adapter.head)
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([text_ids])).logits[0].softmax(0)


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("mode", ["mixed", "merged"])
def test_probabilities_are_those_of_transformers(family, mode, tmp_path):
    source = save_tiny_model(tmp_path / "tiny", family)
    adapters = {"one": classifier(source, 1), "two": classifier(source, 2, ("no", "yes"))}
    llm = LLM(str(source.path), adapters, merge="one" if mode == "merged" else "never")
    names = ["one", "two", "one"]
    found = llm.classify(TEXTS, names)
    assert llm.merged == ("one" if mode == "merged" else None)
    for text, name, output in zip(TEXTS, names, found, strict=True):
        expected = reference(source, adapters[name], list(output.prompt_token_ids))
        torch.testing.assert_close(torch.tensor(output.probs), expected, atol=1e-5, rtol=1e-4)
        assert (output.adapter, output.labels) == (name, adapters[name].config.labels), text
        assert output.label == output.labels[int(expected.argmax())]
        assert output.adapter_digest == adapters[name].digest


def test_texts_beside_classes_are_as_they_are_alone(source):
    """In bfloat16, where whole steps are one kernel."""
    llm = LLM(str(source.path), dtype="bfloat16")
    llm.load_adapter("mood", classifier(source, 1))
    llm.load_adapter("talk", random_adapter(source, 3))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = [out.token_ids for out in llm.generate(TEXTS, params, ["talk", None, "talk"])]
    classes = llm.classify(TEXTS, "mood")

    together: list[list[int]] = [[], [], []]
    probs = {}
    engine = llm.engine
    prompts = [list(out.prompt_token_ids) for out in classes]
    for i, (prompt, name) in enumerate(zip(prompts, ["talk", None, "talk"], strict=True)):
        engine.add_request(f"text-{i}", prompt, params, name)
    step = 0
    while engine.has_unfinished:
        if step in (1, 4, 7):  # while the others are at their answers
            engine.add_request(f"class-{step // 3}", prompts[step // 3], CLASSIFY, "mood")
        step += 1
        for output in engine.step():
            kind, _, number = output.request_id.partition("-")
            if kind == "text":
                together[int(number)] += output.token_ids
            else:
                probs[int(number)] = output.values
                assert output.finished
                assert not output.token_ids
    assert [tuple(ids) for ids in together] == alone
    for number, found in probs.items():
        expected = torch.tensor(classes[number].probs)
        torch.testing.assert_close(torch.tensor(found), expected, atol=0.02, rtol=0.05)
    assert len(probs) == 3


def test_a_long_text_in_chunks_and_one_in_the_prefix_cache(source):
    text = "word " * 40
    whole = LLM(str(source.path), {"mood": classifier(source, 1)})
    chunked = LLM(
        str(source.path),
        {"mood": classifier(source, 1)},
        max_num_batched_tokens=32,
        max_num_seqs=2,
    )
    first = whole.classify(text, "mood")[0].probs
    before = whole.engine.metrics.num_cached_tokens
    again = whole.classify(text, "mood")[0].probs
    assert whole.engine.metrics.num_cached_tokens > before
    [parts] = chunked.classify(text, "mood")
    for other in (again, parts.probs):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(first), atol=1e-5, rtol=1e-4)


def test_a_replaced_classifier_answers_with_its_new_labels(source, tmp_path):
    llm = LLM(str(source.path), {"mood": classifier(source, 1)})
    assert llm.classify("a", "mood")[0].labels == LABELS
    save_adapter(classifier(source, 2, ("no", "yes")), tmp_path)
    llm.load_adapter("mood", tmp_path, replace=True)
    assert llm.classify("a", "mood")[0].labels == ("no", "yes")


def test_the_wrong_task_is_refused(source):
    llm = LLM(str(source.path), {"mood": classifier(source, 1), "talk": random_adapter(source, 3)})
    with pytest.raises(RequestError, match="'mood' is a classifier; ask it through /v1/classify"):
        llm.generate("a", adapters="mood")
    with pytest.raises(RequestError, match="'talk' is not a classifier"):
        llm.classify("a", "talk")
    with pytest.raises(RequestError, match="the base is not a classifier"):
        llm.classify("a", None)
    with pytest.raises(AdapterError, match="'mood' is a classifier, which cannot be mixed"):
        llm.generate("a", adapters={"mood": 0.5, "talk": 0.5})
    assert not llm.engine.has_unfinished


def test_a_head_that_overflows_fails_its_request_alone(source):
    wild = classifier(source, 1)
    wild = make_adapter(wild.config, wild.modules, wild.head * 1e38)
    llm = LLM(str(source.path), {"wild": wild, "mood": classifier(source, 1)})
    with pytest.raises(Exception, match="non-finite"):
        llm.classify(TEXTS, "wild")
    assert len(llm.classify(TEXTS, "mood")) == 3


# --- out of the house -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_checkpoint_is_transformers_own_classifier(family, tmp_path):
    source = save_tiny_model(tmp_path / "tiny", family)
    adapter = classifier(source, 1)
    save_adapter(adapter, tmp_path / "mood")
    export_merged(source, tmp_path / "mood", tmp_path / "out")
    llm = LLM(str(source.path), {"mood": adapter})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        probs = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.softmax(1)
    for found, output in zip(probs, llm.classify(TEXTS, "mood"), strict=True):
        torch.testing.assert_close(found, torch.tensor(output.probs), atol=1e-4, rtol=1e-3)


def test_shira_has_no_place_for_a_head(source, tmp_path):
    save_adapter(classifier(source, 1), tmp_path / "mood")
    with pytest.raises(AdapterError, match="'mood' is a classifier; PEFT's SHiRA has no head"):
        export_shira(source, tmp_path / "mood", tmp_path / "out")


def test_the_commands_that_show_and_ask(source, tmp_path):
    save_adapter(classifier(source, 1), tmp_path / "mood")
    shown = run("inspect", tmp_path / "mood")
    assert "SEQ_CLS" in shown.stdout
    assert "bad, fair, good" in shown.stdout
    said = run("classify", source.path, "--adapter", tmp_path / "mood", *TEXTS)
    assert said.exit_code == 0, said.stderr
    expected = LLM(str(source.path), {"mood": tmp_path / "mood"}).classify(TEXTS, "mood")
    lines = [line.split("\t") for line in said.stdout.splitlines()]
    assert [line[0] for line in lines] == [output.label for output in expected]
    assert [line[1:] for line in lines] == [
        [f"{label}={share:.4f}" for label, share in zip(LABELS, output.probs, strict=True)]
        for output in expected
    ]
    card = model_card(load_adapter(tmp_path / "mood").config, "mood")
    assert "- task: classification, labels `bad, fair, good`" in card
    assert "neuroada classify" in card
    assert "/v1/classify" in card


# --- scores ---------------------------------------------------------------------------------------


def test_eval_gives_glues_figures(source, tmp_path):
    adapter = classifier(source, 1)
    save_adapter(adapter, tmp_path / "mood")
    llm = LLM(str(source.path), {"mood": adapter})
    texts = [f"text {n}" for n in range(30)]
    outputs = llm.classify(texts, "mood")
    rows = [
        {"text": text, "label": output.label if n % 3 else "fair"}
        for n, (text, output) in enumerate(zip(texts, outputs, strict=True))
    ]
    right = sum(r["label"] == o.label for r, o in zip(rows, outputs, strict=True))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "eval", source.path, "--data", data, "--adapter", tmp_path / "mood"
    scored = run(*flags, "--save", "--json", "--out", tmp_path / "scores.json")
    assert scored.exit_code == 0, scored.stderr
    assert "scoring" not in scored.stderr  # a bar is for a terminal
    found = json.loads(scored.stdout)
    assert found["metrics"] == ["loss", "accuracy", "macro_f1", "matthews"]
    assert found["accuracy"] == pytest.approx(right / 30)
    assert -1 <= found["matthews"] <= 1
    losses = [
        -math.log(o.probs[LABELS.index(r["label"])]) for r, o in zip(rows, outputs, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(losses) / 30, rel=1e-3)
    saved = json.loads((tmp_path / "mood" / CONFIG_FILE).read_text())["metadata"]
    assert saved["scores"]["evaluated"]["rows.jsonl"]["adapter"].keys() == set(found["metrics"])
    assert (tmp_path / "scores.confusion-mood-accuracy.png").exists()
    assert "loss per row" in run(*flags).stdout  # a class is no text of tokens

    save_adapter(random_adapter(source, 2), tmp_path / "talk")
    for more, fault in (
        (["--adapter", tmp_path / "talk"], "mood is a classifier and talk is not"),
        (["--metric", "f1"], "--metric is for answers in text; mood is a classifier"),
        (["--choices", "bad,good"], "--choices is for answers in text"),
    ):
        refused = run(*flags, *more)
        assert refused.exit_code == 2
        assert fault in refused.stderr
    data.write_text('{"text": "a", "label": "odd"}\n')
    refused = run(*flags)
    assert "rows.jsonl line 1: label 'odd' is none of bad, fair, good" in refused.stderr
