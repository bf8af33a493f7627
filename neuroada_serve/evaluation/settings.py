"""Settings of `neuroada eval`, frozen. Each field is also a flag and a variable, see `options`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from neuroada_serve.config import TrainConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.options import at_least, check_words, option, redefined, words

METRICS = ("loss", "exact_match", "number", "choice_likelihood", "choice_generation", "f1")


def _distinct(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


@dataclass(frozen=True)
class EvalSettings:
    """Settings of `neuroada eval`."""

    variables: ClassVar[str] = "NEUROADA_EVAL_"

    metrics: tuple[str, ...] | None = option(
        None,
        "loss, exact_match, number, choice_likelihood, choice_generation or f1. Repeatable. "
        "Default: loss, with number where the rows have an answer key and all answers are numbers, "
        "else exact_match, and choice_likelihood where options are given or the rows have an "
        "answer key and few answers.",
        "Scores",
        flag="metric",
        read=_distinct,
        repeated=True,
    )
    choices: tuple[str, ...] | None = option(
        None,
        "Options of rows that have none of their own: true,false. Default: all answers of the "
        "data, if few.",
        "Scores",
        read=words,
    )
    answer_key: str | None = option(
        None, "Key of the answer that counts; default: answer, beside output.", "Scores"
    )
    trigger: str | None = option(
        None,
        "Text before the answer; default 'the correct answer is ' if rows have an answer key.",
        "Scores",
    )
    pick: Literal["first", "last"] = option(
        "first", "Option that counts if a text names several: first or last.", "Scores"
    )
    max_tokens: int | None = option(
        None,
        "Maximum number of tokens in an answer. Default: 4 more than the right one; at least 32 "
        "for choice_generation and f1, 512 for number.",
        "Scores",
    )
    columns: Mapping[str, str] = redefined(TrainConfig, "columns")
    limit: int | None = option(None, "Use only this many rows, from the top; default: all.", "Rows")
    prompt_format: Literal["chat", "plain"] = redefined(TrainConfig, "prompt_format")

    def __post_init__(self) -> None:
        if self.metrics is not None:
            for name in self.metrics:
                if name not in METRICS:
                    raise UsageError(f"no metric {name!r}; there are {', '.join(METRICS)}")
            if not self.metrics:
                raise UsageError(f"name a metric: {', '.join(METRICS)}")
        if self.choices is not None and len(self.choices) < 2:
            raise UsageError(f"choices must be two or more, got {', '.join(self.choices)!r}")
        check_words(self)
        at_least(self, max_tokens=1, limit=1)
