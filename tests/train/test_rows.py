"""Files of rows: every format gives the same rows, and bad ones are named with the fix."""

import csv
import datetime
import gzip
import io
import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError
from neuroada_serve.train.data import load_data
from neuroada_serve.train.shapes import read_rows
from tests.support.training import make_base

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
    found = read_rows(tmp_path / name).rows
    assert [(row.text, row.answer) for row in found] == [tuple(row.values()) for row in ROWS]


def test_columns_of_other_names_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("Ticket,Team\nprinter is on fire,hardware\n")
    with pytest.raises(
        DataError, match=r"columns Ticket, Team; .*--columns text=Ticket,label=Team"
    ):
        read_rows(tmp_path / "rows.csv")
    [row] = read_rows(tmp_path / "rows.csv", {"prompt": "Ticket", "completion": "Team"}).rows
    assert (row.text, row.answer) == ("printer is on fire", "hardware")
    with pytest.raises(DataError, match="has no column Group, which --columns names; it has"):
        read_rows(tmp_path / "rows.csv", {"prompt": "Ticket", "completion": "Group"})


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", b"prompt,completion\na,b\nstra\xdfe,c\n", "line 3 is not UTF-8.*CSV UTF-8"),
        ("a.csv", b"PK\x03\x04\xff", "is a spreadsheet .*save it as CSV UTF-8"),
        ("a.xlsx", b"PK\x03\x04\xff", "is a spreadsheet .*save it as CSV UTF-8"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet of an old kind.*CSV UTF-8"),
        ("a.jsonl", b'{"prompt": "\xdf"}', "line 1: not UTF-8 text; save the file as UTF-8"),
        ("a.jsonl", b"\xff\xfea", "is not complete UTF-16 text"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.json", "\n", r"a\.json is empty"),
        ("a.csv", "prompt,completion\n", "has no rows"),
        ("a.jsonl", "\n<!DOCTYPE html><html>", "is a web page, not data: download the raw file"),
        ("a.parquet", "<html>404", "is a web page, not data"),
        (
            "a.jsonl",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer, not the data: run git lfs pull",
        ),
        ("a.csv", b"PAR1\0PAR1", "is a parquet file; name it .parquet"),
        ("a.jsonl", b"\x80\x04\x95", "is a Python pickle, which is never read"),
        ("a.jsonl", "[\n" + '{"prompt": "a"}' + "\n]", "is one JSON document.*name it .json"),
        ("a.csv", '[{"prompt": "a"}]', "is JSON; name it .json"),
        ("a.txt", "prompt,completion\na,b\n", "no JSON object a line; name it .csv, .tsv"),
        ("a.json", '"prompt"', "must hold a list of objects, not str"),
        ("a.json", '{"train": [{}], "test": [{}]}', r"several lists of rows \(train, test\): save"),
        ("a.json", '{"columns": ["a"], "index": [0], "data": [[1]]}', 'write orient="records"'),
        ("a.json", '{"prompt": "a", "completion": "b"}\nb', "row 2: not valid JSON"),
        ("a.json", '[{"prompt": "a"},]', "is not JSON: .*line 1"),
        ("a.json", "[1]", "row 1: must be a JSON object, not int"),
        ("a.json", "[" * 100_000, "not readable JSON"),
        ("a.jsonl.gz", b"no gzip", "is not a complete gzip file"),
        ("a.parquet", b"PAR1 no", "is not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_fix(name, content, fault, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=fault):
        read_rows(path)


ROW = {"prompt": "hé", "completion": "b"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("utf16.csv", "prompt,completion\r\nhé,b\r\n".encode("utf-16")),
        ("utf16.jsonl", as_lines([ROW]).encode("utf-16")),
        ("utf32.json", json.dumps([ROW]).encode("utf-32")),
        ("lines.json", (as_lines([ROW]) * 2).encode()),
        ("lines.csv", as_lines([ROW]).encode()),
        ("zipped.jsonl", gzip.compress(as_lines([ROW]).encode(), mtime=0)),
        ("data.json", json.dumps({"version": 1, "data": [ROW]}).encode()),
        ("rows.json", json.dumps({"rows": [ROW]}).encode()),
        ("one.json", json.dumps(ROW, indent=1).encode()),
        ("pandas.json", json.dumps({key: {"0": value} for key, value in ROW.items()}).encode()),
        ("lists.json", json.dumps({key: [value] for key, value in ROW.items()}).encode()),
        ("pipes.csv", "prompt|completion\nhé|b\n".encode()),
    ],
)
def test_what_can_mean_one_thing_alone_is_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    found = {(row.text, row.answer) for row in read_rows(tmp_path / name).rows}
    assert found == {("hé", "b")}


def test_rows_of_json_lines_named_json_are_counted_as_rows(tmp_path):
    (tmp_path / "a.json").write_text(as_lines([ROW, ROW]) + "\n[]\n")
    with pytest.raises(DataError, match="row 3: must be a JSON object"):
        read_rows(tmp_path / "a.json")


def test_a_conversation_alone_in_a_file_is_one_row(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": turns}, indent=1))
    assert [row.answer for row in read_rows(tmp_path / "a.json").rows] == ["a"]


def test_parquet_of_conversations_is_read_without_the_nulls_of_its_columns(tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"messages": turns, "day": datetime.date(2026, 1, 2), "size": Decimal("1.50")}]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    [row] = read_rows(tmp_path / "a.parquet").rows
    assert [set(message) for message in row.messages] == [
        {"role", "content"},
        {"role", "content", "tool_calls"},
    ]
    assert row.messages[1]["content"] == ""
    assert (row.raw["day"], row.raw["size"]) == ("2026-01-02", "1.50")


def test_parquet_of_datasets_has_the_names_of_its_labels_in_their_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["so", "good"])}
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    made.to_parquet(tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert [row.answer for row in found.rows] == ["good", "so"]
    assert found.classes == ("so", "good")
    assert found.notes == ("1 row left out with an empty label (row 3)",)


ENDINGS = ["jsonl", "json", "csv", "tsv", "txt", "csv.gz", "parquet"]
pieces = st.sampled_from(
    [b'{"prompt": "a", "completion": ', b"[", b"]", b"}", b'"b"', b"\n", b"\r", b"\t", b",", b";"]
    + [b'"', b"prompt", b"completion", b"sep=;", b"PAR1", b"\x1f\x8b", b"\xff\xfe", b"\xef\xbb\xbf"]
    + [b"text,label\n", b"a,b\n", b"\0", b"\xed\xa0\x80", b'{"\\ud800": 1}', b"NaN", b" "]
)


@settings(max_examples=300)
@given(st.lists(pieces | st.binary(max_size=4), max_size=12), st.sampled_from(ENDINGS))
def test_any_bytes_give_rows_or_one_error(tmp_path_factory, parts, ending):
    path = tmp_path_factory.mktemp("any") / f"rows.{ending}"
    path.write_bytes(b"".join(parts))
    try:
        found = read_rows(path)
    except DataError as error:
        str(error).encode()  # it can be printed
    else:
        "".join([*found.notes, *(row.answer for row in found.rows)]).encode()


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
