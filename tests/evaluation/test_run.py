"""neuroada eval on tiny models: what is asked, what is scored, what is left behind."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from neuroada_serve import LLM, save_adapter
from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from neuroada_serve.adapters.reader import load_adapter
from neuroada_serve.cli.main import app
from neuroada_serve.errors import AdapterError, DataError, UsageError
from neuroada_serve.evaluation import report
from neuroada_serve.evaluation.questions import read_questions
from neuroada_serve.evaluation.run import EvalSettings, default_metrics, evaluate
from neuroada_serve.train.examples import encode_row
from tests.support.tiny import plain_merged, random_adapter, save_tiny_model

BOOLQ = [
    {
        "instruction": f"Is {n} even?\n\nAnswer format: true/false",
        "input": "",
        "output": f"the correct answer is {'false' if n % 2 else 'true'}",
        "answer": "false" if n % 2 else "true",
    }
    for n in range(4)
]
MATH = [
    {"instruction": f"{n} and 1?", "input": "", "output": f"so {n + 1}", "answer": f"{n + 1}.0"}
    for n in range(4)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(source):
    adapters = {"fr": random_adapter(source, seed=1), "de": random_adapter(source, seed=2)}
    return LLM(str(source.path), adapters)


@pytest.fixture
def folder(source, tmp_path):
    save_adapter(random_adapter(source, seed=1), tmp_path / "fr")
    return tmp_path / "fr"


@pytest.fixture
def write(tmp_path):
    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def score(llm, path, *adapters, **settings):
    return evaluate(llm, path, adapters or (None,), EvalSettings(**settings))


def fake_answers(llm, monkeypatch, text):
    """Let greedy answers be `text`; likelihoods are the model's own."""
    true = type(llm).generate

    def generate(self, prompts, params, adapters, **others):
        outputs = true(self, prompts, params, adapters, **others)
        if params[0].prompt_logprobs is None:
            for output in outputs:
                object.__setattr__(output.outputs[0], "text", text)
        return outputs

    monkeypatch.setattr(type(llm), "generate", generate)


# --- questions ---------------------------------------------------------------------------------


def test_rows_of_the_paper_are_recognised(write):
    first, second, *_ = read_questions(write(BOOLQ))
    assert (first.right, second.right) == ("true", "false")
    assert first.labelled
    assert first.options == ("true", "false")
    assert first.lead == first.trigger == "the correct answer is "


def test_rows_in_a_gz_file_bring_their_choices(write):
    """As far as the reader of rows takes such files."""
    path = write([{"prompt": "q", "completion": "b", "choices": ["a", "b"]}])
    (question,) = read_questions(path)
    assert question.options == ("a", "b")
    assert not question.labelled
    path.write_bytes(gzip.compress(path.read_bytes()))
    try:
        (again,) = read_questions(path)
    except DataError:
        pytest.skip("the reader of rows takes no .gz files yet")
    assert again == question


def test_options_of_one_row_are_not_anothers(write):
    rows = [*BOOLQ, BOOLQ[0] | {"instruction": "Which?\n\nAnswer format: true/false/both"}]
    assert [len(q.options) for q in read_questions(write(rows))] == [2, 2, 2, 2, 3]


def test_other_keys_of_rows_without_an_output_mean_nothing(write):
    (question,) = read_questions(write([{"prompt": "q", "completion": "b", "answer": "x"}]))
    assert (question.right, question.labelled, question.options) == ("b", False, ())


def test_answer_key_and_trigger_can_be_named(write):
    path = write([{"prompt": "q", "completion": "so: B", "gold": 2}])
    assert read_questions(path, answer_key="gold")[0].right == "2"
    assert read_questions(path, trigger="so:")[0].right == "B"
    with pytest.raises(DataError, match="no row has the key 'best'"):
        read_questions(path, answer_key="best")


