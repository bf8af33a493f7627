"""Objectives: what each takes from a row, its loss and its scores."""

import math

import pytest
import torch

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.tasks import GENERATE, TASKS, Classify, Regress
from neuroada_serve.train.batches import Predictions
from neuroada_serve.train.examples import Example
from neuroada_serve.train.objectives import (
    GiveNumber,
    PickLabel,
    WriteText,
    labels_to_read,
    objective_of,
)
from neuroada_serve.train.shapes import Row
from tests.support.training import make_base

LABELS = PickLabel(Classify(("bad", "good")))
NUMBER = GiveNumber(Regress(("stars",)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("objectives") / "tiny", "llama")


def row(answer, text="ab"):
    return Row(1, ({"role": "user", "content": text},), f"{text}\n", answer)


def test_every_task_has_an_objective(base):
    rows = [row("1"), row("2")]
    given = {"CAUSAL_LM": [()], "SEQ_CLS": [("1", "2"), ("stars",)]}
    found = [
        objective_of(base, "rows", rows, (), TrainConfig(task_type=task_type, labels=labels))
        for task_type, each in given.items()
        for labels in each
    ]
    assert [type(objective.task) for objective in found] == list(TASKS)


def test_labels_are_the_given_ones_else_the_datas_else_the_rows(base):
    rows = [row("2"), row("10")]
    config = TrainConfig(task_type="SEQ_CLS")
    assert objective_of(base, "rows", rows, (), config).task.labels == ("2", "10")
    assert objective_of(base, "rows", rows, ("10", "2"), config).task.labels == ("10", "2")
    named = TrainConfig(task_type="SEQ_CLS", labels=("2", "10", "3"))
    assert objective_of(base, "rows", rows, ("10", "2"), named).task.labels == ("2", "10", "3")
    with pytest.raises(DataError, match="all rows have the label '2'"):
        objective_of(base, "rows", rows[:1], (), config)


def test_only_tasks_with_labels_read_answers_as_labels():
    assert labels_to_read(GENERATE) is None
    assert labels_to_read(Classify(())) == ()
    assert labels_to_read(Regress(("stars",))) == ("stars",)


def test_a_row_becomes_what_the_task_learns(base):
    text = WriteText("plain").encode(base, row("ba"))
    assert len(text.answer_ids) == 3, "two letters and the end token"
    label, number = LABELS.encode(base, row("good")), NUMBER.encode(base, row("2.5"))
    assert (label.answer_ids, label.target) == ((1,), None)
    assert (number.answer_ids, number.target) == ((0,), 2.5)
    assert label.prompt_ids == number.prompt_ids == text.prompt_ids[: len(label.prompt_ids)]


@pytest.mark.parametrize(
    ("objective", "answer", "fault"),
    [
        (LABELS, "fair", "label 'fair' is none of bad, good"),
        (NUMBER, "many", "label 'many' is not a number"),
        (NUMBER, "inf", "label 'inf' is not a number"),
    ],
)
def test_a_row_without_what_the_task_learns_is_refused(base, objective, answer, fault):
    with pytest.raises(RequestError, match=fault):
        objective.encode(base, row(answer))


def test_labels_are_scored_by_cross_entropy_and_accuracy():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    found = Predictions(logits, torch.tensor([0, 0]), torch.ones(2, 1, dtype=torch.bool))
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))
    assert LABELS.loss(found).item() == pytest.approx(expected)
    assert LABELS.figure(LABELS.outcomes(found)) == 0.5


def test_numbers_are_scored_by_squares_and_correlation():
    true = torch.tensor([1.0, 2.0, 4.0])
    found = Predictions(2 * true[:, None] + 1, true, torch.ones(3, 1, dtype=torch.bool))
    assert NUMBER.loss(found).item() == pytest.approx(4 + 9 + 25)
    assert NUMBER.figure(NUMBER.outcomes(found)) == pytest.approx(1)


def test_the_clause_on_answers_counts_labels_and_spans_numbers():
    examples = [Example((1,), (int(i % 3 == 0),), i / 2) for i in range(7)]
    assert LABELS.describe(examples) == "2 classes: bad 4, good 3"
    assert NUMBER.describe(examples) == "labels from 0 to 3"
    assert WriteText().describe(examples) == ""


def test_constants_have_a_score(base):
    train = [Example((1,), (0,), 1.0), Example((2,), (0,), 2.0), Example((3,), (1,), 6.0)]
    heldout = [Example((4,), (0,), 1.0), Example((5,), (1,), 5.0)]
    assert LABELS.baseline(base, train, heldout).figure == 0.5
    assert LABELS.baseline(base, train, heldout).answer == "bad"
    assert NUMBER.baseline(base, train, heldout).loss == pytest.approx((4 + 4) / 2)
    assert WriteText().baseline(base, train, heldout).figure == 0.5
    assert WriteText().baseline(base, train[1:], heldout) is None
