"""Rows in: a JSON-lines file of questions and answers becomes token ids to train and score on.

A row is a JSON object of one of three shapes; other keys are ignored:
    {"messages": [{"role", "content"}, ...]}      the last message is the assistant's answer
    {"prompt", "completion"}
    {"instruction", "output"}, with "input" if there is one

With prompt_format "chat", and a base that has a chat template, the prompt goes through the template
(a `prompt`, or an instruction with its input below it, as one user message). Otherwise it is plain
text: a `prompt` as it is, the contents of the other shapes with a line break after each.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import encode_chat, encode_text
from neuroada_serve.model.quiet import quiet_transformers

MAX_FAULTS = 10

_SHAPES = '{"messages"}, {"prompt", "completion"} or {"instruction", "input", "output"}'


@dataclass(frozen=True)
class Row:
    """One question and its answer.

    line: where it stands in its file, from 1.
    messages: the conversation before the answer, as sent to the chat template.
    text: the same as a plain prompt.
    answer: what the model should say.
    """

    line: int
    messages: tuple[dict[str, Any], ...]
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A row as token ids. The answer ends with the base's end token; only it is trained on."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.prompt_ids, "the first answer token needs one before it"
        assert self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class DataReport:
    """What became of a file's rows. tokens: of the rows used, prompts and answers together."""

    rows: int
    train_rows: int
    heldout_rows: int
    too_long: int
    tokens: int

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.train_rows} to train on, {self.heldout_rows} held out"
        if self.too_long:
            text += f", {self.too_long} left out as too long"
        return f"{text}; {self.tokens} tokens"


@dataclass(frozen=True)
class TrainingData:
    """The two sides of a split, and what was left out."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    report: DataReport


def load_data(base: BaseModel, path: Path, config: TrainConfig) -> TrainingData:
    """Read, split and encode a file of rows.

    Raises:
        DataError: names the file and the lines at fault, or says why no row is left to train on.
    """
    rows = read_rows(path)
    if config.eval_data is None:
        train_rows, heldout_rows = split_rows(rows, config.eval_fraction, config.seed)
    else:
        train_rows, heldout_rows = rows, read_rows(config.eval_data)
        _refuse_shared_prompts(path, train_rows, config.eval_data, heldout_rows)
    most = min(config.max_length, base.max_model_len)
    train = _encode_rows(base, path, train_rows, config.prompt_format)
    heldout = _encode_rows(base, config.eval_data or path, heldout_rows, config.prompt_format)

    short_train = tuple(e for e in train if len(e) <= most)
    short_heldout = tuple(e for e in heldout if len(e) <= most)
    if not short_train:
        raise DataError(
            f"{path}: every training row is longer than {most} tokens, the shortest has "
            f"{min(map(len, train))}; "
            + (
                "raise --max-length"
                if most == config.max_length
                else "the base takes no longer ones: shorten the rows"
            )
        )
    used = short_train + short_heldout
    report = DataReport(
        rows=len(train_rows) + len(heldout_rows),
        train_rows=len(short_train),
        heldout_rows=len(short_heldout),
        too_long=len(train_rows) + len(heldout_rows) - len(used),
        tokens=sum(map(len, used)),
    )
    return TrainingData(short_train, short_heldout, report)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; blank lines are skipped.

    Raises:
        DataError: no such file, no rows, or rows of no known shape; the first faults are listed.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    rows = []
    faults = _Faults(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(number, line))
        except _RowFault as fault:
            faults.add(number, str(fault))
    faults.raise_if_any()
    if not rows:
        raise DataError(f"data file {path} has no rows; it needs one JSON object a line: {_SHAPES}")
    return rows


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out). The same rows, fraction and seed always give the same split.

    Rows with the same prompt stay on one side, so the held-out side is never seen in training.
    Where fraction is above 0 at least one prompt is held out, if there are two. Prompts are drawn
    by a hash of seed and prompt: the order of rows does not matter.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.messages, sort_keys=True), []).append(row)
    heldout_prompts: set[str] = set()
    if fraction > 0 and len(groups) > 1:
        drawn = sorted(groups, key=lambda p: hashlib.sha256(f"{seed}\n{p}".encode()).digest())
        room = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        for prompt in drawn:
            if len(groups[prompt]) <= room:
                heldout_prompts.add(prompt)
                room -= len(groups[prompt])
        if not heldout_prompts:
            heldout_prompts.add(min(drawn, key=lambda p: len(groups[p])))
    train: list[Row] = []
    heldout: list[Row] = []
    for prompt, group in groups.items():
        (heldout if prompt in heldout_prompts else train).extend(group)
    return train, heldout


def encode_prompt(base: BaseModel, row: Row, prompt_format: str) -> list[int]:
    """Token ids of a row's prompt, up to where its answer begins.

    Args:
        prompt_format: "chat" or "plain"; chat falls back on plain where the base has no template.

    Raises:
        RequestError: the chat template refuses the messages, or nothing is left of the prompt.
    """
    if prompt_format == "chat" and base.has_chat_template:
        ids = encode_chat(base, row.messages)
    else:
        ids = encode_text(base, row.text)
    if not ids:
        raise RequestError("the prompt has no tokens")
    return ids


def encode_row(base: BaseModel, row: Row, prompt_format: str) -> Example:
    """Token ids of a row: its prompt, and its answer with the end token.

    Raises:
        RequestError: see `encode_prompt`.
    """
    prompt_ids = encode_prompt(base, row, prompt_format)
    answer_ids = base.tokenizer(row.answer, add_special_tokens=False).input_ids
    return Example(tuple(prompt_ids), (*answer_ids, end_token_id(base)))


def end_token_id(base: BaseModel) -> int:
    """The token that ends an answer: the tokenizer's own, else the first of the model's.

    Raises:
        DataError: the base has none, so it could not learn where to stop.
    """
    if base.tokenizer.eos_token_id is not None:
        return int(base.tokenizer.eos_token_id)
    if not base.eos_token_ids:
        raise DataError(
            f"base {base.spec.name!r} has no end token (eos_token_id in its tokenizer or "
            "generation config), so answers would have no end"
        )
    return min(base.eos_token_ids)


def _refuse_shared_prompts(
    path: Path, train_rows: Sequence[Row], eval_path: Path, heldout_rows: Sequence[Row]
) -> None:
    """Held-out rows that are trained on would score the memory."""
    trained = {row.text for row in train_rows}
    shared = [row.line for row in heldout_rows if row.text in trained]
    if shared:
        raise DataError(
            f"{len(shared)} prompts of {eval_path} are in {path} too, the first on line "
            f"{shared[0]}; held-out rows must not be trained on"
        )


def _encode_rows(
    base: BaseModel, path: Path, rows: Iterable[Row], prompt_format: str
) -> list[Example]:
    examples = []
    faults = _Faults(path)
    with quiet_transformers():  # the tokenizer warns of rows that we are about to leave out
        for row in rows:
            try:
                examples.append(encode_row(base, row, prompt_format))
            except RequestError as error:
                faults.add(row.line, str(error))
    faults.raise_if_any()
    return examples


# --- one line ----------------------------------------------------------------------------------


class _RowFault(Exception):
    """What is wrong with one line."""


class _Faults:
    """The faults of a file: the first in full, the rest as a number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shown: list[str] = []
        self._more = 0

    def add(self, line: int, fault: str) -> None:
        if len(self._shown) < MAX_FAULTS:
            self._shown.append(f"  line {line}: {fault}")
        else:
            self._more += 1

    def raise_if_any(self) -> None:
        if not self._shown:
            return
        count = len(self._shown) + self._more
        lines = [f"{self._path} has {count} unusable {'row' if count == 1 else 'rows'}:"]
        lines += self._shown
        if self._more:
            lines.append(f"  and {self._more} more")
        raise DataError("\n".join(lines))


