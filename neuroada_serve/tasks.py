"""The tasks that adapters are made for: one object each, holding all that differs between them.

    Generate    continues a text, token by token; so does the base
    Classify    gives the probability of each of its labels
    Regress     gives a number

Generate is asked for tokens. The others pool: their answer is made of the hidden state at the last
token of a prompt.

A new task needs a class here; an objective in `train/objectives.py`, which says how it is learnt; a
scorer in `evaluation/tasks.py`; a route of its own in `server/routes/`, listed in `server/app.py`;
and a method of `LLM` in `engine/llm.py`. No other module names a task's class. The class is entered
in `TASKS`, `task_of` and, with a way of asking of its own, in `AskedAs`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]  # PEFT's names
AskedAs = Literal["generate", "classify"]

CAUSAL_LM: TaskType = "CAUSAL_LM"
SEQ_CLS: TaskType = "SEQ_CLS"
MAX_LABELS = 1000


@dataclass(frozen=True)
class CardCase:
    """An adapter and a prompt as a model card's commands need them.

    flags: base and adapter, as `neuroada serve` takes them. word: the prompt as a word of the
        shell. model, text: the adapter's name and the prompt as strings of JSON, and of Python.
    is_plain: whether it was trained without a chat template.
    """

    flags: str
    word: str
    model: str
    text: str
    is_plain: bool


@dataclass(frozen=True)
class Usage:
    """A model card's commands that ask an adapter.

    command: of the shell. route: behind /v1/. fields: of the JSON body, after its model.
    params: lines of Python that `call` needs. call: the Python that answers and prints.
    """

    command: str
    route: str
    fields: str
    call: str
    params: str = ""


class Task(Protocol):
    """A task of adapters.

    labels: names of what an adapter answers with; empty where they are not needed.
    """

    @property
    def labels(self) -> tuple[str, ...]: ...

    task_type: ClassVar[TaskType]
    """Its name in adapter_config.json."""
    asked_as: ClassVar[AskedAs]
    """Its name in requests, see `SamplingParams.task`."""
    pools: ClassVar[bool]
    """Set where the answer is `decode` of a hidden state, not tokens."""
    noun: ClassVar[str]
    """The word for such an adapter in messages, after "a"."""
    route: ClassVar[str]
    """The HTTP route that asks it."""
    command: ClassVar[str]
    """The command that asks it."""

    loss: ClassVar[str]
    """Its loss in words."""
    loss_axis: ClassVar[str]
    """The same with its unit."""
    figure: ClassVar[str]
    """The key of the score that training gives beside the loss."""
    figure_words: ClassVar[str]
    """That score in words."""
    figure_is_share: ClassVar[bool]
    """Set where that score is a share of rows."""

    pipeline_tag: ClassVar[str]
    """The hub's name for it."""
    problem_type: ClassVar[str]
    """transformers' name for it, where it has a head."""
    example: ClassVar[str]
    """A prompt for a model card that has none of its own."""

    @property
    def head_rows(self) -> int:
        """Number of rows of the head that an adapter brings; 0 where there is none."""
        ...

    def label_faults(self) -> list[str]:
        """Return the faults of the labels."""
        ...

    def decode(self, outputs: Sequence[float]) -> tuple[float, ...]:
        """Make the answer of the head's output, or of the hidden state where there is no head."""
        ...

    def reply(self, values: Sequence[float]) -> dict[str, Any]:
        """Return one answer as HTTP gives it."""
        ...

    def heading(self) -> dict[str, Any]:
        """Return the fields that an HTTP reply has once, above all answers."""
        ...

    def summary(self) -> str:
        """Name the task in a model card, before the labels; empty where the card names none."""
        ...

    def usage(self, case: CardCase) -> Usage:
        """Return a model card's commands."""
        ...


@dataclass(frozen=True)
class Generate:
    """Continue a text."""

    labels: tuple[str, ...] = ()

    task_type: ClassVar[TaskType] = "CAUSAL_LM"
    asked_as: ClassVar[AskedAs] = "generate"
    pools: ClassVar[bool] = False
    noun: ClassVar[str] = "text generator"
    route: ClassVar[str] = "/v1/completions"
    command: ClassVar[str] = "neuroada generate"
    loss: ClassVar[str] = "loss per answer token"
    loss_axis: ClassVar[str] = "loss (nats per answer token)"
    figure: ClassVar[str] = "exact_match"
    figure_words: ClassVar[str] = "exact match"
    figure_is_share: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    problem_type: ClassVar[str] = ""
    example: ClassVar[str] = "What to ask."
    head_rows: ClassVar[int] = 0

    def label_faults(self) -> list[str]:
        return [f"labels are for task_type {SEQ_CLS}"] if self.labels else []

    def decode(self, outputs: Sequence[float]) -> tuple[float, ...]:
        return ()

    def reply(self, values: Sequence[float]) -> dict[str, Any]:
        return {}

    def heading(self) -> dict[str, Any]:
        return {}

    def summary(self) -> str:
        return ""

    def usage(self, case: CardCase) -> Usage:
        params = "params = SamplingParams(temperature=0, max_tokens=64)\n"
        if case.is_plain:
            return Usage(
                f"neuroada chat --plain {case.flags}",
                "completions",
                f'"temperature": 0, "max_tokens": 64, "prompt": {case.text}',
                f"llm.generate(prompt, params, {case.model})\nprint(answer.text)",
                params,
            )
        message = '{"role": "user", "content": prompt}'
        return Usage(
            f"neuroada chat {case.flags}",
            "chat/completions",
            f'"temperature": 0, "messages": [{{"role": "user", "content": {case.text}}}]',
            f"llm.chat([{message}], params, {case.model})\nprint(answer.text)",
            params,
        )


