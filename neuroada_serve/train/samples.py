"""What to hold scores against: the commonest answer's score, and a few answers to read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuroada_serve.adapters.format import is_regression
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.train.data import Example, TrainingData
from neuroada_serve.train.score import answer_logits, collate

_MOST_TOKENS = 64  # of a sample answer
_MOST_LETTERS = 300  # of a text that is kept


@dataclass(frozen=True)
class Baseline:
    """What giving every held-out row one and the same answer would score.

    answer: the commonest of the training rows; of a regression their mean.
    figure: share of held-out rows with that answer; None of a regression.
    loss: mean squared error of a regression, else None.
    """

    answer: str
    figure: float | None
    loss: float | None = None


@dataclass(frozen=True)
class Sample:
    """A held-out row, and what the adapter answers. Texts are cut to some length."""

    question: str
    expected: str
    got: str


def baseline_of(base: BaseModel, data: TrainingData) -> Baseline | None:
    """The score of the commonest answer; None without held-out rows, or where no answer comes
    twice."""
    if not data.heldout:
        return None
    if is_regression(data.labels):
        numbers = [e.target for e in data.train if e.target is not None]
        mean = sum(numbers) / len(numbers)
        squares = [(e.target - mean) ** 2 for e in data.heldout if e.target is not None]
        return Baseline(f"{mean:.4g}", None, sum(squares) / len(squares))
    [(ids, count)] = Counter(e.answer_ids for e in data.train).most_common(1)
    if count == 1 and not data.labels:
        return None
    share = sum(e.answer_ids == ids for e in data.heldout) / len(data.heldout)
    return Baseline(_cut(_text(base, ids, data.labels)), share)


def samples_of(base: BaseModel, data: TrainingData, count: int) -> tuple[Sample, ...]:
    """Answers of the model, as it is now, to `count` held-out rows; of different right answers
    where there are such."""
    seen: set[object] = set()
    rows: list[Example] = []
    for new in (True, False):
        for row in data.heldout:
            right = (row.answer_ids, row.target)
            if len(rows) < count and row not in rows and (right not in seen) == new:
                rows.append(row)
                seen.add(right)
    return tuple(_sample(base, row, data.labels) for row in rows)


@torch.no_grad()
def _sample(base: BaseModel, row: Example, labels: Sequence[str]) -> Sample:
    base.model.eval()
    device = next(base.model.parameters()).device
    if labels:
        batch = {name: tensor.to(device) for name, tensor in collate([row]).items()}
        logits = answer_logits(base.model, batch)[0][0]
        if is_regression(labels):
            expected, got = f"{row.target:.4g}", f"{logits.item():.4g}"
        else:
            expected, got = labels[row.answer_ids[0]], labels[int(logits.argmax())]
    else:
        expected = _text(base, row.answer_ids, ())
        got = _text(base, _greedy(base, row, device), ())
    return Sample(_cut(row.question), _cut(expected), _cut(got))


def _greedy(base: BaseModel, row: Example, device: torch.device) -> list[int]:
    """The answer's tokens, up to one that ends it, or somewhat more than the right one has."""
    ends = {*base.eos_token_ids, row.answer_ids[-1]}
    ids = torch.tensor([row.prompt_ids], device=device)
    answer: list[int] = []
    cache = None
    while len(answer) < min(_MOST_TOKENS, len(row.answer_ids) + 8):
        out = base.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=device)
    return answer


def _text(base: BaseModel, ids: Sequence[int], labels: Sequence[str]) -> str:
    if labels:
        return labels[ids[0]]
    return str(base.tokenizer.decode(list(ids), skip_special_tokens=True))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
