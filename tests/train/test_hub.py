"""Data sets of the hub. It cannot be reached from a test; a folder is read by the same code."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.train.hub import open_hub_rows
from tests.support.command import run
from tests.support.training import make_base


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "picture": datasets.Image(),
        "day": datasets.Value("date32"),
        "turns": datasets.List({"tone": datasets.ClassLabel(names=["calm", "loud"])}),
    }
    for split, texts in (("train", ["a", "b", "é"]), ("test", ["c"])):
        columns = {
            "text": texts,
            "label": [0, 1, -1][: len(texts)],
            "picture": [None] * len(texts),
            "day": [None] * len(texts),
            "turns": [[{"tone": 1}, {"tone": 0}], None, []][: len(texts)],
        }
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        made.to_parquet(tmp_path / "reviews" / "data" / f"{split}-00000-of-00001.parquet")
    return f"hub:{tmp_path / 'reviews'}"


def test_labels_become_names_at_any_depth(data_set):
    found = open_hub_rows(data_set)
    assert found.name == f"{data_set.removeprefix('hub:')}@train"
    assert found.classes == {"label": ("bad", "good")}
    numbers, rows = zip(*found.records(), strict=True)
    assert numbers == (1, 2, 3)
    assert [(row["text"], row["label"]) for row in rows] == [
        ("a", "bad"),
        ("b", "good"),
        ("é", None),
    ]
    assert [row["turns"] for row in rows] == [[{"tone": "loud"}, {"tone": "calm"}], None, []]
    assert "picture" not in rows[0]


@pytest.mark.parametrize(
    ("behind", "texts"),
    [("@test", "c"), (":default@test", "c"), ("@train[1:]", "bé"), ("@train[:1]+test", "ac")],
)
def test_splits_are_named_as_in_datasets(data_set, behind, texts):
    found = open_hub_rows(data_set + behind)
    assert "".join(row["text"] for _, row in found.records()) == texts
    assert found.name.endswith(behind)


@pytest.mark.parametrize(
    ("behind", "fault"),
    [("@dev", "dev.*train"), (":other", "other.*default"), ("/none", "none.*OWNER/NAME")],
)
def test_what_is_not_there_is_told(data_set, behind, fault):
    with pytest.raises(DataError, match=fault):
        open_hub_rows(data_set + behind)


def test_a_hub_out_of_reach_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="no route; the hub is out of reach"):
        open_hub_rows("hub:a/b")


def test_a_folder_that_hides_a_set_is_refused(data_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="would be read instead"):
        open_hub_rows("hub:reviews")


def test_what_is_not_written_so_or_not_installed_is_told(monkeypatch):
    with pytest.raises(UsageError, match="must be written hub:OWNER/NAME:CONFIG@SPLIT"):
        open_hub_rows("hub:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install \"neuroada-serve\[hub\]\""):
        open_hub_rows("hub:a/b")


def test_training_and_scoring_name_the_set_and_the_row(data_set, tmp_path):
    make_base(tmp_path / "tiny", "llama")
    one_row = data_set + "@test"
    train = "train", tmp_path / "tiny", "--out", tmp_path / "a"
    same = run(*train, "--data", one_row, "--eval-data", one_row, "--check")
    assert same.exit_code == 2
    assert f"of {one_row} are in {one_row} too, the first in row 1; held-out rows" in same.stderr
    no_label = run(*train, "--data", data_set, "--check")
    assert "1 row left out with an empty label (row 3)" in no_label.stderr
    assert "columns not used: day, turns" in no_label.stderr

    labelled = data_set + "@train[:2]"
    trained = run(*train, "--data", labelled, "--eval-data", one_row, "--epochs", "1", "--k", "1")
    assert trained.exit_code == 0, trained.stderr
    for split in (labelled, one_row):
        scored = run(
            "eval", tmp_path / "tiny", "--data", split, "--adapter", tmp_path / "a", "--save"
        )
        assert scored.exit_code == 0, scored.stderr
    metadata = json.loads(Path(tmp_path / "a" / "adapter_config.json").read_text())["metadata"]
    names = [split.removeprefix("hub:") for split in (labelled, one_row)]
    assert [metadata["recipe"]["data"], metadata["recipe"]["heldout"]] == names
    assert sorted(metadata["scores"]["evaluated"]) == sorted(names)
