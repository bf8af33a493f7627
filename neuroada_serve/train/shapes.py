"""Records to rows: what a row of questions and answers may look like.

`train/rows.py` reads the records. One has keys of one of these shapes; others are ignored:
    messages [{"role", "content"}, ...]      the last message is the assistant's answer
    prompt, completion
    instruction, output, and input if there is one
    question, answer
    text (or sentence), label                the label's name is the answer
    sentence1, sentence2, label; premise, hypothesis, label; question1, question2, label;
    question, sentence, label                pairs, as GLUE has them: one text, one below the other

As a plain prompt a `prompt` stays as it is; the contents of the other shapes get a line break
after each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.train.rows import Data, Faults, RecordFault, read_records

_SHAPES = (
    '{"messages"}, {"prompt", "completion"}, {"instruction", "input", "output"}, '
    '{"question", "answer"}, {"text", "label"} or {"sentence1", "sentence2", "label"}'
)
_KEYS: tuple[tuple[str, ...], ...] = (  # a row has all keys of one of these
    ("messages",),
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


@dataclass(frozen=True)
class Row:
    """One question and its answer.

    number: its line or row in its data, see `train.rows.place`.
    messages: the conversation before the answer, as sent to the chat template.
    text: the same as a plain prompt.
    answer: what the model should say.
    raw: all of the row.
    """

    number: int
    messages: tuple[dict[str, Any], ...]
    text: str
    answer: str
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_rows(data: Data, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a file or of the hub, see `read_records`.

    Args:
        columns: our keys -> the data's, as {"prompt": "question", "completion": "reply"}.

    Raises:
        DataError: no such file, no rows, or rows of no known shape; the first faults are listed.
    """
    rows = []
    faults = Faults(data)
    for number, record in read_records(data):
        try:
            if isinstance(record, RecordFault):
                raise record
            row = _row(number, _renamed(record, columns or {}))
            rows.append(replace(row, raw=record))
        except RecordFault as fault:
            faults.add(number, str(fault))
    faults.raise_if_any()
    if not rows:
        raise DataError(f"{data} has no rows; it needs some of {_SHAPES}")
    return rows


def _renamed(raw: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if missing := sorted(set(columns.values()) - raw.keys()):
        raise RecordFault(f"has no {', '.join(missing)}, which --columns names")
    own = {key: raw[theirs] for key, theirs in columns.items()}
    return own if columns else dict(raw)


def _row(number: int, raw: dict[str, Any]) -> Row:
    found = [keys for keys in _KEYS if raw.keys() >= set(keys)]
    found = [keys for keys in found if not any(set(keys) < set(other) for other in found)]
    if len(found) > 1:
        names = " and ".join(", ".join(keys) for keys in found)
        raise RecordFault(f"could be read as {names}; say which with --columns")
    if not found:
        raise RecordFault(
            f"has keys {sorted(raw)}; expected {_SHAPES}, or name yours, as in "
            "--columns prompt=question,completion=reply"
        )
    if found == [("messages",)]:
        return _row_of_messages(number, raw["messages"])
    if found == [("instruction", "output")]:
        prompt = _text(raw, "instruction")
        if raw.get("input") not in (None, ""):
            prompt += "\n" + _text(raw, "input")
        return Row(number, (_user(prompt),), prompt + "\n", _text(raw, "output"))
    *texts, answer = found[0]
    prompt = "\n".join(_text(raw, key) for key in texts)
    if answer == "label":
        return Row(number, (_user(prompt),), prompt + "\n", _label(raw[answer]))
    after = "" if texts == ["prompt"] else "\n"
    return Row(number, (_user(prompt),), prompt + after, _text(raw, answer))


def _label(value: Any) -> str:
    """A label's name; numbers and booleans are names too."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordFault(f"label is {value}")
    if isinstance(value, bool | int | float):
        return str(value)
    return _text({"label": value}, "label")


def _row_of_messages(number: int, messages: Any) -> Row:
    if not isinstance(messages, list) or len(messages) < 2:
        raise RecordFault("messages must be a list of at least a question and an answer")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordFault(f'messages[{position}] must be an object {{"role", "content"}}')
        _string(message, "content", f"messages[{position}].")
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise RecordFault(f"the last message must have role 'assistant', not {role!r}")
    *question, last = messages
    answer = _text(last, "content", f"messages[{len(question)}].")
    text = "".join(f"{message['content']}\n" for message in question)
    return Row(number, tuple(question), text, answer)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _text(raw: dict[str, Any], key: str, path: str = "") -> str:
    value = _string(raw, key, path)
    if not value.strip():
        raise RecordFault(f"{path}{key} is empty")
    return value


def _string(raw: dict[str, Any], key: str, path: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise RecordFault(f"{path}{key} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordFault(f"{path}{key} has half a surrogate pair, which is no text") from None
    return value
