"""Rows in: a file of questions and answers becomes token ids to train and score on.

`train/rows.py` reads it, `train/shapes.py` says what a row may look like.

With prompt_format "chat", and a base that has a chat template, the prompt goes through the template
(a `prompt`, or an instruction with its input below it, as one user message). Otherwise it is plain
text: a `prompt` as it is, the contents of the other shapes with a line break after each.

Of a classifier (task_type SEQ_CLS) the prompt is the plain text, without a last line break, and the
answer its label's number; of a regression the label is the number that is learnt.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from neuroada_serve.adapters.format import is_regression
from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import (
    encode_chat,
    encode_continuation,
    encode_exchange,
    encode_text,
    renders_chats,
)
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.tasks import SEQ_CLS, task_faults
from neuroada_serve.train.labels import sorted_labels
from neuroada_serve.train.rows import Data, Faults, counted, place
from neuroada_serve.train.shapes import Row, read_rows

_MUCH_ALIKE = 0.5  # share of one answer from which it is told
_MOST_CLASSES_TOLD = 8


@dataclass(frozen=True)
class Example:
    """A row as token ids. The answer ends with the base's end token; only it is trained on.

    target: the number that a regression is to give. question: the row's text, for people.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    target: float | None = None
    question: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt_ids, "the first answer token needs one before it"
        assert self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows, told before anything is trained.

    too_long: left out. cut: whose prompts lost their beginning. tokens: of the rows used, prompts
    and answers together; answer_tokens: those that are trained on or scored. longest: tokens of
    the longest row used. duplicates: rows that repeat an earlier one to the letter. seen: held-out
    rows whose prompt, as cut, is trained on.
    most_frequent: (an answer, its share of the training rows).
    classes: (label, training rows) of a classifier.
    numbers: (lowest, highest) training label of a regression.
    notes: what else is to be said of how the rows were read, as clauses.
    """

    rows: int
    train_rows: int
    heldout_rows: int
    too_long: int
    cut: int
    tokens: int
    answer_tokens: int
    longest: int
    duplicates: int
    seen: int
    most_frequent: tuple[str, float]
    classes: tuple[tuple[str, int], ...] = ()
    numbers: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.train_rows} to train on, {self.heldout_rows} held out"
        if self.too_long:
            text += f", {self.too_long} left out as too long"
        if self.cut:
            text += f", {self.cut} prompts cut at their beginning"
        text += f"; {self.tokens} tokens, "
        if not self.classes and self.numbers is None:
            text += f"{self.answer_tokens} of them in answers, "
        text += f"the longest row {self.longest}"
        if self.classes:
            told = [f"{label} {count}" for label, count in self.classes[:_MOST_CLASSES_TOLD]]
            more = len(self.classes) - len(told)
            text += f"; {len(self.classes)} classes: {', '.join(told)}" + ", ..." * bool(more)
        if self.numbers is not None:
            low, high = self.numbers
            text += f"; labels from {low:g} to {high:g}"
        if self.duplicates:
            text += f"; {self.duplicates} rows repeat others to the letter"
        if self.seen:
            text += f"; {self.seen} held-out prompts, as cut, are trained on: raise --max-length"
        answer, share = self.most_frequent
        if share >= _MUCH_ALIKE:
            text += f"; {share:.0%} of the answers are {answer[:40]!r}"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class TrainingData:
    """The two sides of a split, what was left out, and a classifier's labels."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    report: DataReport
    labels: tuple[str, ...] = ()


def load_data(base: BaseModel, data: Data, config: TrainConfig) -> TrainingData:
    """Read, split and encode rows.

    Raises:
        DataError: names the data and the rows at fault, or says why no row is left to train on.
    """
    classifies = config.task_type == SEQ_CLS
    found = read_rows(data, config.columns, labels=config.labels if classifies else None)
    notes = list(found.notes)
    train_rows: Sequence[Row] = found.rows
    heldout_rows: Sequence[Row] = ()
    if config.eval_data is None:
        train_rows, heldout_rows = split_rows(found.rows, config.eval_fraction, config.seed)
    labels: tuple[str, ...] = ()
    if classifies:
        labels = _labels(data, train_rows, config.labels or found.classes)
    else:
        renders_chats(base, config.prompt_format)  # or refuses, once for all rows
    if config.eval_data is not None:
        apart = read_rows(config.eval_data, config.columns, labels=labels if classifies else None)
        heldout_rows = apart.rows
        notes += [f"of {config.eval_data.name}: {note}" for note in apart.notes]
        _refuse_shared_prompts(data, train_rows, config.eval_data, heldout_rows)
    most = min(config.max_length, base.max_model_len)

    def encode(row: Row) -> Example:
        if labels:
            example = encode_labelled(base, row, labels)
        else:
            example = encode_row(base, row, config.prompt_format)
        return replace(example, question=row.text.strip())

    train = _encode_rows(encode, data, train_rows)
    heldout = _encode_rows(encode, config.eval_data or data, heldout_rows)

    cuts = config.too_long == "cut"
    short_train = tuple(_fitted(train, most, cuts))
    short_heldout = tuple(_fitted(heldout, most, cuts))
    if not short_train:
        raise DataError(
            f"{data}: every training row is longer than {most} tokens, the shortest has "
            f"{min(map(len, train))}; "
            + (
                "raise --max-length"
                if most == config.max_length
                else "the base takes no longer ones: shorten the rows"
            )
        )
    used = short_train + short_heldout
    all_rows = [*train_rows, *heldout_rows]
    trained = {e.prompt_ids for e in short_train}
    targets = [e.target for e in short_train if e.target is not None]
    answers = Counter(row.answer for row in train_rows)
    [(answer, count)] = answers.most_common(1)
    report = DataReport(
        rows=len(all_rows),
        train_rows=len(short_train),
        heldout_rows=len(short_heldout),
        too_long=len(all_rows) - len(used),
        cut=sum(len(e) > most for e in (*train, *heldout)) - (len(all_rows) - len(used)),
        tokens=sum(map(len, used)),
        answer_tokens=sum(len(e.answer_ids) for e in used),
        longest=max(map(len, used)),
        duplicates=len(all_rows) - len({(row.text, row.answer) for row in all_rows}),
        seen=sum(e.prompt_ids in trained for e in short_heldout),
        most_frequent=(answer, count / len(train_rows)),
        classes=() if is_regression(labels) else tuple((name, answers[name]) for name in labels),
        numbers=(min(targets), max(targets)) if targets else None,
        notes=(*notes, *_of_tool_calls(base, all_rows, config)),
    )
    return TrainingData(short_train, short_heldout, report, labels)