def test_few_distinct_answers_are_options_and_many_are_not(write):
    few = [{"prompt": f"q{i}", "completion": "ab"[i % 2]} for i in range(4)]
    assert read_questions(write(few))[0].options == ("a", "b")
    many = [{"prompt": f"q{i}", "completion": f"{i}"} for i in range(60)]
    assert read_questions(write(many))[0].options == ()
    assert read_questions(write(many[:3]))[0].options == ()  # three rows, three answers


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["a", ""], "line 1: one of the choices is empty"),
        (["a", "a "], "line 1: .* name one twice"),
        (["b", "c"], "line 1: the answer 'a' is none of the choices"),
        (["a"], "line 1: choices must be two or more"),
        ("ab", "line 1: choices must be a list of texts"),
        ([1, 2], "line 1: choices must be a list of texts"),
    ],
)
def test_choices_at_fault_are_refused_by_line(write, choices, message):
    path = write([{"prompt": "q", "completion": "a", "choices": choices}])
    with pytest.raises(DataError, match=message):
        read_questions(path)


def test_metrics_follow_the_data(write):
    def chosen(rows):
        return default_metrics(read_questions(write(rows)))

    assert chosen(BOOLQ) == ("loss", "exact_match", "choice_likelihood")
    assert chosen(MATH) == ("loss", "number")
    plain = {"prompt": "a", "completion": "b"}
    assert chosen([plain, plain | {"completion": "c"}] * 3) == ("loss", "exact_match")
    assert chosen([plain | {"choices": ["b", "c"]}])[-1] == "choice_likelihood"


# --- scores ------------------------------------------------------------------------------------


@torch.no_grad()
def test_options_have_the_likelihoods_of_a_plain_forward(llm, source, write):
    (row, *_), base = BOOLQ, llm.engine.base
    found = score(llm, write([row, row]), metrics=("choice_likelihood",), choices=("true", "false"))
    said, model = found.results[0].predictions[0], plain_merged(source, None)
    for option, (total, mean) in said.loglikelihoods.items():
        answer = replace(said.question.row, answer=f"the correct answer is {option}")
        example = encode_row(base, answer, "chat")
        ids = [*example.prompt_ids, *example.answer_ids]
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        # One token a byte: what differs are the option's bytes and the end token.
        compared = range(len(ids) - len(option) - 1, len(ids))
        assert total == pytest.approx(
            sum(logprobs[i - 1, ids[i]].item() for i in compared), abs=1e-3
        )
        assert mean == pytest.approx(total / len(compared))


def test_an_option_is_no_likelier_for_being_anothers_beginning(llm, write):
    path = write([{"prompt": "q", "completion": "ab", "choices": ["a", "ab"]}])
    (said,) = score(llm, path, metrics=("choice_likelihood",)).results[0].predictions
    (a, _), (ab, mean) = said.loglikelihoods["a"], said.loglikelihoods["ab"]
    assert mean == pytest.approx(ab / 2)  # "b" and the end token
    assert math.exp(a) + math.exp(ab) < 1  # they exclude each other


def test_right_answer_is_asked_once_for_loss_and_likelihood(llm, write):
    found = score(llm, write(BOOLQ), metrics=("loss", "choice_likelihood"))
    said = found.results[0].predictions[0]
    alone = score(llm, write(BOOLQ), metrics=("loss",)).results[0].predictions[0]
    assert said.loss == pytest.approx(alone.loss, abs=1e-4)


def test_an_option_that_ends_as_another_goes_on_is_compared_too(llm, write):
    path = write([{"prompt": "q", "completion": "a", "choices": ["a", "a</s>"]}])
    (said,) = score(llm, path, metrics=("choice_likelihood",)).results[0].predictions
    assert all(total < 0 for total, _ in said.loglikelihoods.values())


def test_each_metric_judges_the_generated_text(llm, write, monkeypatch):
    fake_answers(llm, monkeypatch, "I say: the correct answer is true, not false")
    found = score(llm, write(BOOLQ), metrics=("exact_match", "choice_generation", "f1"))
    scores = found.results[0].scores
    assert scores["exact_match"].value == 0
    assert scores["choice_generation"].value == 0.5
    assert scores["f1"].value == pytest.approx(0.5)
    assert scores["choice_generation_macro_f1"].value == pytest.approx(1 / 3)
    assert found.results[0].confusions["choice_generation"].labels == ("false", "true")
    assert found.results[0].confusions["choice_generation"].counts == ((0, 2, 0), (0, 2, 0))
    last = score(llm, write(BOOLQ), metrics=("choice_generation",), pick="last")
    assert last.results[0].confusions["choice_generation"].counts == ((2, 0, 0), (2, 0, 0))


