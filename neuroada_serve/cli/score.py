"""`neuroada eval`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from neuroada_serve.cli.common import (
    Adapters,
    Model,
    Plain,
    adapters_of,
    command,
    err,
    for_good,
    interrupted,
    notify,
    out,
    rows_of,
)
from neuroada_serve.cli.flags import Only
from neuroada_serve.config import EngineConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.evaluation.settings import EvalSettings

_UNSCORED = "; no scores were written"


@command
def _eval(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Rows, in the forms that train takes.", rich_help_panel="Rows")
    ],
    *,
    adapter: Adapters = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base/--no-base",
            help="Score the base beside the adapters.",
            rich_help_panel="Adapters",
        ),
    ] = True,
    settings: EvalSettings,
    engine: Annotated[EngineConfig, Only("dtype", "max_model_len", "chat_template")],
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="JSON file to write with the scores; predictions by row and plots go beside it.",
            rich_help_panel="Results",
        ),
    ] = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Save the scores in each adapter's config and README.md.",
            rich_help_panel="Results",
        ),
    ] = False,
    json_output: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object instead of a table.",
            rich_help_panel="Results",
        ),
    ] = False,
    plain: Plain = False,
) -> None:
    """Score a base and its adapters on held-out rows."""
    rows = rows_of(data)
    folders = adapters_of(adapter, reserved=["base"])
    if save and not folders:
        raise UsageError("--save puts scores into adapters; name one with --adapter")
    if not base and not folders:
        raise UsageError("--no-base leaves nothing to score; name an --adapter")

    from neuroada_serve.evaluation import report
    from neuroada_serve.evaluation.tasks import common_task, evaluate_task

    if plain:
        settings = replace(settings, prompt_format="plain")
    if out_file is not None:
        report.check_out(out_file)
    with interrupted(lambda: _UNSCORED), for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(
            model,
            folders,
            notify=notify,
            **vars(engine),
        )
    task = common_task(llm, list(folders))
    if task.pools:
        for flag, given in (
            ("--metric", settings.metrics),
            ("--answer-key", settings.answer_key),
            ("--trigger", settings.trigger),
            ("--choices", settings.choices),
            ("--max-tokens", settings.max_tokens),
        ):
            if given is not None:
                name = next(iter(folders))
                raise UsageError(f"{flag} is for answers in text; {name} is a {task.noun}")
        base = False  # it has no head for these labels
    asked = [*([None] if base else []), *folders]
    with interrupted(lambda: _UNSCORED):
        found = evaluate_task(llm, rows, asked, settings, console=err, notify=notify)
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
