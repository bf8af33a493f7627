"""Questions to score a model on: prompt, right answer and options.

Rows have the forms that training reads. Beside its answer a row may have
    "answer"    the part of `output` that counts, as in the data sets of the method's paper, where
                `output` is "the correct answer is true" and `answer` is "true"
    "choices"   the options, a list of two or more texts, one of which is right
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.evaluation.exact import after_trigger
from neuroada_serve.train.labels import sorted_labels
from neuroada_serve.train.rows import Data, place
from neuroada_serve.train.shapes import Row, read_rows

PAPER_TRIGGER = "the correct answer is "
PAPER_KEY = "answer"
MAX_LABELS = 20  # distinct answers of a file that are still a classification

_FORMAT = re.compile(r"Answer format: *(\S+(?:/\S+)+)\s*$")  # how the paper's rows name options


@dataclass(frozen=True)
class Question:
    """One row to be scored on.

    right: the answer as metrics compare it; labelled: it has a key of its own in the row.
    options: distinct, `right` among them; empty if the row has none. given: by the row or the
        caller, not collected from the data.
    lead: text of an answer before its option, such as "the correct answer is ".
    """

    row: Row
    right: str
    labelled: bool
    options: tuple[str, ...]
    given: bool
    lead: str
    trigger: str


def read_questions(
    data: Data,
    *,
    answer_key: str | None = None,
    trigger: str | None = None,
    choices: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    notify: Callable[[str], None] | None = None,
) -> list[Question]:
    """Read the questions of a file, or of a data set on the hub.

    Args:
        answer_key: key of the answer that counts; default "answer", in rows that have it beside
            "output".
        trigger: text before the answer; default "the correct answer is " for rows with such a key,
            else none.
        choices: options of rows without any of their own. Default: those at the end of a row of the
            paper ("Answer format: true/false"), else all distinct answers of the file, if there are
            at most 20, with two rows or more each.
        columns: our keys for the data's columns, see `read_rows`.
        notify: gets remarks on how the rows were read.

    Raises:
        DataError: rows at fault; names the first.
    """
    also_used = ("choices", answer_key or PAPER_KEY)
    found = read_rows(data, columns, also_used=also_used)
    found.tell(data, notify)
    rows = found.rows
    extras = [row.raw for row in rows]
    if answer_key is not None and not any(answer_key in extra for extra in extras):
        raise DataError(f"{data}: no row has the key {answer_key!r}; leave out --answer-key")
    questions = []
    for row, extra in zip(rows, extras, strict=True):
        label = _label(data, row, extra, answer_key)
        marks = trigger if trigger is not None else "" if label is None else PAPER_TRIGGER
        right = (after_trigger(row.answer, marks) if label is None else label).strip()
        options = _own_choices(data, row, extra) or tuple(choices or ())
        given = bool(options)
        if not options and label is not None and (named := _FORMAT.search(row.text)):
            options = tuple(named[1].split("/"))
            options = options if right in options else ()
        lead = marks if row.answer.startswith(marks) else ""
        questions.append(Question(row, right, label is not None, options, given, lead, marks))
    distinct = sorted_labels(question.right for question in questions)
    if 2 <= len(distinct) <= MAX_LABELS and 2 * len(distinct) <= len(questions):
        questions = [q if q.options else replace(q, options=tuple(distinct)) for q in questions]
    for question in questions:
        _check(data, question)
    return questions


def _label(data: Data, row: Row, extra: Mapping[str, Any], answer_key: str | None) -> str | None:
    key = answer_key or PAPER_KEY
    if key not in extra or (answer_key is None and "output" not in extra):
        return None
    value = extra[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        if answer_key is None:
            return None
        raise DataError(f"{data} {place(data, row.number)}: {key} must be a text or a number")
    if not str(value).strip():
        raise DataError(f"{data} {place(data, row.number)}: {key} is empty")
    return str(value)


def _own_choices(data: Data, row: Row, extra: Mapping[str, Any]) -> tuple[str, ...]:
    choices = extra.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{data} {place(data, row.number)}: choices must be a list of texts")
    if len(choices) < 2:
        raise DataError(f"{data} {place(data, row.number)}: choices must be two or more")
    return tuple(choice.strip() for choice in choices)


def _check(data: Data, question: Question) -> None:
    where = f"{data} {place(data, question.row.number)}"
    options = question.options
    if not all(options):
        raise DataError(f"{where}: one of the choices is empty")
    if len(set(options)) < len(options):
        raise DataError(f"{where}: the choices {list(options)} name one twice")
    if options and question.right not in options:
        raise DataError(
            f"{where}: the answer {question.right[:80]!r} is none of the choices {list(options)}"
        )
