"""Rows of a data file: the split, and their token ids."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jinja2 import TemplateError

from neuroada_serve.adapters.format import BaseSpec
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.train.data import load_data, split_rows
from neuroada_serve.train.examples import encode_prompt, encode_row
from neuroada_serve.train.shapes import Row

END = 3


class CharTokenizer:
    """One token a character; a plain prompt starts with token 1, a chat turn with its role's."""

    eos_token_id: int | None = END

    def __init__(self, chat_template="yes"):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) for c in text])

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert not tokenize
        if messages[0]["role"] == "bard":
            raise TemplateError("no bards")
        text = "".join(m["role"][0] + m["content"] for m in messages)
        return text + "a" * add_generation_prompt


def _base(tokenizer=None, max_model_len=1000):
    return BaseModel(
        model=None,
        tokenizer=tokenizer or CharTokenizer(),
        spec=BaseSpec("fake", "0" * 64, {}),
        path=Path(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=frozenset({END}),
        max_model_len=max_model_len,
        vocab_size=1 << 21,
    )


def _file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def _rows(*prompts):
    return [
        Row(line, ({"role": "user", "content": p},), p, f"answer {line}")
        for line, p in enumerate(prompts, start=1)
    ]


def _assistant(content):
    return {"role": "assistant", "content": content}


def test_messages_that_the_template_refuses_are_named_by_line(tmp_path):
    bard = {"messages": [{"role": "bard", "content": "a"}, _assistant("b")]}
    path = _file(tmp_path, {"prompt": "a", "completion": "b"}, bard)
    with pytest.raises(DataError, match="line 2: the chat template refuses the messages: no bards"):
        load_data(_base(), path, TrainConfig())


def test_split_is_by_seed_and_not_by_order():
    rows = _rows(*map(str, range(50)))
    train, heldout = split_rows(rows, 0.2, seed=1)
    assert (len(train), len(heldout)) == (40, 10)
    again = split_rows(rows[::-1], 0.2, seed=1)[1]
    assert {r.number for r in again} == {r.number for r in heldout}
    assert {r.number for r in split_rows(rows, 0.2, seed=2)[1]} != {r.number for r in heldout}


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_never_on_both_sides(seed):
    rows = _rows(*(str(i % 7) for i in range(60)))
    train, heldout = split_rows(rows, 0.3, seed)
    assert len(train) + len(heldout) == 60
    assert heldout
    assert not {r.text for r in train} & {r.text for r in heldout}


def test_split_leaves_something_to_train_on():
    assert split_rows(_rows("a", "a"), 0.9, 0)[1] == []
    assert len(split_rows(_rows("a", "b"), 0.99, 0)[0]) == 1
    assert len(split_rows(_rows("a", "b", "c"), 0.01, 0)[1]) == 1
    assert split_rows(_rows("a", "b", "c"), 0, 0)[1] == []


def test_answer_is_tokenized_apart_and_ends_with_the_end_token():
    (row,) = _rows("hi")
    example = encode_row(_base(), row, "chat")
    assert example.prompt_ids == (ord("u"), ord("h"), ord("i"), ord("a"))
    assert example.answer_ids == (*map(ord, "answer 1"), END)


def test_plain_prompts_skip_the_template():
    (row,) = _rows("hi")
    plain = [1, ord("h"), ord("i")]
    assert encode_prompt(_base(), row, "plain") == plain
    assert encode_prompt(_base(CharTokenizer(chat_template=None)), row, "chat") == plain


def test_a_base_without_end_token_is_refused():
    tokenizer = CharTokenizer()
    tokenizer.eos_token_id = None
    (row,) = _rows("hi")
    assert encode_row(_base(tokenizer), row, "chat").answer_ids[-1] == END
    endless = BaseModel(**{**vars(_base(tokenizer)), "eos_token_ids": frozenset()})
    with pytest.raises(DataError, match="no end token"):
        encode_row(endless, row, "chat")


def test_long_rows_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"{i}" * n, "completion": "b"} for i, n in enumerate([3, 4, 5, 6])]
    config = TrainConfig(max_length=8, eval_fraction=0)  # role, prompt, role, answer, end
    data = load_data(_base(), _file(tmp_path, *rows), config)
    assert [len(e) for e in data.train] == [7, 8]
    assert (data.report.rows, data.report.too_long, data.report.tokens) == (4, 2, 15)
    assert (
        str(data.report)
        == "4 rows: 2 to train on, 0 held out, 2 left out as too long; 15 tokens, 4 of them in "
        "answers, the longest row 8; 100% of the answers are 'b'"
    )


@pytest.mark.parametrize(("most", "fix"), [(1000, "raise --max-length"), (5, "shorten the rows")])
def test_rows_that_are_all_too_long_say_what_to_do(tmp_path, most, fix):
    path = _file(tmp_path, {"prompt": "abcdef", "completion": "b"})
    with pytest.raises(DataError, match=f"longer than .* the shortest has 10; .*{fix}"):
        load_data(_base(max_model_len=most), path, TrainConfig(max_length=8))


def test_a_heldout_file_takes_the_place_of_the_split(tmp_path):
    data = _file(tmp_path, *({"prompt": f"p{i}", "completion": "x"} for i in range(9)))
    (tmp_path / "other").mkdir()
    heldout = _file(tmp_path / "other", {"prompt": "unseen", "completion": "y"})
    loaded = load_data(_base(), data, TrainConfig(eval_data=heldout, eval_fraction=0.5))
    assert (len(loaded.train), len(loaded.heldout)) == (9, 1)
    assert (loaded.report.rows, loaded.report.too_long) == (10, 0)


def test_a_heldout_file_that_repeats_training_prompts_is_refused(tmp_path):
    data = _file(tmp_path, {"prompt": "seen", "completion": "x"})
    (tmp_path / "other").mkdir()
    rows = [{"prompt": "new", "completion": "x"}, {"prompt": "seen", "completion": "y"}]
    heldout = _file(tmp_path / "other", *rows)
    with pytest.raises(DataError, match=r"1 prompts .* first in line 2"):
        load_data(_base(), data, TrainConfig(eval_data=heldout))


def test_tool_calls_that_the_prompt_format_leaves_out_are_told(tmp_path):
    call = {**_assistant(""), "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    turns = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "b"}]
    path = _file(tmp_path, {"messages": [*turns, _assistant("c")]})
    told = "tool calls in the prompts of 1 row not read: the prompt format knows none"
    plain = TrainConfig(eval_fraction=0, prompt_format="plain")
    assert told in str(load_data(_base(), path, plain).report)
    chat = TrainConfig(eval_fraction=0)
    assert told in str(load_data(_base(), path, chat).report)
    knows = CharTokenizer(chat_template="{{ message.tool_calls }}")
    assert told not in str(load_data(_base(knows), path, chat).report)
