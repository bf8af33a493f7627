"""Tasks: what each decodes, says of itself, and refuses."""

import json

import pytest
import torch

from neuroada_serve.tasks import (
    GENERATE,
    TASKS,
    CardCase,
    Classify,
    Generate,
    Regress,
    noun_of,
    task_faults,
    task_of,
)

EACH = [GENERATE, Classify(("bad", "fair", "good")), Regress(("stars",))]


def test_labels_decide_between_classes_and_a_number():
    assert task_of("CAUSAL_LM", ()) == GENERATE
    assert task_of("SEQ_CLS", ["a", "b"]) == Classify(("a", "b"))
    assert task_of("SEQ_CLS", ["a"]) == Regress(("a",))


def test_every_task_is_listed_and_found_by_its_type():
    assert [type(task) for task in EACH] == list(TASKS)
    for task in EACH:
        assert task_of(task.task_type, task.labels) == task
        assert task_faults(task.task_type, task.labels) == []


@pytest.mark.parametrize(
    ("task_type", "labels", "fault"),
    [
        ("TOKEN_CLS", [], "task_type is 'TOKEN_CLS'; CAUSAL_LM and SEQ_CLS are served"),
        ("CAUSAL_LM", ["a"], "labels are for task_type SEQ_CLS"),
        ("SEQ_CLS", [], "there are 0 labels, SEQ_CLS takes 1 to 1000"),
        ("SEQ_CLS", ["a"] * 1001, "there are 1001 labels"),
        ("SEQ_CLS", [" "], "labels must be non-empty strings"),
        ("SEQ_CLS", ["a", 1], "labels must be non-empty strings"),
        ("SEQ_CLS", ["a", "b", "a"], "labels lists one twice"),
    ],
)
def test_a_config_with_a_wrong_task_is_told(task_type, labels, fault):
    [told] = task_faults(task_type, labels)
    assert told.startswith(fault)


def test_a_classifier_decodes_logits_to_their_softmax():
    logits = [1000.0, 998.5, -1000.0]
    expected = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    task = Classify(("bad", "fair", "good"))
    assert task.decode(logits) == pytest.approx(expected, abs=1e-15)
    assert task.reply([0.2, 0.5, 0.3]) == {
        "label": "fair",
        "probs": [0.2, 0.5, 0.3],
        "num_classes": 3,
    }


def test_a_regression_decodes_to_the_number_itself():
    task = Regress(("stars",))
    assert task.decode([-3.25]) == (-3.25,)
    assert task.reply([-3.25]) == {"label": "stars", "probs": [-3.25], "num_classes": 1}


def test_only_what_pools_brings_a_head_or_values():
    for task in EACH:
        assert task.pools == bool(task.head_rows) == bool(task.decode([1.0] * task.head_rows))


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("task", EACH)
def test_a_cards_commands_are_of_the_task(task, is_plain):
    case = CardCase("demo --adapter a=./a", "'a text'", '"a"', '"a text"', is_plain)
    usage = task.usage(case)
    assert usage.command.startswith("neuroada ")
    assert "a text" in json.loads(f"{{{usage.fields}}}").get("input", usage.fields)
    compile(f"{usage.params}[answer] = {usage.call}", "card", "exec")
    if task.pools:
        assert usage.command.startswith(task.command)
        assert f"/v1/{usage.route}" == task.route


def test_messages_name_what_was_asked_for():
    assert noun_of("generate") == Generate.noun
    assert noun_of("classify") == "classifier"
