"""Data sets of the hub. It cannot be reached from a test; a folder is read by the same code."""

import json
import sys

import datasets
import pytest
from test_cli import run
from test_train import make_base

from neuroada_serve.errors import DataError, UsageError
from neuroada_serve.train.hub import save_hub_rows


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "picture": datasets.Image(),
        "day": datasets.Value("date32"),
    }
    for split, texts in (("train", ["a", "b", "é"]), ("test", ["c"])):
        columns = {
            "text": texts,
            "label": [0, 1, -1][: len(texts)],
            "picture": [None] * len(texts),
            "day": [None] * len(texts),
        }
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        made.to_parquet(tmp_path / "reviews" / "data" / f"{split}-00000-of-00001.parquet")
    return f"hub:{tmp_path / 'reviews'}"


def test_rows_have_their_labels_names(data_set, tmp_path):
    path = save_hub_rows(data_set, tmp_path)
    assert path.name == "reviews-train.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == [
        ("a", "bad"),
        ("b", "good"),
        ("é", None),
    ]
    assert "picture" not in rows[0]
    assert len(save_hub_rows(f"{data_set}:default@test", tmp_path).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("behind", "fault"),
    [("@dev", "dev.*train"), (":other", "other.*default"), ("/none", "none")],
)
def test_what_is_not_there_is_told(data_set, tmp_path, behind, fault):
    with pytest.raises(DataError, match=fault):
        save_hub_rows(data_set + behind, tmp_path)


def test_what_is_not_written_so_or_not_installed_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is not written hub:OWNER/NAME:CONFIG@SPLIT"):
        save_hub_rows("hub:", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install \"neuroada-serve\[hub\]\""):
        save_hub_rows("hub:a/b", tmp_path)


def test_training_and_scoring_take_them(data_set, tmp_path):
    make_base(tmp_path / "tiny", "llama")
    checked = run(
        "train", tmp_path / "tiny", "--data", data_set + "@test", "--out", tmp_path / "a",
        "--eval-data", data_set + "@test", "--check",
    )  # fmt: skip
    assert checked.exit_code == 2
    assert "held-out rows must not be trained on" in checked.stderr
    scored = run("eval", tmp_path / "tiny", "--data", data_set + "@test", "--json")
    assert scored.exit_code == 0, scored.stderr
