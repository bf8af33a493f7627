"""CSV and TSV as spreadsheets, pandas, R and GLUE write them."""

import csv
import io
from contextlib import nullcontext, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroada_serve.errors import DataError
from neuroada_serve.train.shapes import read_rows
from neuroada_serve.train.tables import read_table


def as_csv(rows, separator=",", end="\r\n"):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def pairs(found):
    return [(row.text.removesuffix("\n"), row.answer) for row in found.rows]


@pytest.mark.parametrize(
    "text",
    [
        "text,label\nnice,good\nbad,poor\n",
        "\ufefftext,label\r\nnice,good\r\nbad,poor\r\n",
        "sep=;\ntext;label\nnice;good\nbad;poor\n",
        '"sep=,"\r\ntext,label\r\nnice,good\r\nbad,poor\r\n',
        "text;label\nnice;good\nbad;poor\n",
        "text, label\nnice, good\nbad, poor\n",
        '"text", "label"\n"nice", "good"\n"bad", "poor"\n',
        "text,label,\nnice,good,\nbad,poor\n",
        "text,label\nnice,good,\nbad,poor,\n",
        "text,label\nnice,good\nbad,poor\n,\n,\n",
        "\n\ntext,label\nnice,good\n\nbad,poor\n\n",
        "Text,Label\nnice,good\nbad,poor\n",
        " text ,LABEL\nnice,good\nbad,poor\n",
        ",text,label\n0,nice,good\n1,bad,poor\n",
        "Unnamed: 0,text,label\n0,nice,good\n1,bad,poor\n",
        "id,text,id,label\n0,nice,8,good\n1,bad,9,poor\n",
        "text;label;note, if any\nnice;good;a, b\nbad;poor;c\n",
    ],
)
def test_tables_that_people_have_read_alike(text, tmp_path):
    assert pairs(read_rows(write(tmp_path, text))) == [("nice", "good"), ("bad", "poor")]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("text,label\na,b\n,\n,\n", "2 blank rows left out"),
        (",text,label\n0,a,b\n", "a column without a name not used"),
        ("text, label\na, b\n", "spaces after ',' left out"),
        ("Text,label\na,b\n", "Text read as text"),
        ("text,label,when\na,b,now\n", "columns not used: when"),
        ("text,label\na,b\na,\nb,c\n", "1 row left out with an empty label (line 3)"),
        ("text,label\na,b\na, b\n", "spaces around 1 label left out"),
        ("text,label\na,1.0\na,2\n", "labels such as 1.0 read as 1"),
    ],
)
def test_what_is_read_otherwise_than_written_is_told(text, note, tmp_path):
    assert read_rows(write(tmp_path, text)).notes == (note,)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prompt,completion\na,b\nc\n", "line 3: has 1 cell, the header 2: quote"),
        ('prompt,completion\n"a\nb",c,d\n', "line 2: has 3 cells"),
        ('prompt,completion\n"a"b,c\n', "line 2: .*written twice"),
        ('prompt,completion\nx,y\n"a,b\nc,d\n', "line 3: a cell begins with a quote that is never"),
        ("prompt,completion\na\0,b\n", "line 2 has a zero byte"),
        ("prompt,completion\n" + "x" * (1 << 24) + "x,b\n", "line 2: .*shorten the cell"),
        ("text,text,label\na,b,c\n", "the header names text twice"),
        ("text,,label,label\na,b,c,d\n", "the header names label twice"),
        ("nice,good\nfine,good\nbad,poor\n", "its first line may be a row: put a line with the"),
        ("text\na\nb\n", "has the columns text; rows need"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_fix(text, fault, tmp_path):
    with pytest.raises(DataError, match=fault):
        read_rows(write(tmp_path, text))


def test_a_lone_quote_in_a_tsv_is_text():
    text = 'sentence\tlabel\n"a fine film\t1\nbad\t0\nhe said "no"\t0\nso "so\t1\n'
    found = read_table("dev.tsv", text, "\t")
    assert [row["sentence"] for _, row in found.rows] == [
        '"a fine film',
        "bad",
        'he said "no"',
        'so "so',
    ]
    assert [number for number, _ in found.rows] == [2, 3, 4, 5]
    assert found.notes == ("quotation marks read as text",)


def test_a_tsv_of_a_writer_that_quotes_is_unquoted():
    rows = [{"text": 'he said "no"\nand left', "label": "x"}, {"text": "a\tb", "label": '"'}]
    found = read_table("rows.tsv", as_csv(rows, "\t"), "\t")
    assert [row for _, row in found.rows] == rows
    assert found.notes == ()


def test_a_tsv_that_can_be_read_in_two_ways_is_refused_by_line():
    text = 'text\tlabel\nx\ty\nso\t"a\nb\tc"\n'
    with pytest.raises(DataError, match="dev.tsv line 3: one row with a quoted cell of several"):
        read_table("dev.tsv", text, "\t")


def test_cells_of_several_lines_are_read_in_csv():
    text = 'text,label\n"Hello,\nall of ""you"".\n",x\nlast,y\n'
    found = read_table("rows.csv", text, None)
    assert found.rows == [
        (2, {"text": 'Hello,\nall of "you".\n', "label": "x"}),
        (5, {"text": "last", "label": "y"}),
    ]


def test_separators_within_a_quoted_name_do_not_count():
    assert read_table("a", '"a,b,c";d\n1;2\n', None).rows == [(2, {"a,b,c": "1", "d": "2"})]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5),
    separator=st.sampled_from(",;\t"),
)
def test_any_text_survives_a_csv(rows, separator):
    expected = [{"one": a, "two": b} for a, b in rows]
    with suppress(DataError) if separator == "\t" else nullcontext():  # it says that it cannot tell
        found = read_table("rows.csv", as_csv(expected, separator), None)
        filled = [row for row in expected if "".join(row.values()).strip()]
        assert [row for _, row in found.rows] == filled
