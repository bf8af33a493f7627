"""How well classifiers label held-out rows, and regressions number them, by GLUE's figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.progress import track

from neuroada_serve.adapters.format import is_regression
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
from neuroada_serve.evaluation.run import Evaluation, Prediction, Result, Score, confusion_of
from neuroada_serve.intervals import wilson
from neuroada_serve.train.correlation import pearson, spearman
from neuroada_serve.train.data import encode_labelled
from neuroada_serve.train.rows import Data, place
from neuroada_serve.train.shapes import read_rows

CLASSIFIER_METRICS = ("loss", "accuracy", "macro_f1", "matthews")
REGRESSION_METRICS = ("mse", "pearson", "spearman")
_ROWS_AT_ONCE = 64


def evaluate_classifiers(
    llm: LLM,
    data: Data,
    adapters: Sequence[str],
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    console: Console | None = None,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score loaded classifiers, or regressions, on the rows of a file, all in the same batches.

    Args:
        data: rows in the shapes that training reads; a row's answer is its label.
        adapters: all classifiers, or all regressions.
        limit: most rows, from the top.
        columns: our keys for the data's columns, see `read_rows`.
        console: shows a progress bar, where it is a terminal.
        notify: told how the rows were read, where there is something to say.

    Raises:
        UsageError: there are both kinds.
        DataError: a row's label is none of a classifier's, or no number for a regression, or its
            text does not fit; names the row.
        EngineError: a request failed.
    """
    labels = {name: llm.engine.adapters.store.get(name).task.labels for name in adapters}
    regressions = [name for name in adapters if is_regression(labels[name])]
    if len(regressions) not in (0, len(adapters)):
        other = next(name for name in adapters if name not in regressions)
        raise UsageError(
            f"{regressions[0]} is a regression and {other} a classifier; score them apart"
        )
    known = {label for name in adapters for label in labels[name]}
    found = read_rows(data, columns, labels=known)
    found.tell(data, notify)
    rows = found.rows[:limit]
    prompts, targets = [], list[float | None]()
    for row in rows:
        where = f"{data} {place(data, row.number)}"
        try:
            encoded = [encode_labelled(llm.engine.base, row, labels[name]) for name in adapters]
        except RequestError as error:
            raise DataError(f"{where}: {error}") from error
        ids = list(encoded[0].prompt_ids)
        if len(ids) >= llm.engine.max_model_len:
            raise DataError(
                f"{where}: the text has {len(ids)} tokens, the model takes less than "
                f"{llm.engine.max_model_len}"
            )
        prompts.append(ids)
        targets.append(encoded[0].target)

    predictions: dict[str, list[Prediction]] = {name: [] for name in adapters}
    digests: dict[str, str | None] = {}
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    disable = console is None or not console.is_terminal
    for start in track(starts, "scoring", console=console, disable=disable):
        part = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        asked = [(i, name) for i in part for name in adapters]
        outputs = llm.classify(
            [prompts[i] for i, _ in asked], [name for _, name in asked], use_tqdm=False
        )
        for (i, name), output in zip(asked, outputs, strict=True):
            digests[name] = output.adapter_digest
            right = rows[i].answer
            question = Question(rows[i], right, True, output.labels, True, "", "")
            if (target := targets[i]) is not None:
                [value] = output.probs
                squared = (value - target) ** 2
                predictions[name].append(Prediction(question, loss=(squared, 1), value=value))
                continue
            probs = dict(zip(output.labels, output.probs, strict=True))
            logs = {label: math.log(max(p, 1e-45)) for label, p in probs.items()}
            predictions[name].append(
                Prediction(
                    question,
                    chosen={"accuracy": output.label},
                    loglikelihoods={label: (log, log) for label, log in logs.items()},
                    points={"accuracy": float(output.label == right)},
                    loss=(-logs[right], 1),
                )
            )
    if regressions:
        true = [target for target in targets if target is not None]
        results = [_regression(name, digests[name], true, predictions[name]) for name in adapters]
        return Evaluation(len(rows), REGRESSION_METRICS, tuple(results))
    results = [_result(name, digests[name], labels[name], predictions[name]) for name in adapters]
    return Evaluation(len(rows), CLASSIFIER_METRICS, tuple(results))


def _regression(
    name: str, digest: str | None, true: list[float], predictions: list[Prediction]
) -> Result:
    rows = len(predictions)
    given = [said.value for said in predictions if said.value is not None]
    errors = [said.loss[0] for said in predictions if said.loss is not None]
    scores = {"mse": Score(math.fsum(errors) / rows, *mean_interval(errors), rows, "bootstrap")}
    for figure, of in (("pearson", pearson), ("spearman", spearman)):
        interval = paired_interval(given, true, of)
        scores[figure] = Score(of(given, true), *interval, rows, "bootstrap")
    return Result(name, digest, scores, {}, predictions)


def _result(
    name: str, digest: str | None, labels: Sequence[str], predictions: list[Prediction]
) -> Result:
    rows = len(predictions)
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
