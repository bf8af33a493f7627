"""Figures beside a run's scores: the commonest answer's score, and a few answers to read."""

import json

import pytest
from typer.testing import CliRunner

from neuroada_serve.cli.main import app
from neuroada_serve.config import TrainConfig
from neuroada_serve.train.data import load_data
from neuroada_serve.train.samples import baseline_of, samples_of
from neuroada_serve.train.trainer import LOG_FILE, train_adapter
from tests.support.training import make_base, write_rows

CONFIG = TrainConfig(k=1, max_steps=2, batch_size=4, eval_fraction=0.25)
ROWS = [{"prompt": f"{n}?", "completion": "n" if n % 4 else "y"} for n in range(24)]


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_the_commonest_answer_has_its_share_of_the_heldout_rows(base, rows):
    data = load_data(base, rows, CONFIG)
    baseline = baseline_of(base, data)
    heldout = [base.tokenizer.decode(e.answer_ids, skip_special_tokens=True) for e in data.heldout]
    assert (baseline.answer, baseline.figure) == ("n", heldout.count("n") / len(heldout))


def test_answers_that_are_all_different_have_no_baseline(base, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(24)]
    data = load_data(base, write_rows(tmp_path / "rows.jsonl", rows), CONFIG)
    assert baseline_of(base, data) is None


def test_a_regressions_baseline_is_the_mean(base, tmp_path):
    rows = [{"text": f"row {n}", "label": n} for n in range(8)]
    config = TrainConfig(k=1, task_type="SEQ_CLS", labels=("score",), eval_fraction=0.25)
    data = load_data(base, write_rows(tmp_path / "rows.jsonl", rows), config)
    mean = sum(e.target for e in data.train) / 6
    loss = sum((e.target - mean) ** 2 for e in data.heldout) / 2
    baseline = baseline_of(base, data)
    assert (baseline.answer, baseline.figure) == (f"{mean:.4g}", None)
    assert baseline.loss == pytest.approx(loss)


def test_samples_are_greedy_answers_of_rows_with_different_answers(base, rows):
    data = load_data(base, rows, CONFIG)
    samples = samples_of(base, data, 3)
    assert {sample.expected for sample in samples[:2]} == {"y", "n"}
    assert all(sample.question in {row["prompt"] for row in ROWS} for sample in samples)
    assert samples == samples_of(base, data, 3)


def test_both_stand_beside_the_scores(base, rows, tmp_path):
    report = train_adapter(base, rows, tmp_path / "out", CONFIG)
    metadata = report.adapter.config.metadata
    assert metadata["scores"]["baseline"] == {
        "answer": "n",
        "exact_match": report.baseline.figure,
    }
    assert [s["question"] for s in metadata["samples"]] == [s.question for s in report.samples]
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert sum("sample" in line for line in lines) == 3
    assert sum("baseline" in line for line in lines) == 1


def test_no_samples_are_kept_where_none_are_wanted(base, rows, tmp_path):
    config = TrainConfig(k=1, max_steps=2, eval_fraction=0.25, samples=0)
    report = train_adapter(base, rows, tmp_path / "out", config)
    assert report.samples == ()
    assert "samples" not in report.adapter.config.metadata


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_command_line_shows_them(base, tmp_path, task):
    rows = [{"text": f"row {n}", "label": "n" if n % 4 else "y"} for n in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    result = CliRunner().invoke(
        app,
        [
            *("train", str(tmp_path / "tiny"), "--data", str(data), "--task-type", task),
            *("--out", str(tmp_path / "out"), "--max-steps", "1", "--eval-fraction", "0.25"),
        ],
    )
    assert result.exit_code == 0, result.output
    for words in ("always 'n'", "expected", "got", "row "):
        assert words in result.output
