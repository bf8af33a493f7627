"""Match columns of the data, by name, to the ones that training knows."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from neuroada_serve.errors import DataError
from neuroada_serve.train.rows import is_blank, listed, shown

_LOOKED_AT = 200  # rows that a guess is made from
_MOST_LABELS = 20  # different ones
_LABEL_CHARS = 30  # of the longest

_PROMPTS = (
    *("prompt", "question", "instruction", "query", "input", "request", "user", "human"),
    *("text", "sentence", "message", "ticket", "review", "comment", "document", "article"),
    *("body", "content", "source", "title", "context", "subject"),
)
_ANSWERS = (
    *("completion", "answer", "response", "reply", "output", "assistant", "gpt", "bot"),
    *("solution", "summary", "translation", "result", "target", "chosen"),
)
_LABELS = (
    *("label", "labels", "class", "category", "sentiment", "intent", "topic", "tag", "team"),
    *("mood", "type", "gold", "target", "rating", "score"),
)


def known_columns(
    data: object, names: Sequence[str], columns: Mapping[str, str], ours: Collection[str]
) -> dict[str, str]:
    """Return the data's columns -> ours.

    Args:
        names: all of the data's.
        columns: ours -> the data's, by the user; then no others count. A name in another case, or
            with spaces around it, is taken for the one that there is.
        ours: all that mean something.

    Raises:
        DataError: the user names what is not there, or two columns could be one of ours.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    if columns:
        return _named(data, names, columns, ours, alike)
    found = {name: name for name in names}
    for key in ours:
        candidates = alike.get(key, [])
        if key in candidates or not candidates:
            continue
        if len(candidates) > 1:
            raise DataError(
                f"{data}: {listed(candidates)} could each be {key}; say which with --columns"
            )
        found[candidates[0]] = key
    return found


def _named(
    data: object,
    names: Sequence[str],
    columns: Mapping[str, str],
    ours: Collection[str],
    alike: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    if unknown := sorted(set(columns) - set(ours)):
        raise DataError(
            f"--columns names {listed(unknown)}, which no row needs; rows have {', '.join(ours)}"
        )
    found, absent = {}, []
    for key, theirs in columns.items():
        candidates = [theirs] if theirs in names else alike.get(_plain(theirs), [])
        if len(candidates) == 1:
            found[candidates[0]] = key
        else:
            absent.append(theirs)
    if absent:
        near = [n for name in absent for n in get_close_matches(_plain(name), alike, 1)]
        meant = f" (did you mean {listed([alike[n][0] for n in near])}?)" if near else ""
        raise DataError(
            f"{data} has no column {listed(absent)}, which --columns names{meant}; it has "
            f"{listed(names)}"
        )
    if len(found) < len(columns):
        raise DataError("--columns gives one column two names; a column can have one only")
    return found


def _plain(name: str) -> str:
    return name.strip().casefold()


def fitting_columns(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str | None:
    """Guess --columns that would make rows of these, by names and contents; None without a
    guess."""
    looked_at = records[:_LOOKED_AT]
    cells = {
        name: [r[name] for r in looked_at if not is_blank(r.get(name))]
        for name in names
        if name and "," not in name and "=" not in name
    }
    for name, values in cells.items():
        keys = _keys_of_turns(values[0]) if values else set()
        if "role" in keys or "from" in keys:
            return _flag(**{"messages" if "role" in keys else "conversations": name})
    texts = [name for name, values in cells.items() if _is_text(values)]
    named = {
        "prompt": _first(texts, _PROMPTS),
        "answer": _first(texts, (*_ANSWERS, *_LABELS)),
    }
    if named["answer"] is None:
        others = [name for name in texts if name != named["prompt"]]
        labels = [name for name in others if _are_labels(cells[name])]
        named["answer"] = next(iter(labels or others[-1:]), None)
    answer = named["answer"]
    others = [name for name in texts if name != answer]
    if answer is None or not others:
        return None
    prompt = named["prompt"]
    if prompt is None or prompt == answer:
        prompt = _first(others, _PROMPTS) or max(others, key=lambda n: _mean_chars(cells[n]))
    says_label = _first([answer], _ANSWERS) is None
    if says_label and (_first([answer], _LABELS) or _are_labels(cells[answer])):
        return _flag(text=prompt, label=answer)
    return _flag(prompt=prompt, completion=answer)


def _flag(**columns: str) -> str:
    return "--columns " + shlex.quote(",".join(f"{k}={shown(v)}" for k, v in columns.items()))


def _keys_of_turns(value: Any) -> set[str]:
    return (
        set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()
    )


def _is_text(values: Sequence[Any]) -> bool:
    """Tell whether a column can be a question, an answer or a label; different numbers in every row
    are an index."""
    if not values or not all(isinstance(v, str | bool | int | float) for v in values):
        return False
    written = [str(v).strip() for v in values]
    counts = all(v.isdecimal() for v in written) and len(set(written)) == len(written)
    return not (counts and len(written) > 1)


def _are_labels(values: Sequence[Any]) -> bool:
    written = {str(v).strip() for v in values}
    few = len(written) <= _MOST_LABELS and 2 * len(written) <= len(values)
    return few and max(map(len, written)) <= _LABEL_CHARS


def _mean_chars(values: Sequence[Any]) -> float:
    return sum(len(str(v)) for v in values) / len(values)


def _first(names: Sequence[str], words: Sequence[str]) -> str | None:
    """Return the name that is the earliest of these words, else the one that contains it as a
    word."""
    for parts in (lambda name: [_plain(name)], _words):
        for word in words:
            for name in names:
                if word in parts(name):
                    return name
    return None


def _words(name: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in _plain(name)).split()


def may_be_a_row(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a table's header looks like one of its rows: a sentence, or a cell that comes
    again below it."""
    if any(len(name.split()) > 4 for name in names):
        return True
    return any(
        name and any(str(record.get(name)).strip() == name for record in records) for name in names
    )
