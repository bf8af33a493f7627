"""Score a base and its adapters on held-out rows, answered as they would be served."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuroada_serve.engine.llm import LLM
from neuroada_serve.errors import DataError, EngineError, RequestError
from neuroada_serve.evaluation.bootstrap import confusion_interval, mean_interval
from neuroada_serve.evaluation.exact import after_trigger, exact_match
from neuroada_serve.evaluation.f1 import macro_f1, token_f1
from neuroada_serve.evaluation.numbers import is_number, last_number, same_number
from neuroada_serve.evaluation.options import Pick, likeliest, named_option
from neuroada_serve.evaluation.questions import MAX_LABELS, Question, read_questions
from neuroada_serve.evaluation.settings import METRICS, EvalSettings
from neuroada_serve.intervals import wilson
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.model.prompt import renders_chats
from neuroada_serve.request import FinishReason, Output, RequestOutput, SamplingParams
from neuroada_serve.tasks import GENERATE, Task
from neuroada_serve.train.examples import encode_prompt, encode_row
from neuroada_serve.train.labels import sorted_labels
from neuroada_serve.train.rows import Data, place

PER_TOKEN = "choice_likelihood_per_token"

_GENERATED = {"exact_match", "number", "choice_generation", "f1"}
_SLACK_TOKENS = 4  # an answer this much longer than the right one is wrong
# Minimum answer length in tokens where other text may precede the answer; as in the method's paper.
_ROOM_TOKENS = {"number": 512, "choice_generation": 32, "f1": 32}
_ROWS_AT_ONCE = 64  # of one subject at a time, so that the prefix cache can hold their prompts


@dataclass(frozen=True)
class Score:
    """A figure over `rows` rows with its 95 % interval: Wilson's for a share of rows, else by
    bootstrap. Its name says what it is:

    loss: mean negative log-likelihood (nats) per answer token, the end token among them.
    exact_match, number, choice_likelihood, choice_generation: share of correct rows.
    NAME_macro_f1: of a choice metric, mean F1 over the options.
    f1: mean F1 of the words of an answer.
    """

    value: float
    low: float
    high: float
    rows: int
    interval: str


@dataclass(frozen=True)
class Confusion:
    """counts: [labels][labels + 1] by right label, then chosen one; the last column counts rows
    where none was chosen."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass
class Prediction:
    """The answer of one subject to one row.

    text: the generated answer; None if no metric needs one.
    chosen: choice metric -> the option taken, None if none was.
    loglikelihoods: option -> (sum, mean per token) in nats.
    points: score name -> 1 or 0, or the row's F1.
    loss: (sum, tokens) of the row's answer.
    value: what a regression gave.
    """

    question: Question
    text: str | None = None
    chosen: dict[str, str | None] = field(default_factory=dict)
    loglikelihoods: dict[str, tuple[float, float]] = field(default_factory=dict)
    points: dict[str, float] = field(default_factory=dict)
    loss: tuple[float, int] | None = None
    value: float | None = None


@dataclass(frozen=True)
class Result:
    """One subject's scores by name, in a fixed order, and the predictions behind them. digest: of
    the adapter version that answered; None for the base."""

    adapter: str | None
    digest: str | None
    scores: dict[str, Score]
    confusions: dict[str, Confusion]
    predictions: list[Prediction]


@dataclass(frozen=True)
class Evaluation:
    """The results of a run. metrics: as chosen. results: one per subject, in order."""

    rows: int
    metrics: tuple[str, ...]
    results: tuple[Result, ...]
    task: Task = GENERATE


def default_metrics(questions: Sequence[Question]) -> tuple[str, ...]:
    """Choose metrics for rows: loss; number if all answers are numbers with a key of their own,
    else exact_match, and choice_likelihood if all rows have options and these are given or the
    answers have a key of their own."""
    if all(q.labelled and is_number(q.right) for q in questions):
        return ("loss", "number")
    if all(q.options and (q.labelled or q.given) for q in questions):
        return ("loss", "exact_match", "choice_likelihood")
    return ("loss", "exact_match")


