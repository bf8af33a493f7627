"""Files of rows: every format gives the same rows, and bad ones are named with the fix."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train import make_base

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError
from neuroada_serve.train.data import load_data
from neuroada_serve.train.rows import read_records
from neuroada_serve.train.shapes import read_rows

ROWS = [
    {"prompt": "Say hé,\nplease", "completion": 'He said "hé"'},
    {"prompt": "1;2", "completion": "3\t4"},
    {"prompt": " spaces stay ", "completion": "0.50"},
]


def as_csv(rows, separator=",", end="\r\n"):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    return data.getvalue()


FORMATS = {
    "rows.jsonl": lambda: as_lines(ROWS).encode(),
    "rows.ndjson": lambda: as_lines(ROWS).encode("utf-8-sig"),
    "rows.txt": lambda: as_lines(ROWS).encode(),
    "rows.json": lambda: json.dumps(ROWS).encode(),
    "rows.csv": lambda: as_csv(ROWS).encode(),
    "excel.csv": lambda: as_csv(ROWS, ";").encode("utf-8-sig"),
    "unix.CSV": lambda: as_csv(ROWS, end="\n").encode(),
    "rows.tsv": lambda: as_csv(ROWS, "\t").encode(),
    "rows.csv.gz": lambda: gzip.compress(as_csv(ROWS).encode()),
    "rows.jsonl.gz": lambda: gzip.compress(as_lines(ROWS).encode()),
    "rows.parquet": lambda: as_parquet(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name]())
    found = read_rows(tmp_path / name)
    assert [(row.text, row.answer) for row in found] == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q\n", "a"),
        ({"text": "nice", "label": "good"}, "nice\n", "good"),
        ({"sentence": "nice", "label": 1}, "nice\n", "1"),
        ({"sentence": "nice", "label": 1.5}, "nice\n", "1.5"),
        ({"text": "nice", "label": True}, "nice\n", "True"),
        ({"instruction": "i", "input": "x", "output": "o", "answer": "z"}, "i\nx\n", "o"),
    ],
)
def test_shapes_are_known_by_their_names(row, text, answer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(as_lines([row]))
    [found] = read_rows(tmp_path / "rows.jsonl")
    assert (found.text, found.answer) == (text, answer)


def test_columns_of_other_names_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("Ticket,Team\nprinter is on fire,hardware\n")
    with pytest.raises(DataError, match=r"keys \['Team', 'Ticket'\].*--columns prompt="):
        read_rows(tmp_path / "rows.csv")
    [row] = read_rows(tmp_path / "rows.csv", {"prompt": "Ticket", "completion": "Team"})
    assert (row.text, row.answer) == ("printer is on fire", "hardware")
    with pytest.raises(DataError, match="line 2: has no Group, which --columns names"):
        read_rows(tmp_path / "rows.csv", {"prompt": "Ticket", "completion": "Group"})


@pytest.mark.parametrize(
    ("also", "named"),
    [
        ({"question": "q", "answer": "a"}, "prompt, completion and question, answer"),
        ({"instruction": "i", "output": "o"}, "instruction, output and prompt, completion"),
        ({"messages": []}, "messages and prompt, completion"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(also, named, tmp_path):
    row = {"prompt": "p", "completion": "c", **also}
    (tmp_path / "rows.jsonl").write_text(as_lines([row]))
    with pytest.raises(DataError, match=f"{named}; .*--columns"):
        read_rows(tmp_path / "rows.jsonl")
    columns = {"prompt": "prompt", "completion": "completion"}
    assert [row.answer for row in read_rows(tmp_path / "rows.jsonl", columns)] == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3: has 1 cells, the header 2: quote"),
        ("a.csv", 'prompt,completion\n"a\nb",c,d\n', "line 2: has 3 cells"),
        ("a.csv", 'prompt,completion\n"a"b,c\n', "line 2: .*written twice"),
        ("a.csv", 'prompt,completion\n"a,b\n', "line 2: .*"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: the header names 'prompt' twice"),
        ("a.csv", "prompt,\na,b\n", "line 1: the header has a nameless column"),
        ("a.csv", "prompt,completion\na,\n", "line 2: completion is empty"),
        ("a.csv", "prompt,completion\na\0,b\n", "line 2 has a zero byte"),
        ("a.csv", b"prompt,completion\na,b\nstra\xdfe,c\n", "line 3 is not UTF-8.*CSV UTF-8"),
        ("a.csv", "prompt,completion\n" + "x" * (1 << 24) + "x,b\n", "line 2: .*shorten the cell"),
        ("a.xlsx", b"PK\x03\x04\xff", "a spreadsheet .*CSV UTF-8"),
        ("a.jsonl", b'{"prompt": "\xdf"}', "line 1: not UTF-8 text; save the file as UTF-8"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "prompt,completion\n", "has no rows"),
        ("a.json", '{"prompt": "a"}', "must hold a list of objects, not dict"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "Extra data, line 2; an object a line is"),
        ("a.json", "[1]", "row 1: must be a JSON object, not int"),
        ("a.json", "[" * 100_000, "no JSON that can be read"),
        ("a.jsonl.gz", b"no gzip", "is no whole gzip file"),
        ("a.parquet", b"PAR1 no", "is no parquet file"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', "line 1: label must be a string, not list"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1: label must be a string"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "line 1: label is nan"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_fix(name, content, fault, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=fault):
        read_rows(path)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5),
    separator=st.sampled_from(",;\t"),
)
def test_any_text_survives_a_csv(rows, separator, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    expected = [{"one": a, "two": b} for a, b in rows]
    path.write_bytes(as_csv(expected, separator).encode())
    assert [row for _, row in read_records(path)] == expected


def test_long_prompts_lose_their_beginning(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    rows = [{"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "a", "completion": "b" * 20}]
    rows += [{"prompt": "a", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    config = TrainConfig(max_length=6, eval_fraction=0, too_long="cut", prompt_format="plain")
    loaded = load_data(base, tmp_path / "rows.jsonl", config)
    cut = loaded.train[0]
    assert base.tokenizer.decode(cut.prompt_ids).replace(" ", "") == "fgh"
    assert len(cut) == 6
    assert (loaded.report.cut, loaded.report.too_long, loaded.report.train_rows) == (1, 1, 2)
    assert "1 left out as too long, 1 prompts cut" in str(loaded.report)


def test_separators_within_a_quoted_name_do_not_count(tmp_path):
    (tmp_path / "rows.csv").write_text('"a,b,c";d\n1;2\n')
    assert list(read_records(tmp_path / "rows.csv")) == [(2, {"a,b,c": "1", "d": "2"})]


def test_heldout_prompts_that_cutting_makes_trained_ones_are_told(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    rows = [{"prompt": f"{c}zzzzzzzz", "completion": "x"} for c in "abcdefghij"]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    config = TrainConfig(max_length=6, eval_fraction=0.3, too_long="cut", prompt_format="plain")
    report = load_data(base, tmp_path / "rows.jsonl", config).report
    assert report.seen == 3
    assert "3 held-out prompts, as cut, are trained on: raise --max-length" in str(report)


def test_repeated_rows_and_answers_are_told(tmp_path):
    base = make_base(tmp_path / "tiny", "llama")
    rows = [{"prompt": p, "completion": c} for p, c in ("ax", "ax", "bx", "cy")]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    report = load_data(base, tmp_path / "rows.jsonl", TrainConfig(eval_fraction=0)).report
    assert report.duplicates == 1
    assert report.most_frequent == ("x", 0.75)
    assert "1 rows repeat others" in str(report)
    assert "75% of the answers are 'x'" in str(report)
