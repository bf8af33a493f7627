"""Ctrl-C: what is kept, how to go on, and exit code 130."""

import os
import signal
import threading

import pytest
from typer.testing import CliRunner

from neuroada_serve.cli.main import app
from neuroada_serve.train import trainer
from neuroada_serve.train.interrupt import between_steps
from neuroada_serve.train.trainer import train_adapter
from tests.support.training import QUICK, ROWS, make_base, write_rows

run = CliRunner().invoke


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupting(told):
    """Presses Ctrl-C while the second step is told of."""

    def notify(sentence):
        told.append(sentence)
        if sentence.startswith("Step 2 "):
            ctrl_c()

    return notify


def test_the_step_under_way_is_kept_and_the_same_call_goes_on(base, rows, tmp_path):
    whole = train_adapter(base, rows, tmp_path / "whole", QUICK)
    told = []
    with pytest.raises(KeyboardInterrupt):
        train_adapter(base, rows, tmp_path / "out", QUICK, interrupting(told))
    assert "Stopping after this step; Ctrl-C again stops at once." in told
    told.clear()
    report = train_adapter(base, rows, tmp_path / "out", QUICK, told.append)
    assert any(sentence.startswith("Resuming from step 2,") for sentence in told)
    assert report.adapter.digest == whole.adapter.digest
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_time_stops_at_once():
    with between_steps(lambda sentence: None) as asked:
        assert not asked()
        ctrl_c()
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_handler_of_the_programs_own_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_steps(lambda sentence: None) as asked:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)
    entered = []

    def enter():
        with between_steps(lambda sentence: None):
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save-steps", "1"], "is kept in"),
        (["--save-steps", "0"], "nothing is kept, with --save-steps 0"),
    ],
)
def test_train_says_what_is_kept_and_how_to_go_on(base, rows, tmp_path, monkeypatch, flags, words):
    def interrupted(*args, notify, **options):
        train_adapter(*args, notify=interrupting([]), **options)

    monkeypatch.setattr(trainer, "train_adapter", interrupted)
    common = ("--data", str(rows), "--out", str(tmp_path / "out"), "--max-steps", "4")
    result = run(app, ["train", str(tmp_path / "tiny"), *common, *flags])
    assert result.exit_code == 130
    assert words in result.stderr
    assert "same command" in result.stderr


def test_eval_says_that_nothing_was_written(base, rows, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuroada_serve.evaluation.tasks.evaluate", interrupted)
    result = run(app, ["eval", str(tmp_path / "tiny"), "--data", str(rows)])
    assert result.exit_code == 130
    assert "Interrupted; no scores were written." in result.stderr


# --- refused before the work -------------------------------------------------------------------


def never(*args, **options):
    raise AssertionError("the model is loaded before it is known that the result can be written")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "MODEL", "--data", "ROWS", "--out", "/dev/null/x"],
        ["eval", "MODEL", "--data", "ROWS", "--out", "/dev/null/x.json"],
        ["merge", "MODEL", "ADAPTER", "--out", "/dev/null/x"],
        ["convert", "official", "RUN", "--base", "MODEL", "--out", "/dev/null/x"],
        ["convert", "shira", "RUN", "--base", "MODEL", "--out", "/dev/null/x"],
        ["convert", "supertuning", "RUN", "--base", "MODEL", "--out", "/dev/null/x"],
        ["convert", "diff", "MODEL", "--base", "MODEL", "--k", "1", "--out", "/dev/null/x"],
        ["convert", "to-shira", "RUN", "--base", "MODEL", "--out", "/dev/null/x"],
        ["bench", "throughput", "MODEL", "--out", "/dev/null/x.json"],
        ["bench", "latency", "MODEL", "--out", "/dev/null/x.json"],
        ["bench", "serving", "--model", "MODEL", "--out", "/dev/null/x.json"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(
    rows, tmp_path, monkeypatch, command
):
    monkeypatch.setattr("neuroada_serve.model.source.resolve_model", never)
    places = {"ROWS": str(rows), "MODEL": str(tmp_path), "ADAPTER": str(tmp_path)}
    result = run(app, [places.get(word, word) for word in command])
    assert result.exit_code == 2, result.output
    assert "cannot be written: /dev/null is no folder" in result.stderr


def test_eval_makes_the_folder_of_its_results(base, rows, tmp_path):
    out = tmp_path / "new" / "results.json"
    flags = ("--data", str(rows), "--limit", "2", "--metric", "loss", "--out", str(out))
    result = run(app, ["eval", str(tmp_path / "tiny"), *flags])
    assert result.exit_code == 0, result.output
    assert out.is_file()


def test_a_given_folder_is_no_file(rows, tmp_path):
    out = tmp_path / "folder.json"
    out.mkdir()
    result = run(app, ["eval", str(tmp_path), "--data", str(rows), "--out", str(out)])
    assert result.exit_code == 2
    assert "is a folder" in result.stderr
