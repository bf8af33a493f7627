"""How well a base or an adapter answers held-out rows, as it would be served."""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuroada_serve.engine.llm import LLM
from neuroada_serve.errors import DataError, RequestError
from neuroada_serve.request import Output, SamplingParams
from neuroada_serve.train.data import encode_prompt, encode_row, read_rows

_SLACK_TOKENS = 4  # an answer that goes on this far beyond the right one is wrong already


@dataclass(frozen=True)
class Scores:
    """rows: rows scored. loss: mean negative log-likelihood (nats) per answer token, the end token
    among them. exact_match: share of rows whose greedy answer is the row's, but for white space at
    its ends."""

    rows: int
    loss: float
    exact_match: float


def evaluate(
    llm: LLM,
    data: Path,
    adapter: str | None = None,
    *,
    limit: int | None = None,
    plain: bool = False,
    console: Console | None = None,
) -> Scores:
    """Score a loaded adapter, or with None the base, on JSON-lines rows.

    Args:
        data: rows in the shapes that training reads.
        limit: most rows, from the top.
        plain: prompts as they are, without the chat template.
        console: shows a progress bar.

    Raises:
        DataError: rows that do not fit; names the line.
    """
    base = llm.engine.base
    rows = read_rows(data)[:limit]
    prompt_format = "plain" if plain else "chat"
    prompts, answers = [], []
    for row in rows:
        try:
            prompts.append(encode_prompt(base, row, prompt_format))
            answers.append(list(encode_row(base, row, prompt_format).answer_ids))
        except RequestError as error:
            raise DataError(f"{data} line {row.line}: {error}") from error
        length = len(prompts[-1]) + len(answers[-1])
        if length >= llm.engine.max_model_len:
            raise DataError(
                f"{data} line {row.line}: prompt and answer have {length} tokens, the model takes "
                f"less than {llm.engine.max_model_len}"
            )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=console is None
    ) as progress:
        task = progress.add_task("scoring", total=2 * len(rows))

        def advance(output: Output) -> None:
            if output.finished:
                progress.advance(task)

        # 1. Loss: the answers as part of the prompt, read off with the engine's own logprobs.
        scored = llm.generate(
            [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
            adapter,
            on_output=advance,
        )
        losses: list[float] = []
        for output, answer in zip(scored, answers, strict=True):
            assert output.prompt_logprobs is not None
            losses += [-p.logprob for p in output.prompt_logprobs[-len(answer) :]]

        # 2. Exact match: greedy answers.
        generated = llm.generate(
            prompts,
            [SamplingParams(temperature=0, max_tokens=len(a) + _SLACK_TOKENS) for a in answers],
            adapter,
            on_output=advance,
        )
    hits = [o.text.strip() == r.answer.strip() for o, r in zip(generated, rows, strict=True)]
    return Scores(len(rows), math.fsum(losses) / len(losses), sum(hits) / len(hits))
