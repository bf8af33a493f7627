"""Columns of rows: those that stand for ours, and those that could."""

import pytest

from neuroada_serve.errors import DataError
from neuroada_serve.train.columns import fitting_columns, known_columns, may_be_a_row

SENTENCES = [f"the printer on floor {n} is on fire" for n in range(12)]
TEAMS = ["hardware", "hardware", "post", "nobody"] * 3


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        ({"question": SENTENCES, "reply": SENTENCES}, "prompt=question,completion=reply"),
        ({"response": SENTENCES, "query": SENTENCES}, "prompt=query,completion=response"),
        (
            {"user_input": SENTENCES, "bot_reply": SENTENCES},
            "prompt=user_input,completion=bot_reply",
        ),
        ({"review": SENTENCES, "mood": TEAMS}, "text=review,label=mood"),
        ({"x": SENTENCES, "y": TEAMS}, "text=x,label=y"),
        ({"y": TEAMS, "x": SENTENCES}, "text=x,label=y"),
        ({"a": SENTENCES, "b": SENTENCES}, "prompt=a,completion=b"),
        ({"id": range(12), "text": SENTENCES, "gold": [0, 1, 0] * 4}, "text=text,label=gold"),
        (
            {"Frage": SENTENCES, "Meine Antwort": SENTENCES},
            "'prompt=Frage,completion=Meine Antwort'",
        ),
        ({"chat": [[{"role": "user", "content": "q"}]] * 12}, "messages=chat"),
        ({"dialog": [[{"from": "human", "value": "q"}]] * 12}, "conversations=dialog"),
        ({"text": SENTENCES}, None),
        ({"id": range(12), "text": SENTENCES}, None),
        ({"x": [None] * 12, "y": [{}] * 12}, None),
        ({}, None),
    ],
)
def test_columns_that_fit_are_guessed_by_names_and_contents(columns, flag):
    names = list(columns)
    records = [
        dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
    ]
    assert fitting_columns(names, records) == (flag and f"--columns {flag}")


def test_the_users_columns_are_taken_in_another_case_where_there_is_one():
    ours = ["prompt", "completion"]
    columns = {"prompt": "q", "completion": "A"}
    assert known_columns("f", [" Q ", "A", "a"], columns, ours) == {
        " Q ": "prompt",
        "A": "completion",
    }
    with pytest.raises(DataError, match=r"f has no column Q, .*it has q, q , A"):
        known_columns("f", ["q", "q ", "A"], {"prompt": "Q", "completion": "A"}, ours)
    with pytest.raises(DataError, match="one column two names"):
        known_columns("f", ["q"], {"prompt": "q", "completion": "Q"}, ours)


@pytest.mark.parametrize(
    ("names", "rows", "is_row"),
    [
        (["nice", "pos"], [["bad", "neg"], ["fine", "pos"]], True),
        (["I never liked this film", "0"], [["nice", "1"]], True),
        (["review", "mood"], [["nice", "pos"]], False),
    ],
)
def test_a_header_that_looks_like_a_row_is_known(names, rows, is_row):
    records = [dict(zip(names, row, strict=True)) for row in rows]
    assert may_be_a_row(names, records) is is_row
