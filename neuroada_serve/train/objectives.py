"""Objectives of training: for each task the contents of a row, the loss, the scores and a baseline.

WriteText     the answer's tokens, the end token among them
PickLabel     one of a few labels, by the text's last token
GiveNumber    a number, by the text's last token
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import encode_text, renders_chats
from neuroada_serve.tasks import (
    CAUSAL_LM,
    GENERATE,
    SEQ_CLS,
    Classify,
    Generate,
    Regress,
    Task,
    TaskType,
    task_faults,
    task_of,
)
from neuroada_serve.train.batches import Predictions, collate, collate_packed, predict
from neuroada_serve.train.correlation import pearson
from neuroada_serve.train.examples import Example, encode_row
from neuroada_serve.train.head import TaskHead, task_head
from neuroada_serve.train.labels import sorted_labels
from neuroada_serve.train.rows import Data
from neuroada_serve.train.shapes import Row

_MOST_LABELS_TOLD = 8
_MOST_TOKENS = 64  # of a sample answer


@dataclass(frozen=True)
class Baseline:
    """The score of giving every held-out row one and the same answer.

    answer: the one that scores best. figure, loss: None where there is none to speak of.
    """

    answer: str
    figure: float | None
    loss: float | None = None


class Objective(Protocol):
    """The training objective of a task."""

    @property
    def task(self) -> Task: ...

    @property
    def prompt_format(self) -> str:
        """The form in which rows are encoded: chat or plain."""
        ...

    figure_by: ClassVar[str | None]
    """A remark on how the score is taken; None where it needs none."""

    def head(self, model: Any, seed: int) -> AbstractContextManager[TaskHead | None]:
        """Give a model the task's head inside a block; None where it keeps its own."""
        ...

    def encode(self, base: BaseModel, row: Row) -> Example:
        """Return a row's token ids.

        Raises:
            RequestError: the row lacks what the task needs.
        """
        ...

    def describe(self, train: Sequence[Example]) -> str:
        """Say what the answers of training rows are, as a clause; empty where they are texts."""
        ...

    def collate(self, examples: Sequence[Example], packed: bool = False) -> dict[str, Tensor]:
        """Make a batch of examples; packed: without padding."""
        ...

    def loss(self, found: Predictions) -> Tensor:
        """Return the loss of a batch, summed over its targets."""
        ...

    def outcomes(self, found: Predictions) -> Tensor:
        """Return [rows, ...] what `figure` needs of a batch's rows."""
        ...

    def figure(self, outcomes: Tensor) -> float:
        """Return the score beside the loss, of the outcomes of all rows."""
        ...

    def baseline(
        self, base: BaseModel, train: Sequence[Example], heldout: Sequence[Example]
    ) -> Baseline | None:
        """Return what the best constant answer scores; None where no answer comes twice."""
        ...

    def sample(self, base: BaseModel, example: Example) -> tuple[str, str]:
        """Return the right answer of an example, and the model's."""
        ...


class _AnswerLast:
    """The head and the batches of objectives whose answer follows the prompt."""

    task: Task

    def head(self, model: Any, seed: int) -> AbstractContextManager[TaskHead | None]:
        return task_head(model, self.task.head_rows, seed)

    def collate(self, examples: Sequence[Example], packed: bool = False) -> dict[str, Tensor]:
        return (collate_packed if packed else collate)(examples)