def test_number_metric_takes_the_last_number(llm, write, monkeypatch):
    fake_answers(llm, monkeypatch, "1 + 1 is $2.00.")
    found = score(llm, write(MATH), metrics=("number",), max_tokens=3)
    (result,) = found.results
    assert [said.points["number"] for said in result.predictions] == [0, 1, 0, 0]
    assert result.scores["number"].value == 0.25
    assert result.scores["number"].low < 0.25 < result.scores["number"].high


def test_exact_match_reads_behind_the_trigger(llm, write, monkeypatch):
    fake_answers(llm, monkeypatch, "Well, the correct answer is true ")
    assert score(llm, write(BOOLQ), metrics=("exact_match",)).results[0].scores[
        "exact_match"
    ].value == pytest.approx(0.5)


def test_adapters_in_one_run_score_as_alone(llm, write):
    path = write(BOOLQ)
    together = score(llm, path, None, "fr", "de")
    for adapter, result in zip((None, "fr", "de"), together.results, strict=True):
        alone = score(llm, path, adapter).results[0]
        assert result.scores.keys() == alone.scores.keys()
        for name, figure in result.scores.items():
            assert figure.value == pytest.approx(alone.scores[name].value, abs=1e-4), name
        assert [p.text for p in result.predictions] == [p.text for p in alone.predictions]
        assert (result.digest is None) == (adapter is None)
    assert together.results[0].scores["loss"] != together.results[1].scores["loss"]


def test_columns_have_names_of_the_datas_own(llm, write):
    rows = [{"prompt": f"{n}?", "completion": "yes"} for n in range(4)]
    renamed = [{"question": row["prompt"], "reply": row["completion"]} for row in rows]
    columns = {"prompt": "question", "completion": "reply"}
    found = score(llm, write(renamed), columns=columns, metrics=("loss",)).results[0]
    assert found.scores == score(llm, write(rows), metrics=("loss",)).results[0].scores


def test_many_rows_are_scored_in_parts(llm, write, monkeypatch):
    path = write(BOOLQ)
    whole = score(llm, path)
    monkeypatch.setattr("neuroada_serve.evaluation.run._ROWS_AT_ONCE", 3)
    parts = score(llm, path)
    assert parts.results[0].scores["loss"].value == pytest.approx(
        whole.results[0].scores["loss"].value, abs=1e-4
    )
    assert all(p.text is not None and p.loglikelihoods for p in parts.results[0].predictions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("blue",)}, "no metric 'blue'; there are loss"),
        ({"metrics": ()}, "name a metric"),
        ({"pick": "middle"}, "pick must be one of first, last, got .middle."),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        EvalSettings(**settings)


@pytest.mark.parametrize(
    ("row", "metric", "message"),
    [
        ({"prompt": "q", "completion": "b"}, "choice_likelihood", "line 1 has no options"),
        ({"prompt": "q", "completion": "b"}, "number", "line 1: the answer 'b' has no number"),
        ({"prompt": "q" * 300, "completion": "b"}, "loss", "line 1: prompt and answer have"),
    ],
)
def test_rows_that_a_metric_cannot_score_are_refused_by_line(llm, write, row, metric, message):
    with pytest.raises(DataError, match=message):
        score(llm, write([row]), metrics=(metric,))


# --- what is left behind -----------------------------------------------------------------------