def evaluate(
    llm: LLM,
    data: Data,
    adapters: Sequence[str | None] = (None,),
    settings: EvalSettings | None = None,
    *,
    console: Console | None = None,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score loaded adapters, or with None the base, on the rows of a file, all in the same batches.

    Args:
        data: rows in the forms that training reads; see also `evaluation.questions`.
        console: shows a progress bar if it is a terminal.
        notify: gets remarks on how the rows were read.

    Raises:
        DataError: rows that do not fit, or that a metric cannot score; names the line.
        EngineError: a request failed.
    """
    settings = settings or EvalSettings()
    questions = read_questions(
        data,
        answer_key=settings.answer_key,
        trigger=settings.trigger,
        choices=settings.choices,
        columns=settings.columns,
        notify=notify,
    )[: settings.limit]
    metrics = settings.metrics or default_metrics(questions)
    _check_metrics(data, questions, metrics)
    tasks = _encode_all(llm, data, questions, metrics, settings)

    predictions = [[Prediction(q) for q in questions] for _ in adapters]
    digests: list[str | None] = [None] * len(adapters)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    disable = console is None or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disable) as progress:
        total = len(adapters) * sum(len(task.continuations) + task.generates for task in tasks)
        bar = progress.add_task("scoring", total=total)

        def advance(output: Output) -> None:
            if output.finished:
                progress.advance(bar)

        for start in range(0, len(tasks), _ROWS_AT_ONCE):
            part = tasks[start : start + _ROWS_AT_ONCE]
            rows = [
                (task, said[start + i], adapter, number)
                for i, task in enumerate(part)
                for number, (adapter, said) in enumerate(zip(adapters, predictions, strict=True))
            ]
            # 1. Likelihoods: texts as part of the prompt, read off with the engine's logprobs.
            asked = [
                (task, text, said, adapter, number)
                for task, said, adapter, number in rows
                for text in task.continuations
            ]
            outputs = _run(
                llm,
                [task.prompt_ids + task.continuations[text] for task, text, *_ in asked],
                [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(asked),
                [adapter for *_, adapter, _ in asked],
                advance,
            )
            for (task, text, said, _, number), output in zip(asked, outputs, strict=True):
                digests[number] = output.adapter_digest
                _take_likelihood(task, text, said, output)

            # 2. Greedy answers; most of their prompts are in the prefix cache by now.
            asking = [one for one in rows if one[0].generates]
            outputs = _run(
                llm,
                [task.prompt_ids for task, *_ in asking],
                [SamplingParams(temperature=0, max_tokens=task.max_tokens) for task, *_ in asking],
                [adapter for _, _, adapter, _ in asking],
                advance,
            )
            for (_, said, _, number), output in zip(asking, outputs, strict=True):
                digests[number] = output.adapter_digest
                said.text = output.text

    results = []
    for adapter, digest, said_all in zip(adapters, digests, predictions, strict=True):
        for said in said_all:
            _judge(said, metrics, settings.pick)
        scores, confusions = _scores(said_all, metrics)
        results.append(Result(adapter, digest, scores, confusions, said_all))
    return Evaluation(len(questions), metrics, tuple(results))


# --- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A question as token ids. continuations: text -> its ids, to compute their likelihood.
    compared: number of last tokens by which an option is compared, see `_encode`."""

    prompt_ids: list[int]
    continuations: dict[str, list[int]]
    compared: dict[str, int]
    generates: bool
    max_tokens: int


def _check_metrics(data: Data, questions: Sequence[Question], metrics: Sequence[str]) -> None:
    for question in questions:
        where = f"{data} {place(data, question.row.number)}"
        if any(name.startswith("choice_") for name in metrics) and not question.options:
            raise DataError(
                f'{where} has no options to choose from: give the row "choices": [...], or name '
                f"them with --choices true,false (more than {MAX_LABELS} distinct answers, or "
                "fewer than two rows to each, are not taken for options)"
            )
        if "number" in metrics and last_number(question.right) is None:
            raise DataError(f"{where}: the answer {question.right[:80]!r} has no number")


def _encode_all(
    llm: LLM,
    data: Data,
    questions: Sequence[Question],
    metrics: Sequence[str],
    settings: EvalSettings,
) -> list[_Task]:
    base, most = llm.engine.base, llm.engine.max_model_len
    renders_chats(base, settings.prompt_format)  # raises once for all rows if it cannot
    tasks = []
    for question in questions:
        where = f"{data} {place(data, question.row.number)}"
        try:
            task = _encode(base, question, metrics, settings)
        except RequestError as error:
            raise DataError(f"{where}: {error}") from error
        longest = max([0, *map(len, task.continuations.values())])
        if (length := len(task.prompt_ids) + longest) >= most:
            raise DataError(
                f"{where}: prompt and answer have {length} tokens, the model takes less than {most}"
            )
        tasks.append(task)
    return tasks


def _encode(
    base: BaseModel, question: Question, metrics: Sequence[str], settings: EvalSettings
) -> _Task:
    """Encode a question. Options are compared by their tokens after the beginning that all share,
    the lead included, up to the end token: so "a" is not likelier than "ab" for being its
    beginning."""
    row, style = question.row, settings.prompt_format
    answer_ids = list(encode_row(base, row, style).answer_ids)
    continuations = {row.answer: answer_ids} if "loss" in metrics else {}
    compared = {}
    if "choice_likelihood" in metrics:
        texts = {option: question.lead + option for option in question.options}
        ids = {
            option: list(encode_row(base, replace(row, answer=text), style).answer_ids)
            for option, text in texts.items()
        }
        shared = len(commonprefix(list(ids.values())))  # takes any sequences, not only strings
        shared = min(shared, *(len(one) - 1 for one in ids.values()))
        compared = {option: len(one) - shared for option, one in ids.items()}
        continuations |= {texts[option]: one for option, one in ids.items()}
    room = max([len(answer_ids) + _SLACK_TOKENS, *(_ROOM_TOKENS.get(m, 0) for m in metrics)])
    return _Task(
        encode_prompt(base, row, style),
        continuations,
        compared,
        not _GENERATED.isdisjoint(metrics),
        settings.max_tokens or room,
    )


def _run(
    llm: LLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    adapters: list[str | None],
    on_output: Callable[[Output], None],
) -> list[RequestOutput]:
    """Run requests and return their outputs.

    Raises:
        EngineError: a request failed, without which a score would be wrong.
    """
    errors = []

    def see(output: Output) -> None:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            errors.append(output.error or output.finish_reason.value)
        on_output(output)

    outputs = llm.generate(prompts, params, adapters, on_output=see) if prompts else []
    if errors:
        raise EngineError(f"{len(errors)} of {len(prompts)} requests failed: {errors[0]}")
    return outputs


# --- what came of it ---------------------------------------------------------------------------


def _take_likelihood(task: _Task, text: str, said: Prediction, output: RequestOutput) -> None:
    assert output.prompt_logprobs is not None
    ids = task.continuations[text]
    logprobs = [p.logprob for p in output.prompt_logprobs[-len(ids) :]]
    question = said.question
    if text == question.row.answer:
        said.loss = (-math.fsum(logprobs), len(logprobs))
    for option, num in task.compared.items():
        if question.lead + option == text:
            total = math.fsum(logprobs[-num:])
            said.loglikelihoods[option] = (total, total / num)


def _judge(said: Prediction, metrics: Sequence[str], pick: Pick) -> None:
    """Set the choices and points of a row."""
    question = said.question
    right, options = question.right, question.options
    if "choice_likelihood" in metrics:
        for name, which in (("choice_likelihood", 0), (PER_TOKEN, 1)):
            best = likeliest([said.loglikelihoods[option][which] for option in options])
            said.chosen[name] = None if best is None else options[best]
    if said.text is not None:
        answer = after_trigger(said.text, question.trigger)
        if "exact_match" in metrics:
            said.points["exact_match"] = float(exact_match(answer, right))
        if "number" in metrics:
            wanted = last_number(right)
            assert wanted is not None, "checked before anything was asked"
            said.points["number"] = float(same_number(said.text, wanted))
        if "f1" in metrics:
            said.points["f1"] = token_f1(answer, right)
        if "choice_generation" in metrics:
            named = named_option(answer, options, pick)
            said.chosen["choice_generation"] = None if named is None else options[named]
    for name, chosen in said.chosen.items():
        said.points[name] = float(chosen == right)


def _scores(
    predictions: Sequence[Prediction], metrics: Sequence[str]
) -> tuple[dict[str, Score], dict[str, Confusion]]:
    rows = len(predictions)
    scores: dict[str, Score] = {}
    confusions: dict[str, Confusion] = {}
    if "loss" in metrics:
        losses = [p.loss for p in predictions if p.loss is not None]
        sums, tokens = [s for s, _ in losses], [n for _, n in losses]
        low, high = mean_interval(sums, tokens)
        scores["loss"] = Score(math.fsum(sums) / sum(tokens), low, high, rows, "bootstrap")
    for name in METRICS[1:]:
        if name not in metrics:
            continue
        for each in (name, PER_TOKEN) if name == "choice_likelihood" else (name,):
            points = [p.points[each] for p in predictions]
            if each == "f1":
                mean = math.fsum(points) / rows
                scores[each] = Score(mean, *mean_interval(points), rows, "bootstrap")
            else:
                hits = int(sum(points))
                scores[each] = Score(hits / rows, *wilson(hits, rows), rows, "wilson")
            labels = sorted_labels(o for p in predictions for o in p.question.options)
            if each in predictions[0].chosen and len(labels) <= MAX_LABELS:
                place: dict[Any, int] = {label: i for i, label in enumerate(labels)}
                right = [place[p.question.right] for p in predictions]
                chosen = [place.get(p.chosen[each]) for p in predictions]
                confusions[each] = confusion_of(labels, right, chosen)
                scores[f"{each}_macro_f1"] = Score(
                    macro_f1(confusions[each].counts),
                    *confusion_interval(right, chosen, len(labels), macro_f1),
                    rows,
                    "bootstrap",
                )
    return scores, confusions


def confusion_of(
    labels: Sequence[str], right: Sequence[int], chosen: Sequence[int | None]
) -> Confusion:
    """Count rows by right and chosen label; None is no choice."""
    none = len(labels)
    counts = [[0] * (none + 1) for _ in labels]
    for row, column in zip(right, chosen, strict=True):
        counts[row][none if column is None else column] += 1
    return Confusion(tuple(labels), tuple(map(tuple, counts)))
