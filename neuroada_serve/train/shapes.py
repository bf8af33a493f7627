"""Turn records into rows of a question and an answer.

`train/files.py` reads the records. One has columns of one of these shapes:
    messages [{"role", "content"}, ...]      the last message is the assistant's answer
    conversations [{"from", "value"}, ...]   ShareGPT's, likewise
    prompt, completion                       texts, or lists of messages
    instruction, output, and input if there is one
    question, answer
    text (or sentence), label                the label's name is the answer
    sentence1, sentence2, label; premise, hypothesis, label; question1, question2, label;
    question, sentence, label                pairs, as GLUE has them: one text, one below the other

Beside them, where they hold what their names say:
    system      the system message, of all but pairs and labels
    history     [[question, answer], ...] before an instruction or a prompt
    weight      0 leaves the row out

As a plain prompt a `prompt` stays as it is; the contents of the other shapes get a line break
after each.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.train.columns import fitting_columns, known_columns, may_be_a_row
from neuroada_serve.train.files import read_records
from neuroada_serve.train.labels import clean_labels, groups_by
from neuroada_serve.train.rows import (
    Data,
    Faults,
    RecordFault,
    Records,
    counted,
    is_blank,
    kind_of,
    listed,
    places,
    shown,
)
from neuroada_serve.train.turns import (
    LeftOut,
    Message,
    exchange,
    from_json,
    messages_of,
    text_of,
    weight_of,
)

_SHAPES = (
    "prompt and completion; messages; instruction, input and output; question and answer; "
    "text and label; or sentence1, sentence2 and label"
)
_KEYS: tuple[tuple[str, ...], ...] = (  # a row has all keys of one of these
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text", "label"),
    ("sentence", "label"),
    ("sentence1", "sentence2", "label"),
    ("premise", "hypothesis", "label"),
    ("question1", "question2", "label"),
    ("question", "sentence", "label"),
)
_ANSWERS = {keys[-1] for keys in _KEYS if len(keys) > 1}
_BESIDE: Mapping[str, tuple[str, ...]] = {  # what a row of a shape, by its first key, may have too
    "messages": ("system",),
    "conversations": ("system",),
    "instruction": ("input", "system", "history"),
    "prompt": ("system", "history"),
    "question": ("system",),
}
_MEANT: Mapping[str, Callable[[Any], bool]] = {  # whether a cell is what its column's name says
    "system": lambda value: isinstance(value, str),
    "history": lambda value: isinstance(from_json(value), list),
    "weight": lambda value: str(value).strip() in ("0", "1", "0.0", "1.0", "True", "False"),
}
_OURS = tuple(
    dict.fromkeys(
        [*(k for keys in _KEYS for k in keys), "input", *_MEANT, "choices"]  # choices: of scoring
    )
)
_MOST_GAPS = 0.5  # share of the rows: with more, the wrong column is read or answers lack yet


@dataclass(frozen=True)
class Row:
    """One question and its answer.

    number: of its line or row in the data, see `train.rows.place`.
    messages: the conversation before the answer, for the chat template.
    text: the same as a plain prompt.
    answer: the text that the model should give.
    raw: all cells of the row, by our names where the data's columns match them.
    """

    number: int
    messages: tuple[dict[str, Any], ...]
    text: str
    answer: str
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Rows:
    """The rows of a data set.

    notes: remarks on how they were read, as clauses.
    classes: the names of their labels in order, where the data says that.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def tell(self, data: Data, notify: Callable[[str], None] | None) -> None:
        """Report the notes as a sentence, if there are any."""
        if self.notes and notify is not None:
            notify(f"{data.name}: {'; '.join(self.notes)}.")


def read_rows(
    data: Data,
    columns: Mapping[str, str] | None = None,
    *,
    labels: Collection[str] | None = None,
    also_used: Collection[str] = (),
) -> Rows:
    """Read the rows of a file or of the hub, see `read_records`.

    Rows in which a question or an answer is missing are left out and noted, unless they are most.

    Args:
        columns: our keys -> the data's, as {"prompt": "question", "completion": "reply"}.
        labels: with a collection, answers of every shape are labels; these are the known ones,
            empty if the rows say which there are. None: only rows with a label have labels.
        also_used: columns that the caller reads, which are then not noted as unused.

    Raises:
        DataError: no such file, no rows, or no columns of a known shape; or names the rows at
            fault.
    """
    # 1. What the data has.
    records = read_records(data)
    faults = Faults(data)
    for number, record in records.rows:
        if isinstance(record, RecordFault):
            faults.add(number, str(record))
    found = [(number, r) for number, r in records.rows if not isinstance(r, RecordFault)]
    if not found:
        faults.raise_if_any()
        raise DataError(f"{data} has no rows; they need {_SHAPES}")
    names = list(dict.fromkeys(name for _, record in found for name in record))
    known = known_columns(data, [*names, *records.doubled], columns or {}, _OURS)
    _refuse_unknown_shape(data, records, [record for _, record in found], names, known)

    # 2. Each row by itself.
    by_name = not columns
    reader = _Reader(known, by_name, _not_meant(found, known) if by_name else frozenset())
    rows: list[Row] = []
    left_out: dict[str, list[int]] = {}
    gaps = 0
    for number, record in found:
        try:
            rows.append(reader.row(number, record))
        except RecordFault as fault:
            faults.add(number, str(fault))
        except LeftOut as reason:
            left_out.setdefault(str(reason), []).append(number)
            gaps += reason.is_gap
    faults.raise_if_any()
    told = [
        f"{counted(len(numbers), 'row')} left out with {reason} ({places(data, numbers)})"
        for reason, numbers in left_out.items()
    ]
    if not rows or gaps > _MOST_GAPS * (len(rows) + gaps):
        raise DataError(
            f"{data}: of {counted(len(found), 'row')} {len(rows)} can be used; {'; '.join(told)}"
        )

    # 3. All of them together.
    labelled = {row.number for row in rows} if labels is not None else reader.labelled
    rows, said = _with_clean_answers(rows, labelled, labels or ())
    notes = [*records.notes, *told, *said, *reader.notes(names, also_used)]
    return Rows(tuple(rows), tuple(notes), _classes(records, known, rows) if labelled else ())


