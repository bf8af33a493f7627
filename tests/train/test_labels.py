"""Labels as names, and their order."""

import pytest

from neuroada_serve.config import TrainConfig
from neuroada_serve.evaluation.questions import read_questions
from neuroada_serve.train.data import load_data
from neuroada_serve.train.labels import clean_labels, sorted_labels
from tests.support.rows import write
from tests.support.training import make_base


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (map(str, range(12)), [str(n) for n in range(12)]),
        (["10", "9.5", "-1", "9"], ["-1", "9", "9.5", "10"]),
        (["b", "a", "a"], ["a", "b"]),
        (["10", "2", "x"], ["10", "2", "x"]),
        (["inf", "2", "10"], ["10", "2", "inf"]),
        (["nan", "1"], ["1", "nan"]),
    ],
)
def test_numbers_are_ordered_by_value_and_names_as_texts(labels, expected):
    assert sorted_labels(labels) == expected


@pytest.mark.parametrize(
    ("labels", "expected", "notes"),
    [
        (["a ", "a"], ["a", "a"], ["spaces around 1 label left out"]),
        (["1.0", "2", "3.00"], ["1", "2", "3"], ["labels such as 1.0 read as 1"]),
        (["1.0", "1.5"], ["1.0", "1.5"], []),
        (["v1.0", "1.0"], ["v1.0", "1.0"], []),
        (["No", "NO", "yes"], ["No", "NO", "yes"], ["labels 'NO' and 'No' differ in case alone"]),
        ([], [], []),
    ],
)
def test_one_label_written_in_two_ways_is_one(labels, expected, notes):
    assert clean_labels(labels) == (expected, notes)


def test_the_classes_of_training_and_scoring_are_in_their_order(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    rows = [{"text": f"t{n}", "label": n % 12} for n in range(48)]
    path = write(tmp_path, *rows)
    loaded = load_data(base, path, TrainConfig(task_type="SEQ_CLS", prompt_format="plain"))
    assert loaded.task.labels == tuple(str(n) for n in range(12))
    assert read_questions(path)[0].options == loaded.task.labels


def test_answers_of_a_classifier_are_labels_in_every_shape(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    answers = [" pos", "pos", "neg"]
    path = write(tmp_path, *[{"prompt": f"p{a}", "completion": a} for a in answers])
    loaded = load_data(base, path, TrainConfig(task_type="SEQ_CLS", eval_fraction=0))
    assert loaded.report.answers == "2 classes: neg 1, pos 2"
    assert "spaces around 1 label left out" in str(loaded.report)


def test_labels_that_a_classifier_has_stay_as_it_has_them():
    assert clean_labels([" 1.0", "2.0"], ["1.0", "2.5"]) == (
        ["1.0", "2.0"],
        ["spaces around 1 label left out"],
    )
