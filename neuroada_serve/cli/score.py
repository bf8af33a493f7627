"""`neuroada eval`."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from neuroada_serve.cli.common import (
    Adapters,
    ChatTemplate,
    Columns,
    Dtype,
    Model,
    Plain,
    adapters_of,
    columns_of,
    command,
    err,
    for_good,
    interrupted,
    notify,
    out,
    rows_of,
    words,
)
from neuroada_serve.config import EngineConfig, help_of
from neuroada_serve.errors import UsageError

_UNSCORED = "; no scores were written"


@command
def _eval(
    model: Model,
    data: Annotated[str, typer.Option(help="Rows, as train takes them.")],
    adapter: Adapters = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Score the base beside the adapters.")
    ] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, exact_match, number, choice_likelihood, choice_generation or f1. "
            "Repeatable. Default: loss, with number where the rows have an answer key and all "
            "answers are numbers, else exact_match, and choice_likelihood where options are given "
            "or the rows have an answer key and few answers.",
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            help="Options of rows without any of their own: true,false. Default: all answers of "
            "the data, if few."
        ),
    ] = None,
    answer_key: Annotated[
        str | None,
        typer.Option(help="Key of the answer that counts; default: answer, beside output."),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="Text after which the answer stands; default 'the correct answer is ' where rows "
            "have an answer key."
        ),
    ] = None,
    pick: Annotated[
        str, typer.Option(help="Which option counts where a text names several: first or last.")
    ] = "first",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens in an answer. Default: 4 more than the right one; at "
            "least 32 for choice_generation and f1, 512 for number."
        ),
    ] = None,
    columns: Columns = "",
    limit: Annotated[
        int | None, typer.Option(help="Use only this many rows, from the top; default: all.")
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write the scores there as JSON, with predictions by row and plots beside it.",
        ),
    ] = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Put the scores into each adapter's config and README.md."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    dtype: Dtype = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help=help_of(EngineConfig, "max_model_len"))
    ] = None,
    chat_template: ChatTemplate = None,
    plain: Plain = False,
) -> None:
    """Score a base and adapters on the answers of rows, in one run."""
    rows = rows_of(data)
    folders = adapters_of(adapter, reserved=["base"])
    if save and not folders:
        raise UsageError("--save puts scores into adapters; name one with --adapter")
    if not base and not folders:
        raise UsageError("--no-base leaves nothing to score; name an --adapter")

    from neuroada_serve.evaluation import report
    from neuroada_serve.evaluation.run import EvalSettings, evaluate

    settings = EvalSettings(
        metrics=None if metric is None else tuple(dict.fromkeys(metric)),
        answer_key=answer_key,
        trigger=trigger,
        choices=None if choices is None else words(choices),
        pick=cast(Any, pick),  # EvalSettings checks the words
        max_tokens=max_tokens,
        limit=limit,
        prompt_format="plain" if plain else "chat",
        columns=columns_of(columns),
    )
    if out_file is not None:
        report.check_out(out_file)
    with interrupted(lambda: _UNSCORED), for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(
            model,
            folders,
            dtype=dtype,
            max_model_len=max_model_len,
            chat_template=chat_template,
            notify=notify,
        )
    classifiers = [name for name in folders if llm.engine.adapters.store.get(name).labels]
    if classifiers:
        from neuroada_serve.evaluation.classifiers import evaluate_classifiers

        if others := [name for name in folders if name not in classifiers]:
            raise UsageError(
                f"{classifiers[0]} is a classifier and {others[0]} is not; score them apart"
            )
        for flag, given in (
            ("--metric", metric),
            ("--answer-key", answer_key),
            ("--trigger", trigger),
            ("--choices", choices),
            ("--max-tokens", max_tokens),
        ):
            if given is not None:
                raise UsageError(f"{flag} is for answers in text; {classifiers[0]} is a classifier")
        base = False  # it has no head for these labels
        with interrupted(lambda: _UNSCORED):
            found = evaluate_classifiers(
                llm, rows, classifiers, limit, settings.columns, console=err, notify=notify
            )
    else:
        asked = [*([None] if base else []), *folders]
        with interrupted(lambda: _UNSCORED):
            found = evaluate(llm, rows, asked, settings, console=err, notify=notify)
    subjects = [*([report.BASE] if base else []), *folders]
    if out_file is not None:
        written = report.write_results(found, subjects, model, rows, out_file, notify)
        notify("Written: " + ", ".join(map(str, written)))
    if save:
        of_base, of_adapters = found.results[:base], found.results[base:]
        for folder, result in zip(folders.values(), of_adapters, strict=True):
            report.save_scores(folder, result, next(iter(of_base), None), rows, notify)
            notify(f"Scores saved in {folder}")
    if json_output:
        first = found.results[min(int(base), len(found.results) - 1)]  # adapter, else the base
        flat = {name: score.value for name, score in first.scores.items()}
        whole = report.document(found, subjects, model, rows)
        print(json.dumps({"rows": found.rows, **flat, **whole}))
        return
    out.print(report.score_table(found, subjects, f"{rows.name}, {found.rows} rows"))
