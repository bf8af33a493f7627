"""Score adapters on held-out rows by the figures of their task: GLUE's for labels and numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from rich.console import Console
from rich.progress import track

from neuroada_serve.engine.llm import LLM
from neuroada_serve.errors import DataError, RequestError, UsageError
from neuroada_serve.evaluation.bootstrap import (
    confusion_interval,
    mean_interval,
    paired_interval,
)
from neuroada_serve.evaluation.f1 import macro_f1
from neuroada_serve.evaluation.matthews import matthews
from neuroada_serve.evaluation.questions import Question
from neuroada_serve.evaluation.run import (
    Evaluation,
    Prediction,
    Result,
    Score,
    confusion_of,
    evaluate,
)
from neuroada_serve.evaluation.settings import EvalSettings
from neuroada_serve.intervals import wilson
from neuroada_serve.request import ClassifyOutput
from neuroada_serve.tasks import GENERATE, Classify, Regress, Task
from neuroada_serve.train.correlation import pearson, spearman
from neuroada_serve.train.objectives import GiveNumber, Objective, PickLabel
from neuroada_serve.train.rows import Data, place
from neuroada_serve.train.shapes import Row, read_rows

_ROWS_AT_ONCE = 64


class Scorer(Protocol):
    """Scoring of one adapter of a task."""

    metrics: ClassVar[tuple[str, ...]]

    @property
    def objective(self) -> Objective:
        """Encodes the rows, and refuses those that the adapter could not have learnt from."""
        ...

    def predict(self, row: Row, output: ClassifyOutput) -> Prediction:
        """Compare the adapter's output with the row."""
        ...

    def result(self, name: str, digest: str | None, predictions: list[Prediction]) -> Result:
        """Sum up the predictions of all rows."""
        ...


@dataclass(frozen=True)
class LabelScorer:
    """Scores a classifier."""

    objective: PickLabel

    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "matthews")

    def predict(self, row: Row, output: ClassifyOutput) -> Prediction:
        right, probs = row.answer, dict(zip(output.labels, output.probs, strict=True))
        logs = {label: math.log(max(p, 1e-45)) for label, p in probs.items()}
        return Prediction(
            _question(row, output),
            chosen={"accuracy": output.label},
            loglikelihoods={label: (log, log) for label, log in logs.items()},
            points={"accuracy": float(output.label == right)},
            loss=(-logs[right], 1),
        )

    def result(self, name: str, digest: str | None, predictions: list[Prediction]) -> Result:
        rows, labels = len(predictions), self.objective.task.labels
        losses = [said.loss[0] for said in predictions if said.loss is not None]
        hits = sum(said.points["accuracy"] == 1 for said in predictions)
        number = {label: i for i, label in enumerate(labels)}
        right = [number[said.question.right] for said in predictions]
        chosen = [number[str(said.chosen["accuracy"])] for said in predictions]
        confusion = confusion_of(labels, right, chosen)
        interval = partial(confusion_interval, right, chosen, len(labels))
        scores = {
            "loss": Score(math.fsum(losses) / rows, *mean_interval(losses), rows, "bootstrap"),
            "accuracy": Score(hits / rows, *wilson(hits, rows), rows, "wilson"),
        }
        for figure, of in (("macro_f1", macro_f1), ("matthews", matthews)):
            scores[figure] = Score(of(confusion.counts), *interval(of), rows, "bootstrap")
        return Result(name, digest, scores, {"accuracy": confusion}, predictions)


@dataclass(frozen=True)
class NumberScorer:
    """Scores a regression."""

    objective: GiveNumber

    metrics: ClassVar[tuple[str, ...]] = ("mse", "pearson", "spearman")

    def predict(self, row: Row, output: ClassifyOutput) -> Prediction:
        [value] = output.probs
        squared = (value - float(row.answer)) ** 2
        return Prediction(_question(row, output), loss=(squared, 1), value=value)

    def result(self, name: str, digest: str | None, predictions: list[Prediction]) -> Result:
        rows = len(predictions)
        true = [float(said.question.right) for said in predictions]
        given = [said.value for said in predictions if said.value is not None]
        errors = [said.loss[0] for said in predictions if said.loss is not None]
        scores = {"mse": Score(math.fsum(errors) / rows, *mean_interval(errors), rows, "bootstrap")}
        for figure, of in (("pearson", pearson), ("spearman", spearman)):
            interval = paired_interval(given, true, of)
            scores[figure] = Score(of(given, true), *interval, rows, "bootstrap")
        return Result(name, digest, scores, {}, predictions)