def _labels(data: Data, rows: Sequence[Row], given: Sequence[str]) -> tuple[str, ...]:
    """A classifier's labels: as given, else those of the rows."""
    labels = tuple(given) or tuple(sorted_labels(row.answer for row in rows))
    if not given and is_regression(labels):
        raise DataError(
            f"{data}: all rows have the label {labels[0][:80]!r}; a classifier needs two, or more "
            "by --labels. To learn numbers name what they are: --labels score"
        )
    if faults := task_faults(SEQ_CLS, labels):
        raise DataError(f"{data}: {faults[0]}; a row's label, or --labels, names its class")
    return labels


def _fitted(examples: Iterable[Example], most: int, cuts: bool) -> Iterable[Example]:
    """Those of at most so many tokens; longer ones without their prompt's beginning, if `cuts`."""
    for example in examples:
        room = most - len(example.answer_ids)
        if len(example) <= most:
            yield example
        elif cuts and room >= 1:
            yield replace(example, prompt_ids=example.prompt_ids[-room:])


def _of_tool_calls(base: BaseModel, rows: Sequence[Row], config: TrainConfig) -> list[str]:
    """That the prompts' tool calls are lost, where they are: a template may know none."""
    count = sum(any("tool_calls" in message for message in row.messages) for row in rows)
    known = config.prompt_format == "chat" and "tool_calls" in str(base.tokenizer.chat_template)
    if not count or known:
        return []
    what = f"tool calls in the prompts of {counted(count, 'row')}"
    return [f"{what} not read: the prompt format knows none"]


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
        RequestError: the chat template refuses the messages, nothing is left of the prompt, or it
            has tokens that the base does not know.
    """
    chats = renders_chats(base, prompt_format)
    ids = encode_chat(base, row.messages) if chats else encode_text(base, row.text)
    if not ids:
        raise RequestError("the prompt has no tokens")
    return ids


def encode_row(base: BaseModel, row: Row, prompt_format: str) -> Example:
    """Token ids of a row: its prompt, and its answer with the end token.

    Raises:
        RequestError: see `encode_prompt`.
    """
    if renders_chats(base, prompt_format):
        prompt_ids, answer_ids = encode_exchange(base, row.messages, row.answer)
    else:
        prompt_ids, answer_ids = encode_continuation(base, row.text, row.answer)
    if not prompt_ids:
        raise RequestError("the prompt has no tokens")
    return Example(tuple(prompt_ids), tuple(answer_ids))


def encode_labelled(base: BaseModel, row: Row, labels: Sequence[str]) -> Example:
    """Token ids of a row's plain text, and its label's number in place of an answer; of a
    regression 0, and the label as the target.

    Raises:
        RequestError: its label is none of these, or no number, or nothing is left of the text.
    """
    target = _number(row.answer) if is_regression(labels) else None
    if target is None and row.answer not in labels:
        known = ", ".join(labels[:_MOST_CLASSES_TOLD])
        raise RequestError(f"label {row.answer[:80]!r} is none of {known}")
    ids = encode_text(base, row.text.removesuffix("\n"))
    if not ids:
        raise RequestError("the text has no tokens")
    return Example(tuple(ids), (0 if target is not None else labels.index(row.answer),), target)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"label {text[:80]!r} is no number; a regression learns numbers")
    return number


def _refuse_shared_prompts(
    data: Data, train_rows: Sequence[Row], eval_data: Data, heldout_rows: Sequence[Row]
) -> None:
    """Held-out rows that are trained on would score the memory."""
    trained = {row.text for row in train_rows}
    shared = [row.number for row in heldout_rows if row.text in trained]
    if shared:
        raise DataError(
            f"{len(shared)} prompts of {eval_data} are in {data} too, the first in "
            f"{place(eval_data, shared[0])}; held-out rows must not be trained on"
        )


def _encode_rows(
    encode: Callable[[Row], Example], data: Data, rows: Iterable[Row]
) -> list[Example]:
    examples = []
    faults = Faults(data)
    with quiet_transformers():  # the tokenizer warns of rows that we are about to leave out
        for row in rows:
            try:
                examples.append(encode(row))
            except RequestError as error:
                faults.add(row.number, str(error))
    faults.raise_if_any()
    return examples