def _row(number: int, line: bytes) -> Row:
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _RowFault("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _RowFault(
            f"not valid JSON ({error.msg}, column {error.colno}); each line must be one JSON object"
        ) from None
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        raise _RowFault("no JSON that can be read") from None
    if not isinstance(raw, dict):
        raise _RowFault(f"must be a JSON object, not {type(raw).__name__}: {_SHAPES}")
    if "messages" in raw:
        return _row_of_messages(number, raw["messages"])
    if "prompt" in raw and "completion" in raw:
        prompt = _text(raw, "prompt")
        return Row(number, (_user(prompt),), prompt, _text(raw, "completion"))
    if "instruction" in raw and "output" in raw:
        prompt = _text(raw, "instruction")
        if raw.get("input") not in (None, ""):
            prompt += "\n" + _text(raw, "input")
        return Row(number, (_user(prompt),), prompt + "\n", _text(raw, "output"))
    raise _RowFault(f"has keys {sorted(raw)}; expected {_SHAPES}")


def _row_of_messages(number: int, messages: Any) -> Row:
    if not isinstance(messages, list) or len(messages) < 2:
        raise _RowFault("messages must be a list of at least a question and an answer")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _RowFault(f'messages[{position}] must be an object {{"role", "content"}}')
        _string(message, "content", f"messages[{position}].")
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise _RowFault(f"the last message must have role 'assistant', not {role!r}")
    *question, last = messages
    answer = _text(last, "content", f"messages[{len(question)}].")
    text = "".join(f"{message['content']}\n" for message in question)
    return Row(number, tuple(question), text, answer)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _text(raw: dict[str, Any], key: str, path: str = "") -> str:
    value = _string(raw, key, path)
    if not value.strip():
        raise _RowFault(f"{path}{key} is empty")
    return value


def _string(raw: dict[str, Any], key: str, path: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise _RowFault(f"{path}{key} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowFault(f"{path}{key} has half a surrogate pair, which is no text") from None
    return value
