"""Chat templates: whichever is chosen, whatever it writes, and whatever it raises."""

import sys

import pytest
from typer.testing import CliRunner

from neuroada_serve.cli.main import app
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, ModelError, RequestError
from neuroada_serve.model import template
from neuroada_serve.model.loader import load_base
from neuroada_serve.model.prompt import encode_chat
from neuroada_serve.train.data import load_data
from tests.support.chat_forms import FORMS, load_form, save_form

USER = {"role": "user", "content": "How many stars?"}

_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}"
BROKEN = {
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "UndefinedError": "{{ messages.nothing.at.all }}",
    "RecursionError": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "SecurityError": "{{ messages.append(1) }}",
    "OverflowError": "{% for i in range(10**9) %}x{% endfor %}",
    "MemoryError": "{{ 'a' * 10**18 }}",
    "KeyError": "{{ '%(a)s' % {} }}",
    "ValueError": "{{ 'a'.index('b') }}",
    "no Jinja": "{% for %}",
    "takes over": _LOOPS,
    "by name and no default (rag, tool_use)": {"rag": "a", "tool_use": "b"},
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.setattr(template, "_TIME_LIMIT_S", 0.3)
    return lambda written: load_form(tmp_path / "base", FORMS["chatml"], written)


@pytest.mark.parametrize("told", BROKEN)
def test_whatever_a_template_raises_is_a_sentence(broken, told, tmp_path):
    base = broken(BROKEN[told])
    with pytest.raises(RequestError) as raised:
        encode_chat(base, [USER])
    assert told in str(raised.value)
    assert "base 'tiny-llama'" in str(raised.value)
    assert "use plain prompts" in str(raised.value)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises((DataError, RequestError)) as raised:
        load_data(base, rows, TrainConfig())
    assert told in str(raised.value)
    assert load_data(base, rows, TrainConfig(prompt_format="plain")).train


def test_a_template_is_chosen_by_name_or_file(tmp_path):
    source = save_form(tmp_path / "base", FORMS["chatml"], {"rag": "R", "tool_use": "T"})
    own = tmp_path / "own.jinja"
    own.write_text(FORMS["chatml"].template)
    rag = load_base(source, chat_template="rag")
    assert encode_chat(rag, [USER]) == rag.tokenizer("R").input_ids
    base = load_base(source, chat_template=str(own))
    assert base.turn_end.ending == "<|im_end|>"
    with pytest.raises(ModelError, match="must be one of rag, tool_use, or a file"):
        load_base(source, chat_template="tools")


def test_every_command_takes_a_chat_template(tmp_path):
    source = save_form(tmp_path / "base", FORMS["chatml"], {"rag": "R", "tool_use": "T"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    commands = [
        ["generate", str(source.path), "hello", "--max-tokens", "2"],
        ["train", str(source.path), "--data", str(rows), "--out", str(tmp_path / "o"), "--check"],
        ["eval", str(source.path), "--data", str(rows), "--metric", "loss"],
    ]
    for command in commands:
        refused = CliRunner().invoke(app, command)
        assert (refused.exit_code, "--chat-template" in refused.output) == (2, True), command
        done = CliRunner().invoke(app, [*command, "--chat-template", "rag"])
        assert done.exit_code == 0, done.output


def test_default_is_taken_of_several_templates(tmp_path):
    base = load_form(tmp_path, FORMS["chatml"], {"default": "D", "rag": "R"})
    assert encode_chat(base, [USER]) == base.tokenizer("D").input_ids


def test_looking_at_a_template_leaves_no_trace_function(broken):
    before = sys.gettrace()
    broken(BROKEN["takes over"])
    assert sys.gettrace() is before