def test_command_writes_scores_predictions_and_plots(source, folder, write, tmp_path):
    out = tmp_path / "results.json"
    flags = ["--adapter", folder, "--adapter", f"again={folder}", "--limit", 3, "--out", out]
    result = run("eval", source.path, "--data", write(BOOLQ), *flags)
    assert result.exit_code == 0, result.output
    assert "choice likelihood" in result.stdout
    found = json.loads(out.read_text())
    assert list(found["scores"]) == ["base", "fr", "again"]
    assert found["scores"]["fr"] == found["scores"]["again"] != found["scores"]["base"]
    assert found["scores"]["fr"]["exact_match"].keys() == {
        "value", "low", "high", "rows", "interval"
    }  # fmt: skip
    lines = (tmp_path / "results.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2, 3] * 3
    assert {"text", "chosen", "loglikelihoods", "points"} <= json.loads(lines[0]).keys()
    plots = sorted(path.name for path in tmp_path.glob("results.*.png"))
    assert "results.scores.png" in plots
    assert "results.confusion-fr-choice_likelihood.png" in plots
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_no_base_and_metrics_on_the_command_line(source, folder, write):
    flags = ["--adapter", folder, "--no-base", "--metric", "f1", "--metric", "loss", "--json"]
    result = run("eval", source.path, "--data", write(BOOLQ), *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["scores"]) == ["fr"]
    assert set(found["scores"]["fr"]) == {"loss", "f1"}
    assert found["loss"] == found["scores"]["fr"]["loss"]["value"]


def test_save_puts_scores_into_config_and_card_and_leaves_the_weights(source, folder, write):
    weights, before = (folder / WEIGHTS_FILE).read_bytes(), load_adapter(folder)
    path = write(BOOLQ)
    for _ in range(2):
        result = run("eval", source.path, "--data", path, "--adapter", folder, "--save")
        assert result.exit_code == 0, result.output
    after = load_adapter(folder)
    assert (folder / WEIGHTS_FILE).read_bytes() == weights
    assert after.digest == before.digest
    saved = after.config.metadata["scores"]["evaluated"]["rows.jsonl"]
    assert saved["rows"] == 4
    assert saved["adapter"]["loss"]["value"] != saved["base"]["loss"]["value"]
    card = (folder / "README.md").read_text()
    assert "| rows.jsonl | 4 | choice likelihood |" in card


def test_save_keeps_other_metadata(llm, folder, write):
    config = json.loads((folder / CONFIG_FILE).read_text())
    old = {"recipe": {"lr": 1}, "scores": {"heldout_rows": 3}}
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"metadata": old}))
    path = write(BOOLQ)
    report.save_scores(folder, score(llm, path, "fr").results[0], None, path, print)
    metadata = load_adapter(folder).config.metadata
    assert metadata["recipe"] == {"lr": 1}
    assert metadata["scores"]["heldout_rows"] == 3
    assert "base" not in metadata["scores"]["evaluated"]["rows.jsonl"]


def test_save_refuses_an_adapter_that_has_changed(llm, source, folder, write):
    path = write(BOOLQ)
    result = score(llm, path, "fr").results[0]
    save_adapter(random_adapter(source, seed=9), folder)
    before = (folder / CONFIG_FILE).read_bytes()
    with pytest.raises(AdapterError, match="has changed since it was scored"):
        report.save_scores(folder, result, None, path, print)
    assert (folder / CONFIG_FILE).read_bytes() == before


def test_save_refuses_scores_of_another_make(llm, folder, write):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"metadata": {"scores": "good"}}))
    path = write(BOOLQ)
    with pytest.raises(AdapterError, match="of another make"):
        report.save_scores(folder, score(llm, path, "fr").results[0], None, path, print)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--save"], "--adapter"),
        (["--no-base"], "leaves nothing"),
        (["--metric", "blue"], "no metric"),
        (["--pick", "middle"], "pick"),
        (["--out", "results.txt"], ".json"),
        (["--out", "/dev/null/results.json"], "/dev/null is no folder"),
        (["--adapter", "FOLDER", "--adapter", "FOLDER"], "two adapters are called 'fr'"),
        (["--adapter", "base=FOLDER"], "no adapter can be called 'base'"),
        (["--adapter", "a/b=FOLDER"], "NAME of letters"),
        (["--choices", "true"], "two or more"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(source, folder, write, flags, word):
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    result = run("eval", source.path, "--data", write(BOOLQ), *flags)
    assert result.exit_code == 2
    assert word in result.stderr


def test_how_the_rows_were_read_is_told(source, write):
    rows = [*BOOLQ, {**BOOLQ[0], "output": ""}]
    result = run("eval", source.path, "--data", write(rows), "--limit", 1, "--json")
    assert "rows.jsonl: 1 row left out with an empty output (line" in result.stderr
    assert "not used" not in result.stderr
    assert json.loads(result.stdout)["rows"] == 1


def test_no_bar_in_a_log(source, write):
    result = run("eval", source.path, "--data", write(BOOLQ), "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "scoring" not in result.stderr
    assert "\n\n" not in result.stderr
