"""Read, split and encode the rows of a training run.

`train/files.py` reads a file's rows, `train/shapes.py` says what a row may look like, and the
objective (`train/objectives.py`) what its answer must be.

With prompt_format "chat", and a base that has a chat template, the prompt goes through the template
(a `prompt`, or an instruction with its input below it, as one user message). Otherwise it is plain
text: a `prompt` as it is, the contents of the other shapes with a line break after each. Tasks with
labels always take plain text, without a last line break.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.quiet import quiet_transformers
from neuroada_serve.tasks import Task, task_of
from neuroada_serve.train.examples import Example
from neuroada_serve.train.objectives import Objective, labels_to_read, objective_of
from neuroada_serve.train.rows import Data, Faults, counted, place
from neuroada_serve.train.shapes import Row, read_rows

_MUCH_ALIKE = 0.5  # share of one answer from which it is told


@dataclass(frozen=True)
class DataReport:
    """A summary of a run's rows, told before anything is trained.

    too_long: rows left out. cut: rows whose prompts lost their beginning.
    tokens: of the rows used, prompts and answers together. answer_tokens: those that are trained
        on or scored; None where answers are no texts.
    longest: tokens of the longest row used.
    answers: what the objective says of them, as a clause; empty where they are texts.
    duplicates: rows that repeat an earlier one to the letter.
    seen: held-out rows whose prompt, as cut, is trained on.
    most_frequent: (an answer, its share of the training rows).
    notes: further remarks on how the rows were read, as clauses.
    """

    rows: int
    train_rows: int
    heldout_rows: int
    too_long: int
    cut: int
    tokens: int
    answer_tokens: int | None
    longest: int
    answers: str
    duplicates: int
    seen: int
    most_frequent: tuple[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.rows} rows: {self.train_rows} to train on, {self.heldout_rows} held out"
        if self.too_long:
            text += f", {self.too_long} left out as too long"
        if self.cut:
            text += f", {self.cut} prompts cut at their beginning"
        text += f"; {self.tokens} tokens, "
        if self.answer_tokens is not None:
            text += f"{self.answer_tokens} of them in answers, "
        text += f"the longest row {self.longest}"
        if self.answers:
            text += f"; {self.answers}"
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
    """The two sides of a split, what is learnt from them, and a summary of the rows."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    objective: Objective
    report: DataReport

    @property
    def task(self) -> Task:
        """The task of the adapter to be trained."""
        return self.objective.task


def load_data(base: BaseModel, data: Data, config: TrainConfig) -> TrainingData:
    """Read, split and encode rows.

    Raises:
        DataError: names the data and the faulty rows, or says why no row is left to train on.
    """
    task = task_of(config.task_type, config.labels)
    found = read_rows(data, config.columns, labels=labels_to_read(task))
    notes = list(found.notes)
    train_rows: Sequence[Row] = found.rows
    heldout_rows: Sequence[Row] = ()
    if config.eval_data is None:
        train_rows, heldout_rows = split_rows(found.rows, config.eval_fraction, config.seed)
    objective = objective_of(base, data, train_rows, found.classes, config)
    if config.eval_data is not None:
        known = labels_to_read(objective.task)
        apart = read_rows(config.eval_data, config.columns, labels=known)
        heldout_rows = apart.rows
        notes += [f"of {config.eval_data.name}: {note}" for note in apart.notes]
        _refuse_shared_prompts(data, train_rows, config.eval_data, heldout_rows)
    most = min(config.max_length, base.max_model_len)

    def encode(row: Row) -> Example:
        return replace(objective.encode(base, row), question=row.text.strip())

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
    answers = Counter(row.answer for row in train_rows)
    [(answer, count)] = answers.most_common(1)
    report = DataReport(
        rows=len(all_rows),
        train_rows=len(short_train),
        heldout_rows=len(short_heldout),
        too_long=len(all_rows) - len(used),
        cut=sum(len(e) > most for e in (*train, *heldout)) - (len(all_rows) - len(used)),
        tokens=sum(map(len, used)),
        answer_tokens=None
        if objective.task.pools
        else sum(len(example.answer_ids) for example in used),
        longest=max(map(len, used)),
        answers=objective.describe(short_train),
        duplicates=len(all_rows) - len({(row.text, row.answer) for row in all_rows}),
        seen=sum(e.prompt_ids in trained for e in short_heldout),
        most_frequent=(answer, count / len(train_rows)),
        notes=(*notes, *_of_tool_calls(base, all_rows, config)),
    )
    return TrainingData(short_train, short_heldout, objective, report)


def _fitted(examples: Iterable[Example], most: int, cuts: bool) -> Iterable[Example]:
    """Yield examples of at most so many tokens, and if `cuts` longer ones without their prompt's
    beginning."""
    for example in examples:
        room = most - len(example.answer_ids)
        if len(example) <= most:
            yield example
        elif cuts and room >= 1:
            yield replace(example, prompt_ids=example.prompt_ids[-room:])


def _of_tool_calls(base: BaseModel, rows: Sequence[Row], config: TrainConfig) -> list[str]:
    """Report tool calls in the prompts that are lost because the template does not know them."""
    count = sum(any("tool_calls" in message for message in row.messages) for row in rows)
    known = config.prompt_format == "chat" and "tool_calls" in str(base.tokenizer.chat_template)
    if not count or known:
        return []
    what = f"tool calls in the prompts of {counted(count, 'row')}"
    return [f"{what} not read: the prompt format knows none"]


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, held out). The same rows, fraction and seed always give the same
    split.

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


def _refuse_shared_prompts(
    data: Data, train_rows: Sequence[Row], eval_data: Data, heldout_rows: Sequence[Row]
) -> None:
    """Refuse held-out rows that are trained on: they would score the memory."""
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
