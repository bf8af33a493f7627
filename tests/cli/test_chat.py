"""`neuroada chat` through pipes and through a terminal of its own, on a tiny model."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from neuroada_serve import LLM, SamplingParams, save_adapter
from neuroada_serve.cli.chat import Conversation
from neuroada_serve.cli.main import app
from tests.support.tiny import random_adapter, save_tiny_model

LINE = re.compile(r"^\[(\d+) tokens in [\d.]+ s, \d+ tokens/s(.*)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    source = save_tiny_model(root / "model")
    for seed, name in enumerate(("fr", "de")):
        save_adapter(random_adapter(source, seed), root / name)
    return root


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder / "model", [folder / "fr", folder / "de"], max_num_seqs=1)


def params(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True} | more)


def piped(folder, text: str, *flags: object):
    given = [folder / "model", "--adapter", folder / "fr", "--adapter", folder / "de"]
    flags = ["--max-tokens", 4, *flags]
    return CliRunner().invoke(app, ["chat", *map(str, [*given, *flags])], input=text)


# --- pipes -----------------------------------------------------------------------------------


def test_every_line_of_a_pipe_gets_an_answer(folder, llm):
    result = piped(folder, "hello\n\nagain\n")
    assert result.exit_code == 0, result.output
    assert len(LINE.findall(result.stderr)) == 2
    [first] = llm.chat([{"role": "user", "content": "hello"}], params(ignore_eos=False), "fr")
    assert result.stdout.startswith(first.text + "\n")
    assert "Adapters:" not in result.output


def test_switched_adapters_answer_as_themselves(folder, llm):
    lines = [
        "/use de",
        "hello",
        "/clear",
        "/use base",
        "hello",
        "/clear",
        "/use fr:0.5+de",
        "hello",
    ]
    result = piped(folder, "\n".join(lines))
    question = [{"role": "user", "content": "hello"}]
    mix = {"fr": 0.5, "de": 1.0}
    found = llm.chat([question] * 3, params(ignore_eos=False), ["de", None, mix])
    assert result.stdout == "".join(answer.text + "\n" for answer in found)
    assert "fr:0.5+de answers from now on." in result.stderr


def test_a_backslash_joins_lines(folder, llm):
    result = piped(folder, "one\\\ntwo\n/undo\n")
    assert "Removed: one\ntwo" in result.stderr


def test_mistakes_do_not_end_the_conversation(folder):
    result = piped(folder, "/use nobody\n/use\n/no-such\n/undo\nhello\n")
    assert result.exit_code == 0
    assert result.stderr.count("Error: ") == 3
    assert "nobody" in result.stderr
    assert "`/use base` for the base alone" in result.stderr
    assert "There is no message to remove." in result.stderr
    assert len(LINE.findall(result.stderr)) == 1


def test_quit_leaves_the_rest_unread(folder):
    assert piped(folder, "/quit\nhello\n").stdout == ""


def test_without_a_template_lines_are_continued_as_text(tmp_path):
    source = save_tiny_model(tmp_path, chat=False)
    result = CliRunner().invoke(
        app, ["chat", str(source.path), "--max-tokens", "3"], input="hello\n"
    )
    assert "has no chat template: it continues each line as text" in result.stderr
    llm = LLM(source.path)
    [answer] = llm.generate("hello", params(max_tokens=3, ignore_eos=False))
    assert result.stdout == answer.text + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "FOLDER/fr", "--adapter", "FOLDER/fr"], "two adapters are called 'fr'"),
        (["--adapter", "base=FOLDER/fr"], "no adapter can be called 'base'"),
        (["--temperature", "-1"], "temperature"),
        (["--adapter-dir", "FOLDER/none"], "is not a directory"),
    ],
)
def test_wrong_flag_ends_with_one_sentence(folder, flags, words):
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    result = CliRunner().invoke(app, ["chat", str(folder / "model"), *flags], input="")
    assert result.exit_code == 2
    assert words in result.stderr


# --- the conversation ------------------------------------------------------------------------


def test_answers_see_what_was_said_before(llm, capsys):
    conversation = Conversation(llm, params(), system="be")
    for text in ("one", "two", "three"):
        conversation.take(text)
    conversation.take("/undo")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * 2
    said = conversation.messages
    whole = [{"role": "system", "content": "be"}, *said[:2], said[2]]
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].strip() == llm.chat(whole, params())[0].text.strip()
    conversation.take("/clear")
    assert conversation.messages == []


def test_full_context_leaves_the_oldest_out_and_says_so(llm, capsys):
    conversation = Conversation(llm, params())
    for number in range(6):
        conversation.take(f"{number}" * 40)
    assert "The context of 256 tokens is full: the oldest 1 of your messages" in (
        capsys.readouterr().err
    )
    assert conversation.messages[0]["content"] != "0" * 40
    assert conversation.messages[-2]["content"] == "5" * 40
    before = list(conversation.messages)
    conversation.take("x" * 300)
    assert "tokens, the model takes 256 at most" in capsys.readouterr().err
    assert conversation.messages == before


@pytest.mark.parametrize(
    ("more", "ending"),
    [
        ({}, "; cut at --max-tokens 4"),
        ({"max_tokens": None}, "; the context of 256 tokens is full"),
    ],
)
def test_answer_that_was_cut_says_by_what(llm, capsys, more, ending):
    Conversation(llm, params(**more)).take("hello")
    assert LINE.findall(capsys.readouterr().err)[0][1] == ending


def test_ctrl_c_keeps_what_was_said_so_far(llm, capsys, monkeypatch):
    conversation = Conversation(llm, params(max_tokens=100))
    step, steps = llm.engine.step, []

    def interrupted_step():
        steps.append(None)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    conversation.take("hello")
    count, ending = LINE.findall(capsys.readouterr().err)[0]
    assert ending == "; stopped"
    assert 1 <= int(count) <= 5
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert not llm.engine.has_unfinished
    conversation.take("/undo")
    assert conversation.messages == []


# --- a terminal ------------------------------------------------------------------------------


class Terminal:
    """The other end of a chat's terminal."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.text = ""

    def until(self, words: str, again: Callable[[], None] = lambda: None) -> str:
        """Return the output up to these words, from where the last call ended; call `again` each
        second until they are there."""
        end = time.monotonic() + 120
        while words not in self.text:
            assert time.monotonic() < end, self.text
            again()
            if select.select([self.fd], [], [], 1)[0]:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
        shown, _, self.text = self.text.partition(words)
        return shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


@contextmanager
def terminal(*flags: object):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "neuroada_serve", "chat", *map(str, flags)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            yield Terminal(ours), process
        finally:
            process.kill()
            os.close(ours)


@pytest.mark.timeout(300)
def test_chat_in_a_terminal(folder):
    flags = [folder / "model", "--adapter", folder / "fr", "--adapter-dir", folder]
    with terminal(*flags, "--max-tokens", 4) as (shown, process):
        shown.until("Adapters: fr, de")
        shown.until("fr> ")
        shown.type("hello\n")
        shown.until("tokens/s")
        shown.until("fr> ")
        shown.type("/use d\t\n")  # Tab completes the name
        shown.until("de answers from now on.")
        shown.until("de> ")
        shown.type("half a line")
        shown.until("half a line")
        # One that comes between readline's last character and its wait is seen with the next key.
        shown.until("leaves.", again=lambda: process.send_signal(signal.SIGINT))
        shown.until("de> ")
        shown.type("/adapters\n")
        shown.until("* de")
        shown.until("de> ")  # before that, the terminal would keep the end for itself
        shown.type("\x04")
        assert process.wait(120) == 0
