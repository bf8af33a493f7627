"""Comparisons for a run's scores: the best constant answer's score, and a few answers to read."""

from dataclasses import dataclass, replace

from neuroada_serve.model.loader import BaseModel
from neuroada_serve.train.data import TrainingData
from neuroada_serve.train.examples import Example
from neuroada_serve.train.objectives import Baseline

_MOST_LETTERS = 300  # of a text that is kept


@dataclass(frozen=True)
class Sample:
    """A held-out row and the adapter's answer. Texts are cut to some length."""

    question: str
    expected: str
    got: str


def baseline_of(base: BaseModel, data: TrainingData) -> Baseline | None:
    """Return the score of the best constant answer; None without held-out rows, or where no answer
    comes twice."""
    if not data.heldout:
        return None
    found = data.objective.baseline(base, data.train, data.heldout)
    return None if found is None else replace(found, answer=_cut(found.answer))


def samples_of(base: BaseModel, data: TrainingData, count: int) -> tuple[Sample, ...]:
    """Let the model, as it is now, answer `count` held-out rows, with different right answers where
    there are such."""
    seen: set[object] = set()
    rows: list[Example] = []
    for new in (True, False):
        for row in data.heldout:
            right = (row.answer_ids, row.target)
            if len(rows) < count and row not in rows and (right not in seen) == new:
                rows.append(row)
                seen.add(right)
    base.model.eval()
    samples = []
    for row in rows:
        expected, got = data.objective.sample(base, row)
        samples.append(Sample(_cut(row.question), _cut(expected), _cut(got)))
    return tuple(samples)


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
