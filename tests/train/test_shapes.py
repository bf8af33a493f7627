"""Rows by their shapes: what each becomes, what is left out, what is refused, and what is said."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroada_serve.errors import DataError
from neuroada_serve.train.shapes import read_rows
from tests.support.rows import write


def said(role, content):
    return {"role": role, "content": content}


def refused(path, columns=None):
    with pytest.raises(DataError) as raised:
        read_rows(path, columns)
    return str(raised.value)


def test_three_shapes_read_alike(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "hi\nyou", "completion": "yo"},
        {"messages": [said("user", "hi\nyou"), said("assistant", "yo")]},
        {"instruction": "hi", "input": "you", "output": "yo", "answer": "not used"},
    )
    found = read_rows(path)
    assert [(r.messages, r.answer) for r in found.rows] == [((said("user", "hi\nyou"),), "yo")] * 3
    assert found.notes == ("columns not used: answer",)


def test_plain_text_of_each_shape(tmp_path):
    turns = [said("system", "be"), said("user", "hi"), said("assistant", "yo")]
    path = write(
        tmp_path,
        {"prompt": "2+2=", "completion": "4"},
        {"messages": turns},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"system": "be", "prompt": "2+2=", "completion": "4"},
        {"system": "be", "history": [["a", "b"]], "instruction": "hi", "output": "yo"},
    )
    texts = [row.text for row in read_rows(path).rows]
    assert texts == ["2+2=", "be\nhi\n", "hi\n", "be\n2+2=", "be\na\nb\nhi\n"]


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q\n", "a"),
        ({"text": "nice", "label": "good"}, "nice\n", "good"),
        ({"sentence": "nice", "label": 1}, "nice\n", "1"),
        ({"sentence": "nice", "label": 1.0}, "nice\n", "1"),
        ({"sentence": "nice", "label": 1.5}, "nice\n", "1.5"),
        ({"text": "nice", "label": True}, "nice\n", "True"),
        ({"text": 1984, "label": "book"}, "1984\n", "book"),
        ({"prompt": "6*7=", "completion": 42}, "6*7=", "42"),
        ({"prompt": "7/2=", "completion": 3.5}, "7/2=", "3.5"),
        ({"question": "So?", "answer": False}, "So?\n", "False"),
        ({"instruction": "i", "input": "x", "output": "o", "answer": "z"}, "i\nx\n", "o"),
    ],
)
def test_shapes_are_known_by_their_names(row, text, answer, tmp_path):
    [found] = read_rows(write(tmp_path, row)).rows
    assert (found.text, found.answer) == (text, answer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [said("user", "q")], "completion": [said("assistant", "a")]},
        {"prompt": [said("user", "q")], "completion": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [said("user", "q"), said("assistant", "a")]},
        {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": json.dumps([said("user", "q"), said("assistant", "a")])},
        {"messages": [said("user", [{"type": "text", "text": "q"}]), said("assistant", "a")]},
        {"messages": [said("user", "q"), {**said("assistant", "a"), "tool_calls": None}]},
    ],
)
def test_conversations_of_all_kinds_read_alike(row, tmp_path):
    [found] = read_rows(write(tmp_path, row)).rows
    assert (found.messages, found.text, found.answer) == ((said("user", "q"),), "q\n", "a")


def test_alpaca_with_system_and_history_is_a_conversation(tmp_path):
    row = {"instruction": "and 3?", "input": "", "output": "9", "system": "square"}
    found = read_rows(write(tmp_path, {**row, "history": [["2?", "4"]]}))
    turns = [("system", "square"), ("user", "2?"), ("assistant", "4"), ("user", "and 3?")]
    assert found.rows[0].messages == tuple(said(*turn) for turn in turns)
    assert "system, history read as what was said before" in found.notes
    assert "1 earlier answer of conversations read as context, not learnt" in found.notes


def test_columns_with_the_name_of_something_else_are_left_alone(tmp_path):
    row = {"prompt": "p", "completion": "c", "weight": 2.5, "history": "none", "system": 3}
    found = read_rows(write(tmp_path, row))
    assert found.rows[0].messages == (said("user", "p"),)
    assert found.notes == ("columns not used: weight, history, system",)


def test_rows_of_weight_0_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "c", "weight": int(i == 1)} for i in range(4)]
    found = read_rows(write(tmp_path, *rows))
    assert [row.text for row in found.rows] == ["1"]
    assert found.notes == ("3 rows left out with weight 0 (lines 1, 3 and 4)",)
    assert "every" not in refused(write(tmp_path, rows[0]))
    assert "of 1 row 0 can be used; 1 row left out with weight 0" in refused(
        write(tmp_path, rows[0])
    )


def test_the_last_answer_of_weight_1_is_learnt(tmp_path):
    def turns(*weights):
        answers = [{**said("assistant", f"a{i}"), "weight": w} for i, w in enumerate(weights)]
        return {"messages": [turn for a in answers for turn in (said("user", "q"), a)]}

    found = read_rows(write(tmp_path, turns(1, 0), turns(1, 1), turns(0, 1), turns(0, 0)))
    assert [row.answer for row in found.rows] == ["a0", "a1", "a1"]
    assert [len(row.messages) for row in found.rows] == [1, 3, 3]
    assert not any("weight" in message for row in found.rows for message in row.messages)
    assert found.notes == (
        "1 row left out with no answer of weight 1 (line 4)",
        "1 earlier answer of conversations read as context, not learnt",
    )


def test_columns_that_are_not_used_are_named(tmp_path):
    row = {"prompt": "p", "completion": "c", "tools": [], "id": 7}
    path = write(tmp_path, row)
    assert read_rows(path).notes == ("columns not used: tools, id",)
    assert read_rows(path, also_used=["id"]).notes == ("columns not used: tools",)
    columns = {"prompt": "id", "completion": "completion"}
    assert read_rows(path, columns).notes == ("columns not used: prompt, tools",)


@pytest.mark.parametrize("blank", ["", "  ", None, float("nan")])
def test_rows_with_a_blank_cell_are_left_out_and_named(blank, tmp_path):
    rows = [{"prompt": "p", "completion": "c"}] * 2 + [{"prompt": "p", "completion": blank}]
    found = read_rows(write(tmp_path, *rows))
    assert len(found.rows) == 2
    assert found.notes == ("1 row left out with an empty completion (line 3)",)


def test_a_blank_cell_is_named_by_the_column_of_the_data(tmp_path):
    path = write(tmp_path, {"ticket": "p", "team": "c"}, {"ticket": "p", "team": ""})
    found = read_rows(path, {"prompt": "ticket", "completion": "team"})
    assert found.notes == ("1 row left out with an empty team (line 2)",)


def test_two_system_messages_are_refused(tmp_path):
    for role in ("system", "developer"):
        turns = [said(role, "be"), said("user", "q"), said("assistant", "a")]
        path = write(tmp_path, {"messages": turns, "system": "do"})
        assert "line 1: has a column system, and a system message" in refused(path)
    path = write(tmp_path, {"messages": turns[1:], "system": "do"})
    assert read_rows(path).rows[0].text == "do\nq\n"


def test_a_column_that_is_mostly_blank_is_refused(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}] + [{"prompt": "p", "completion": None}] * 2
    assert "of 3 rows 1 can be used; 2 rows left out with an empty completion (lines 2 and 3)" in (
        refused(write(tmp_path, *rows))
    )
    assert len(read_rows(write(tmp_path, *rows[:2])).rows) == 1


def test_rows_of_nothing_are_left_out_however_many(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}] + [{"prompt": "", "completion": None}] * 9
    found = read_rows(write(tmp_path, *rows))
    assert len(found.rows) == 1
    assert found.notes == ("9 rows left out with all cells blank (lines 2, 3, 4, 5, 6 and 4 more)",)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[" * 100_000, "not readable JSON"),
        ("[1]", "must be a JSON object, not list"),
        ({"query": "a", "answer": "b"}, "has answer, query; rows need prompt and completion"),
        ({"prompt": {}, "completion": "b"}, "at least a question and an answer"),
        ({"text": {}, "label": "b"}, "text must be a text or a number, not dict"),
        ({"text": "a", "label": [1]}, "label must be a text or a number, not list"),
        ({"text": "a", "label": float("inf")}, "label is inf"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input must be a text or a number"),
        ({"messages": [said("assistant", "b")]}, "at least a question and an answer"),
        ({"messages": ["a", said("assistant", "b")]}, "messages[0] must be an object"),
        ({"messages": [said("assistant", "a"), said("user", "b")]}, "not 'user'"),
        ({"messages": "[{'role': 'user'}]"}, "messages must be a list of messages, not str"),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, fault):
    path = write(tmp_path, {"prompt": "a", "completion": "b"}, "", row)
    message = refused(path)
    assert str(path) in message
    assert f"line 3: {fault}" in message or (fault in message and "line 3: " in message)


def test_equal_faults_are_told_once_with_their_rows(tmp_path):
    good = {"prompt": "p", "completion": "c"}
    bad = {"prompt": "p", "completion": {}}
    message = refused(write(tmp_path, *[good, bad] * 100, "[]"))
    assert message.splitlines()[1:] == [
        "  lines 2, 4, 6, 8, 10 and 95 more: a conversation must be a list of at least a question "
        "and an answer",
        "  line 201: must be a JSON object, not list",
    ]


def test_ten_different_faults_are_shown_and_the_rest_counted(tmp_path):
    message = refused(write(tmp_path, *["[" * i + "{" for i in range(13)]))
    assert message.count("not valid JSON") == 10
    assert "13 unusable rows" in message
    assert "and 3 more" in message


def test_wrong_column_names_are_told_once_with_those_that_fit(tmp_path):
    rows = [{"question": f"Why {i}?", "reply": f"Since {i}."} for i in range(200)]
    message = refused(write(tmp_path, *rows))
    assert "has the columns question, reply; rows need prompt and completion; messages;" in message
    assert message.endswith("these may be meant: --columns prompt=question,completion=reply")
    assert message.count("\n") == 0


def test_columns_that_are_not_there_are_told_once_with_the_nearest(tmp_path):
    path = write(tmp_path, *[{"Ticket": "on fire", "Team": "hardware"}] * 20)
    message = refused(path, {"prompt": "Ticket", "completion": "Teem"})
    assert message == (
        f"{path} has no column Teem, which --columns names (did you mean Team?); it has Ticket, "
        "Team"
    )
    assert len(read_rows(path, {"prompt": "ticket", "completion": " TEAM"}).rows) == 20
    assert "--columns names colour, which no row needs" in refused(path, {"colour": "Team"})


def test_names_in_another_case_are_known_where_there_is_one(tmp_path):
    found = read_rows(write(tmp_path, {" Text": "nice", "Label": "good"}))
    assert (found.rows[0].text, found.rows[0].answer) == ("nice\n", "good")
    assert found.rows[0].raw == {"text": "nice", "label": "good"}
    assert found.notes == (" Text, Label read as text, label",)
    both = {"Text": "nice", "TEXT": "bad", "label": "good"}
    assert "Text, TEXT could each be text; say which" in refused(write(tmp_path, both))
    assert read_rows(write(tmp_path, {**both, "text": "so"})).rows[0].text == "so\n"


@pytest.mark.parametrize(
    ("also", "named"),
    [
        ({"question": "q", "answer": "a"}, "prompt, completion and question, answer"),
        ({"instruction": "i", "output": "o"}, "instruction, output and prompt, completion"),
        ({"messages": []}, "messages and prompt, completion"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(also, named, tmp_path):
    path = write(tmp_path, {"prompt": "p", "completion": "c", **also})
    assert f"could be read as {named}; say which, as in --columns" in refused(path)
    columns = {"prompt": "prompt", "completion": "completion"}
    assert [row.answer for row in read_rows(path, columns).rows] == ["c"]


def test_labels_are_trimmed_and_those_of_another_case_told(tmp_path):
    rows = [{"text": "t", "label": label} for label in (" pos", "pos", "neg ", "Pos", "neg")]
    found = read_rows(write(tmp_path, *rows))
    assert [row.answer for row in found.rows] == ["pos", "pos", "neg", "Pos", "neg"]
    assert found.notes == (
        "spaces around 2 labels left out",
        "labels 'Pos' and 'pos' differ in case alone",
    )


def test_answers_keep_their_spaces_unless_they_are_labels(tmp_path):
    path = write(tmp_path, *[{"prompt": "p", "completion": c} for c in (" a", "a", " b")])
    found = read_rows(path)
    assert [row.answer for row in found.rows] == [" a", "a", " b"]
    assert found.notes == ("1 answer like others but for spaces around them",)
    labels = read_rows(path, labels=())
    assert [row.answer for row in labels.rows] == ["a", "a", "b"]


def test_one_whole_number_is_one_label_however_it_is_written(tmp_path):
    rows = [{"text": "t", "label": label} for label in (1, 1.0, "1", "1.0", "2")]
    found = read_rows(write(tmp_path, *rows))
    assert [row.answer for row in found.rows] == ["1", "1", "1", "1", "2"]
    assert found.notes == ("labels such as 1.0 read as 1",)
    versions = [{"text": "t", "label": label} for label in ("1.0", "1.5")]
    assert [row.answer for row in read_rows(write(tmp_path, *versions)).rows] == ["1.0", "1.5"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "text", "Text", "label", "instruction"]
    + ["output", "input", "system", "history", "weight", "question", "answer", "x"]
)
turns = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "type"]),
        json_values | st.sampled_from(["user", "assistant", "human", "gpt", "function_call"]),
    ),
    max_size=3,
)


@given(st.lists(st.dictionaries(names, json_values | turns, max_size=4), max_size=3))
def test_any_objects_give_rows_or_one_error(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = read_rows(path)
    except DataError as error:
        str(error).encode()  # it can be printed
    else:
        for row in found.rows:
            assert row.answer.strip()
            (row.answer + row.text + "".join(found.notes)).encode()
