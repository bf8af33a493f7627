"""Scores by teacher forcing agree with what greedy decoding gives and where it ends."""

from collections import Counter
from dataclasses import replace

import pytest

from neuroada_serve.config import TrainConfig
from neuroada_serve.train.examples import Example, encode_prompt, encode_row
from neuroada_serve.train.objectives import WriteText
from neuroada_serve.train.score import score
from neuroada_serve.train.shapes import Row
from neuroada_serve.train.trainer import train_adapter
from tests.support.tiny import plain_generate
from tests.support.training import make_base


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "tiny", "llama")


def ending(ids):
    return WriteText(end_ids=frozenset(ids))


def _row(number, prompt, answer="a"):
    return Row(number, ({"role": "user", "content": prompt},), prompt, answer)


def test_any_end_ends_an_answer(base):
    model = base.model
    first, second, third = plain_generate(model, [5, 6], 3, frozenset())
    other = (third + 1) % 48
    ends_otherwise = [Example((5, 6), (first, second, other))]
    assert score(model, ends_otherwise, 1, WriteText()).figure == 0
    assert score(model, ends_otherwise, 1, ending({third, other})).figure == 1
    assert score(model, ends_otherwise, 1, ending({other})).figure == 0
    wrong_within = [Example((5, 6), (first, (second + 1) % 48, third))]
    assert score(model, wrong_within, 1, ending({second, third})).figure == 0


def test_a_base_is_right_on_all_its_own_answers(base, tmp_path):
    """The token that it says most often is made one more end, beside the tokenizer's."""
    rows = [_row(number, f"{number}+1=") for number in range(24)]
    prompts = [encode_prompt(base, row, "chat") for row in rows]
    said = [plain_generate(base.model, ids, 12, frozenset({1})) for ids in prompts]
    characters = [token for token in sum(said, []) if token > 1]
    [(end, _)] = Counter(characters).most_common(1)
    base = replace(base, eos_token_ids=base.eos_token_ids | {end})

    own = []
    for row, ids in zip(rows, prompts, strict=True):
        *answer, last = plain_generate(base.model, ids, 12, base.eos_token_ids)
        text = "".join(map(base.tokenizer.decode, answer))
        if last == end and text.isalnum() and len(text) == len(answer):
            own.append(replace(row, answer=text))
    assert len(own) > 5
    examples = [encode_row(base, row, "chat") for row in own]
    assert {example.answer_ids[-1] for example in examples} == {1}
    assert score(base.model, examples, 4, ending(base.eos_token_ids)).figure == 1
    assert score(base.model, examples, 4, WriteText()).figure == 0

    data = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "{row.text}", "completion": "{row.answer}"}}\n' for row in own]
    data.write_text("".join(lines).replace('\n"', '\\n"'))
    report = train_adapter(
        base, data, tmp_path / "out", TrainConfig(max_steps=1, eval_fraction=0.5)
    )
    assert report.before.figure == 1