@dataclass(frozen=True)
class WriteText(_AnswerLast):
    """Learn to write answers.

    prompt_format: chat or plain.
    end_ids: tokens that end an answer as well as the one an example has.
    """

    prompt_format: str = "plain"
    end_ids: frozenset[int] = frozenset()
    task: Generate = GENERATE

    figure_by: ClassVar[str | None] = "teacher forcing"

    def encode(self, base: BaseModel, row: Row) -> Example:
        return encode_row(base, row, self.prompt_format)

    def describe(self, train: Sequence[Example]) -> str:
        return ""

    def loss(self, found: Predictions) -> Tensor:
        return F.cross_entropy(found.logits, found.targets, reduction="sum")

    def outcomes(self, found: Predictions) -> Tensor:
        """Return [rows] bool: every answer token is the first choice after the true ones before it,
        and at the end any token that ends an answer is. So greedy decoding gives this answer."""
        ends = torch.tensor(sorted(self.end_ids), dtype=torch.long, device=found.logits.device)
        chosen = found.logits.argmax(dim=-1)
        matches = chosen == found.targets
        last = found.is_answer.sum(dim=1).cumsum(dim=0) - 1  # where each row's answer ends
        matches[last] |= torch.isin(chosen[last], ends)
        right = ~found.is_answer
        right[found.is_answer] = matches
        return right.all(dim=1)

    def figure(self, outcomes: Tensor) -> float:
        return _share(outcomes)

    def baseline(
        self, base: BaseModel, train: Sequence[Example], heldout: Sequence[Example]
    ) -> Baseline | None:
        ids, count = _commonest(train)
        if count == 1:
            return None
        return Baseline(_text(base, ids), sum(e.answer_ids == ids for e in heldout) / len(heldout))

    @torch.no_grad()
    def sample(self, base: BaseModel, example: Example) -> tuple[str, str]:
        """Decode greedily, up to an end token or somewhat beyond the right answer's length."""
        ends = {*base.eos_token_ids, example.answer_ids[-1]}
        device = next(base.model.parameters()).device
        ids = torch.tensor([example.prompt_ids], device=device)
        answer: list[int] = []
        cache = None
        while len(answer) < min(_MOST_TOKENS, len(example.answer_ids) + 8):
            out = base.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
            ids = torch.tensor([[token]], device=device)
        return _text(base, example.answer_ids), _text(base, answer)


@dataclass(frozen=True)
class PickLabel(_AnswerLast):
    """Learn to classify plain texts; an example's answer is the number of its label."""

    task: Classify

    prompt_format: ClassVar[str] = "plain"
    figure_by: ClassVar[str | None] = None

    def encode(self, base: BaseModel, row: Row) -> Example:
        labels = self.task.labels
        if row.answer not in labels:
            known = ", ".join(labels[:_MOST_LABELS_TOLD])
            raise RequestError(f"label {row.answer[:80]!r} is none of {known}")
        return Example(_text_ids(base, row), (labels.index(row.answer),))

    def describe(self, train: Sequence[Example]) -> str:
        labels, counts = self.task.labels, Counter(example.answer_ids[0] for example in train)
        told = [f"{name} {counts[i]}" for i, name in enumerate(labels[:_MOST_LABELS_TOLD])]
        more = ", ..." if len(labels) > len(told) else ""
        return f"{len(labels)} classes: {', '.join(told)}{more}"

    def loss(self, found: Predictions) -> Tensor:
        return F.cross_entropy(found.logits, found.targets, reduction="sum")

    def outcomes(self, found: Predictions) -> Tensor:
        """Return [rows] bool: the right label is the likeliest."""
        return found.logits.argmax(dim=-1) == found.targets

    def figure(self, outcomes: Tensor) -> float:
        return _share(outcomes)

    def baseline(
        self, base: BaseModel, train: Sequence[Example], heldout: Sequence[Example]
    ) -> Baseline | None:
        ids, _ = _commonest(train)
        share = sum(e.answer_ids == ids for e in heldout) / len(heldout)
        return Baseline(self.task.labels[ids[0]], share)

    def sample(self, base: BaseModel, example: Example) -> tuple[str, str]:
        labels, best = self.task.labels, int(_outputs(base, example).argmax())
        return labels[example.answer_ids[0]], labels[best]