def _refuse_unknown_shape(
    data: Data,
    records: Records,
    found: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    known: Mapping[str, str],
) -> None:
    """Refuse columns that make no row, once for all rows."""
    doubled = {known[name]: name for name in records.doubled if name in known}
    kinds = {frozenset(known[n] for n in record if n in known) for record in found}
    needed = {key for kind in kinds for keys in _shapes_of(kind.union(doubled)) for key in keys}
    if twice := [doubled[key] for key in doubled.keys() & needed]:
        raise DataError(f"{data}: the header names {listed(twice)} twice")
    if any(map(_shapes_of, kinds)):
        return
    if isinstance(data, Path) and kind_of(data) in ("csv", "tsv") and may_be_a_row(names, found):
        hint = "its first line may be a row: put a line with the columns' names above it"
    elif (fitting := fitting_columns(names, found)) is not None:
        hint = f"these may be meant: {fitting}"
    else:
        hint = "name yours, as in --columns prompt=question,completion=reply"
    names = [*names, *records.doubled]
    raise DataError(f"{data} has the columns {listed(names)}; rows need {_SHAPES}; {hint}")


def _classes(records: Records, known: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of the labels in the data's own order, if it gives one and rows have no
    others."""
    answers = {row.answer for row in rows}
    for column, names in records.classes.items():
        if known.get(column) in _ANSWERS and len(names) > 1 and answers <= set(names):
            return names
    return ()


def _not_meant(
    found: Sequence[tuple[int, Mapping[str, Any]]], known: Mapping[str, str]
) -> frozenset[str]:
    """Return columns whose name means something else here: a weight in kilograms, a clinical
    history."""
    others = set()
    for theirs, ours in known.items():
        if ours in _MEANT:
            cells = [r[theirs] for _, r in found if not is_blank(r.get(theirs))]
            looked_at = cells if ours == "weight" else cells[:1]
            if not all(map(_MEANT[ours], looked_at)):
                others.add(ours)
    return frozenset(others)


def _with_clean_answers(
    rows: list[Row], labelled: Collection[int], known: Collection[str]
) -> tuple[list[Row], list[str]]:
    """Clean labels as `clean_labels` does, and return the rows with remarks on their answers."""
    labels = [row.answer for row in rows if row.number in labelled]
    cleaned, notes = clean_labels(labels, known)
    named = iter(cleaned)
    rows = [replace(r, answer=next(named)) if r.number in labelled else r for r in rows]
    others = [row.answer for row in rows if row.number not in labelled]
    alike = {answer for group in groups_by(str.strip, others) for answer in group}
    spaced = sum(answer in alike and answer != answer.strip() for answer in others)
    if spaced:
        notes.append(f"{counted(spaced, 'answer')} like others but for spaces around them")
    return rows, notes


# --- one row -----------------------------------------------------------------------------------


class _Reader:
    """Reads rows from records, and collects remarks on all of them.

    known: the data's columns -> ours. by_name: known by their own names, not by --columns.
    not_meant: our columns that are ignored.
    labelled: numbers of the rows whose answer is a label.
    """

    def __init__(self, known: Mapping[str, str], by_name: bool, not_meant: frozenset[str]) -> None:
        self._known, self._by_name, self._not_meant = known, by_name, not_meant
        self._theirs = {ours: shown(theirs) for theirs, ours in known.items()}
        self.labelled: set[int] = set()
        self._used: set[str] = set()
        self._unlearnt = 0
        self._unused_of_answers: set[str] = set()

    def row(self, number: int, record: Mapping[str, Any]) -> Row:
        """Read one record.

        Raises:
            RecordFault: what is wrong with it.
            LeftOut: there is nothing to learn from it.
        """
        if all(map(is_blank, record.values())):
            raise LeftOut("all cells blank", is_gap=False)
        raw = {self._known[name]: cell for name, cell in record.items() if name in self._known}
        shapes = _shapes_of(frozenset(raw))
        if len(shapes) > 1:
            names = " and ".join(", ".join(keys) for keys in shapes)
            first = ",".join(f"{key}={key}" for key in shapes[0])
            raise RecordFault(f"could be read as {names}; say which, as in --columns {first}")
        if not shapes:
            raise RecordFault(f"has {listed(sorted(raw))}; rows need {_SHAPES}")
        [keys] = shapes
        beside = {*_BESIDE.get(keys[0] if keys[-1] != "label" else "", ()), "weight"}
        beside -= self._not_meant
        self._used |= {*keys, *beside}
        given = {key: raw[key] for key in beside if not is_blank(raw.get(key))}
        if not weight_of(given.pop("weight", 1)):
            raise LeftOut("weight 0", is_gap=False)
        row = self._read(number, keys, raw, given)
        return replace(row, raw=raw if self._by_name else record)

    def notes(self, names: Sequence[str], also_used: Collection[str]) -> list[str]:
        """Say which columns were used, and which answers were not learnt."""
        notes = []
        used = self._used | set(also_used)
        renamed = [n for n in names if self._by_name and self._known[n] in used - {n}]
        if renamed:
            ours = [self._known[name] for name in renamed]
            notes.append(f"{listed(renamed)} read as {listed(ours)}")
        if context := [
            n for n in names if self._known.get(n) in self._used & {"system", "history"}
        ]:
            notes.append(f"{listed(context)} read as what was said before")
        if unused := [n for n in names if self._known.get(n) not in used and n not in also_used]:
            notes.append(f"columns not used: {listed(unused)}")
        if self._unused_of_answers:
            notes.append(f"keys of answers not learnt: {listed(sorted(self._unused_of_answers))}")
        if self._unlearnt:
            what = counted(self._unlearnt, "earlier answer")
            notes.append(f"{what} of conversations read as context, not learnt")
        return notes

    def _read(
        self, number: int, keys: tuple[str, ...], raw: dict[str, Any], given: dict[str, Any]
    ) -> Row:
        if keys[0] in ("messages", "conversations"):
            [key] = keys
            return self._of_turns(number, self._turns(raw, key, "user"), given)
        if keys == ("prompt", "completion") and any(isinstance(raw[k], list | dict) for k in keys):
            turns = self._turns(raw, "prompt", "user")
            turns += self._turns(raw, "completion", "assistant")
            return self._of_turns(number, turns, given)
        *texts, answer = keys
        prompt = "\n".join(self._text(raw, key) for key in texts)
        if "input" in given:
            prompt += "\n" + text_of(given["input"], "input")
        if answer == "label":
            self.labelled.add(number)
        before = _before(given)
        self._unlearnt += sum(message["role"] == "assistant" for message in before)
        plain = _plain(before) + prompt + ("" if texts == ["prompt"] else "\n")
        return Row(number, (*before, _said("user", prompt)), plain, self._text(raw, answer))

    def _of_turns(self, number: int, turns: list[Message], given: dict[str, Any]) -> Row:
        before = _before(given)
        has_own = any(message["role"] in ("system", "developer") for message in turns[:1])
        if "system" in given and has_own:
            raise RecordFault("has a column system, and a system message")
        found = exchange([*before, *turns])
        self._unlearnt += found.unlearnt
        self._unused_of_answers |= found.unused
        return Row(number, found.messages, _plain(found.messages), found.answer)

    def _text(self, raw: Mapping[str, Any], key: str) -> str:
        name = self._theirs[key]
        if is_blank(raw[key]):
            raise LeftOut(f"an empty {name}")
        return text_of(raw[key], name)

    def _turns(self, raw: Mapping[str, Any], key: str, role: str) -> list[Message]:
        """Return a conversation, or a part of one that is a text."""
        value = raw[key]
        if is_blank(value) or value == []:
            raise LeftOut(f"an empty {self._theirs[key]}")
        if key in ("prompt", "completion") and not isinstance(value, list | dict):
            return [_said(role, self._text(raw, key))]
        return messages_of(value, self._theirs[key])


@cache
def _shapes_of(names: frozenset[str]) -> list[tuple[str, ...]]:
    """Return the shapes that a row of these columns has, without those that are part of another."""
    found = [keys for keys in _KEYS if names >= set(keys)]
    return [keys for keys in found if not any(set(keys) < set(other) for other in found)]


def _before(given: Mapping[str, Any]) -> list[Message]:
    """Return the messages that columns of their own hold."""
    messages = []
    if "system" in given:
        messages.append(_said("system", text_of(given["system"], "system")))
    history = from_json(given.get("history", []))
    if not isinstance(history, list):
        raise RecordFault(f"history must be a list, not {type(history).__name__}")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordFault(f"history[{number}] must be a question and an answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(_said(role, text_of(text, f"history[{number}]")))
    return messages


def _plain(messages: Sequence[Message]) -> str:
    return "".join(f"{message['content']}\n" for message in messages)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
