"""The bar over prompts."""

import io
import re

import pytest
from tqdm import tqdm

from neuroada_serve import LLM, SamplingParams
from tests.support.tiny import save_tiny_model

PROMPTS = ["one", "two", "three"]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, n=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(str(save_tiny_model(tmp_path_factory.mktemp("model")).path))


def test_terminal_sees_a_bar_with_the_speed(llm, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    llm.generate(PROMPTS, PARAMS)
    assert "Processed prompts: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert re.search(r"input: [\d.]+ toks/s, output: [\d.]+ toks/s", terminal.getvalue())


@pytest.mark.parametrize(
    "more", [{"use_tqdm": False}, {"on_output": lambda output: None}], ids=["off", "watched"]
)
def test_no_bar_where_none_is_wanted(llm, monkeypatch, more):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    llm.generate(PROMPTS, PARAMS, **more)
    assert terminal.getvalue() == ""


def test_no_bar_in_a_log(llm, capsys):
    llm.generate(PROMPTS, PARAMS)
    assert capsys.readouterr().err == ""


def test_given_bar_counts_every_prompt_once(llm):
    bars = []

    def bar(**settings):
        bars.append(tqdm(file=io.StringIO(), **settings))
        return bars[-1]

    llm.generate(PROMPTS, PARAMS, use_tqdm=bar)
    assert (bars[0].n, bars[0].total) == (3, 3)
    assert bars[0].disable  # closed
    llm.chat([{"role": "user", "content": "hi"}], PARAMS, use_tqdm=bar)
    assert bars[1].n == 1


def test_bar_is_closed_when_a_prompt_is_refused(llm):
    bars = []
    with pytest.raises(ValueError, match="stop"):
        llm.generate(
            PROMPTS,
            PARAMS,
            use_tqdm=lambda **settings: (
                bars.append(tqdm(file=io.StringIO(), **settings)) or bars[0]
            ),
            on_output=lambda output: (_ for _ in ()).throw(ValueError("stop")),
        )
    assert bars[0].disable