@dataclass(frozen=True)
class GiveNumber(_AnswerLast):
    """Learn the numbers that rows have as labels."""

    task: Regress

    prompt_format: ClassVar[str] = "plain"
    figure_by: ClassVar[str | None] = None

    def encode(self, base: BaseModel, row: Row) -> Example:
        try:
            number = float(row.answer)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RequestError(
                f"label {row.answer[:80]!r} is not a number; a regression learns numbers"
            )
        return Example(_text_ids(base, row), (0,), number)

    def describe(self, train: Sequence[Example]) -> str:
        numbers = _numbers(train)
        return f"labels from {min(numbers):g} to {max(numbers):g}"

    def loss(self, found: Predictions) -> Tensor:
        return (found.logits.squeeze(1) - found.targets).square().sum()

    def outcomes(self, found: Predictions) -> Tensor:
        """Return [rows, 2] float32: the number given, and the true one."""
        return torch.cat([found.logits, found.targets[:, None]], dim=1)

    def figure(self, outcomes: Tensor) -> float:
        given, true = outcomes.T.tolist()
        return pearson(given, true)

    def baseline(
        self, base: BaseModel, train: Sequence[Example], heldout: Sequence[Example]
    ) -> Baseline | None:
        numbers = _numbers(train)
        mean = sum(numbers) / len(numbers)
        squares = [(number - mean) ** 2 for number in _numbers(heldout)]
        return Baseline(f"{mean:.4g}", None, sum(squares) / len(squares))

    def sample(self, base: BaseModel, example: Example) -> tuple[str, str]:
        return f"{example.target:.4g}", f"{_outputs(base, example).item():.4g}"


# --- which one ---------------------------------------------------------------------------------


def labels_to_read(task: Task) -> Collection[str] | None:
    """Return what `read_rows` takes as labels: None where answers are texts."""
    return task.labels if task.pools else None


def objective_of(
    base: BaseModel, data: Data, rows: Sequence[Row], classes: Sequence[str], config: TrainConfig
) -> Objective:
    """Return the objective of a run.

    Args:
        rows: to train on.
        classes: the names of their labels in order, where the data says that.

    Raises:
        DataError: the rows have no labels that make a task.
        RequestError: the base's chat template cannot render a conversation.
    """
    return _OBJECTIVES[config.task_type](base, data, rows, classes, config)


def _write_text(
    base: BaseModel, data: Data, rows: Sequence[Row], classes: Sequence[str], config: TrainConfig
) -> Objective:
    prompt_format = "chat" if renders_chats(base, config.prompt_format) else "plain"
    return WriteText(prompt_format, frozenset(base.eos_token_ids))


def _learn_labels(
    base: BaseModel, data: Data, rows: Sequence[Row], classes: Sequence[str], config: TrainConfig
) -> Objective:
    labels = tuple(config.labels or classes) or tuple(sorted_labels(row.answer for row in rows))
    if faults := task_faults(SEQ_CLS, labels):
        raise DataError(f"{data}: {faults[0]}; a row's label, or --labels, names its class")
    task = task_of(SEQ_CLS, labels)
    if isinstance(task, Classify):
        return PickLabel(task)
    if not config.labels:
        raise DataError(
            f"{data}: all rows have the label {labels[0][:80]!r}; a classifier needs two, or more "
            "by --labels. To learn numbers name what they are: --labels score"
        )
    return GiveNumber(Regress(labels))


_OBJECTIVES: Mapping[
    TaskType,
    Callable[[BaseModel, Data, Sequence[Row], Sequence[str], TrainConfig], Objective],
] = {CAUSAL_LM: _write_text, SEQ_CLS: _learn_labels}


# --- what several need -------------------------------------------------------------------------


def _share(outcomes: Tensor) -> float:
    return int(outcomes.sum()) / len(outcomes)


def _commonest(examples: Sequence[Example]) -> tuple[tuple[int, ...], int]:
    """Return the commonest answer, and how often it comes."""
    [(ids, count)] = Counter(example.answer_ids for example in examples).most_common(1)
    return ids, count


def _numbers(examples: Sequence[Example]) -> list[float]:
    return [example.target for example in examples if example.target is not None]


def _text(base: BaseModel, ids: Sequence[int]) -> str:
    return str(base.tokenizer.decode(list(ids), skip_special_tokens=True))


def _text_ids(base: BaseModel, row: Row) -> tuple[int, ...]:
    """Encode a row's plain text, without a last line break."""
    ids = encode_text(base, row.text.removesuffix("\n"))
    if not ids:
        raise RequestError("the text has no tokens")
    return tuple(ids)


@torch.no_grad()
def _outputs(base: BaseModel, example: Example) -> Tensor:
    """Return [head_rows] what the head gives for an example."""
    device = next(base.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate([example]).items()}
    return predict(base.model, batch).logits[0]