def scorer_of(task: Task) -> Scorer | None:
    """Return the scorer of a task; None where answers are texts, which `run.evaluate` scores."""
    if isinstance(task, Classify):
        return LabelScorer(PickLabel(task))
    return NumberScorer(GiveNumber(task)) if isinstance(task, Regress) else None


def common_task(llm: LLM, adapters: Sequence[str]) -> Task:
    """Return the task of loaded adapters; classifiers may differ in their labels.

    Raises:
        UsageError: they are of different tasks.
    """
    tasks = {name: llm.engine.adapters.store.get(name).task for name in adapters}
    first = next((name for name in adapters if tasks[name].pools), None)
    if first is None:
        return GENERATE
    for name, task in tasks.items():
        if type(task) is not type(tasks[first]):
            other = f"{name} a {task.noun}" if task.pools else f"{name} is not"
            raise UsageError(f"{first} is a {tasks[first].noun} and {other}; score them apart")
    return tasks[first]


def evaluate_task(
    llm: LLM,
    data: Data,
    subjects: Sequence[str | None],
    settings: EvalSettings,
    *,
    console: Console | None = None,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score loaded adapters of one task on the rows of a file, all in the same batches.

    Args:
        data: rows in the forms that training reads.
        subjects: names of adapters; None is the base, which answers in text only.
        console: shows a progress bar if it is a terminal.
        notify: gets remarks on how the rows were read.

    Raises:
        UsageError: see `common_task`.
        DataError: a row lacks what the task needs, or its text does not fit; names the row.
        EngineError: a request failed.
    """
    adapters = [name for name in subjects if name is not None]
    task = common_task(llm, adapters)
    scorers: dict[str, Scorer] = {}
    for name in adapters:
        if (scorer := scorer_of(llm.engine.adapters.store.get(name).task)) is not None:
            scorers[name] = scorer
    if not scorers:
        return evaluate(llm, data, subjects, settings, console=console, notify=notify)
    known = {label for scorer in scorers.values() for label in scorer.objective.task.labels}
    found = read_rows(data, settings.columns, labels=known)
    found.tell(data, notify)
    rows = found.rows[: settings.limit]
    prompts = [_prompt(llm, data, row, list(scorers.values())) for row in rows]

    predictions: dict[str, list[Prediction]] = {name: [] for name in scorers}
    digests: dict[str, str | None] = {}
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    disable = console is None or not console.is_terminal
    for start in track(starts, "scoring", console=console, disable=disable):
        part = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        asked = [(i, name) for i in part for name in scorers]
        outputs = llm.classify(
            [prompts[i] for i, _ in asked], [name for _, name in asked], use_tqdm=False
        )
        for (i, name), output in zip(asked, outputs, strict=True):
            digests[name] = output.adapter_digest
            predictions[name].append(scorers[name].predict(rows[i], output))
    results = [
        scorer.result(name, digests[name], predictions[name]) for name, scorer in scorers.items()
    ]
    metrics = next(iter(scorers.values())).metrics
    return Evaluation(len(rows), metrics, tuple(results), task)


def _prompt(llm: LLM, data: Data, row: Row, scorers: Sequence[Scorer]) -> list[int]:
    """Encode a row's text, after each scorer has checked the row."""
    where = f"{data} {place(data, row.number)}"
    try:
        encoded = [scorer.objective.encode(llm.engine.base, row) for scorer in scorers]
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error
    ids = list(encoded[0].prompt_ids)
    if len(ids) >= llm.engine.max_model_len:
        raise DataError(
            f"{where}: the text has {len(ids)} tokens, the model takes less than "
            f"{llm.engine.max_model_len}"
        )
    return ids


def _question(row: Row, output: ClassifyOutput) -> Question:
    return Question(row, row.answer, True, output.labels, True, "", "")