@dataclass(frozen=True)
class _Labelled:
    """The common part of tasks whose adapters bring a head with a row for each label."""

    labels: tuple[str, ...]

    task_type: ClassVar[TaskType] = "SEQ_CLS"
    asked_as: ClassVar[AskedAs] = "classify"
    pools: ClassVar[bool] = True
    route: ClassVar[str] = "/v1/classify"
    command: ClassVar[str] = "neuroada classify"
    pipeline_tag: ClassVar[str] = "text-classification"
    example: ClassVar[str] = "A text."

    @property
    def head_rows(self) -> int:
        return len(self.labels)

    def label_faults(self) -> list[str]:
        labels: Sequence[Any] = self.labels  # of a config, which may hold anything
        if not 1 <= len(labels) <= MAX_LABELS:
            return [f"there are {len(labels)} labels, {SEQ_CLS} takes 1 to {MAX_LABELS}"]
        if not all(isinstance(label, str) and label.strip() for label in labels):
            return ["labels must be non-empty strings"]
        return ["labels lists one twice"] if len(set(labels)) < len(labels) else []

    def reply(self, values: Sequence[float]) -> dict[str, Any]:
        label = self.labels[values.index(max(values))]
        return {"label": label, "probs": list(values), "num_classes": len(self.labels)}

    def heading(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def usage(self, case: CardCase) -> Usage:
        return Usage(
            f"neuroada classify {case.flags} {case.word}",
            "classify",
            f'"input": {case.text}',
            f"llm.classify(prompt, {case.model})\nprint(answer.label, answer.probs)",
        )


@dataclass(frozen=True)
class Classify(_Labelled):
    """Give the probability of each label."""

    noun: ClassVar[str] = "classifier"
    loss: ClassVar[str] = "loss per row"
    loss_axis: ClassVar[str] = "loss (nats per row)"
    figure: ClassVar[str] = "accuracy"
    figure_words: ClassVar[str] = "accuracy"
    figure_is_share: ClassVar[bool] = True
    problem_type: ClassVar[str] = "single_label_classification"

    def decode(self, outputs: Sequence[float]) -> tuple[float, ...]:
        """Return the softmax of the labels' logits."""
        highest = max(outputs)
        shares = [math.exp(output - highest) for output in outputs]
        total = math.fsum(shares)
        return tuple(share / total for share in shares)

    def summary(self) -> str:
        return "classification, labels"


@dataclass(frozen=True)
class Regress(_Labelled):
    """Give a number, named by the only label. HTTP replies have it in probs, as vLLM's do."""

    noun: ClassVar[str] = "regression"
    loss: ClassVar[str] = "mean squared error"
    loss_axis: ClassVar[str] = "mean squared error"
    figure: ClassVar[str] = "pearson"
    figure_words: ClassVar[str] = "Pearson's correlation"
    figure_is_share: ClassVar[bool] = False
    problem_type: ClassVar[str] = "regression"

    def decode(self, outputs: Sequence[float]) -> tuple[float, ...]:
        return tuple(outputs)

    def summary(self) -> str:
        return "regression of"


GENERATE = Generate()
TASKS: tuple[type[Task], ...] = (Generate, Classify, Regress)


def task_of(task_type: TaskType, labels: Sequence[str]) -> Task:
    """Return the task of an adapter; `task_faults` says whether it is a valid one."""
    if task_type == Generate.task_type:
        return Generate(tuple(labels))
    return (Regress if len(labels) == 1 else Classify)(tuple(labels))


def task_faults(task_type: str, labels: Sequence[Any]) -> list[str]:
    """Return the faults of the task that an adapter's config names."""
    known = tuple(dict.fromkeys(task.task_type for task in TASKS))
    for one in known:
        if task_type == one:
            return task_of(one, labels).label_faults()
    return [f"task_type is {task_type[:40]!r}; {' and '.join(known)} are served"]


def noun_of(asked_as: AskedAs) -> str:
    """Return the word for an adapter that can be asked so."""
    return next(task.noun for task in TASKS if task.asked_as == asked_as)
