"""`neuroada train`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from neuroada_serve.cli.common import (
    Model,
    Plain,
    command,
    interrupted,
    notify,
    out,
    print_error,
    rows_of,
)
from neuroada_serve.cli.flags import Only, config_file
from neuroada_serve.config import EngineConfig, TrainConfig


@command
def train(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|hub:OWNER/NAME:CONFIG@SPLIT",
            help="Rows: .jsonl, .json, .csv, .tsv or .parquet, or a set of the Hugging Face hub, "
            "with prompt and completion; messages; instruction, input and output; question and "
            "answer; or text and label.",
            rich_help_panel="Rows",
        ),
    ],
    *,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Describe the rows and train nothing.",
            rich_help_panel="Rows",
        ),
    ] = False,
    plain: Plain = False,
    config: TrainConfig,
    engine: Annotated[EngineConfig, Only("chat_template")],
    out_dir: Annotated[
        Path, typer.Option("--out", help="Adapter folder to write.", rich_help_panel="Results")
    ],
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Discard checkpoints instead of resuming from them.",
            rich_help_panel="Results",
        ),
    ] = False,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server that loads the finished adapter: http://HOST:PORT, with --out under its "
            "--adapter-dir. Exit code 1 if it does not.",
            rich_help_panel="Results",
        ),
    ] = None,
    publish_improved: Annotated[
        bool,
        typer.Option(
            "--publish-improved",
            help="Publish improved adapters during training too, but none that scores worse on the "
            "held-out rows than the served one.",
            rich_help_panel="Results",
        ),
    ] = False,
    file: Annotated[Path | None, config_file(TrainConfig)] = None,
) -> None:
    """Train an adapter that answers, classifies or gives a number."""
    rows = rows_of(data)
    if config.eval_data is not None:
        config = replace(config, eval_data=rows_of(str(config.eval_data)))
    if plain:
        config = replace(config, prompt_format="plain")

    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model
    from neuroada_serve.train.processes import joined
    from neuroada_serve.train.trainer import check_place, train_adapter

    if not check:
        check_place(out_dir)
    with joined() as processes:
        tell = notify if processes.is_first else lambda message: None
        base = load_base(
            resolve_model(model, tell), config.dtype, chat_template=engine.chat_template
        )
        if check:
            from neuroada_serve.train.data import load_data

            tell(f"{load_data(base, rows, config).report}.")
            return
        with interrupted(lambda: _kept(out_dir, config.save_steps)):
            report = train_adapter(
                base,
                rows,
                out_dir,
                config,
                notify=tell,
                fresh=fresh,
                publish=publish,
                publish_improved=publish_improved,
            )
    if not processes.is_first:
        return
    baseline = report.baseline
    if report.before is not None and report.after is not None:
        constant = [] if baseline is None else [f"always {baseline.answer!r}"]
        table = Table("held-out", *map(escape, constant), "before", "after")
        for name, before, after, known in (
            ("loss", report.before.loss, report.after.loss, baseline and baseline.loss),
            (
                report.adapter.config.task.figure.replace("_", " "),
                report.before.figure,
                report.after.figure,
                baseline and baseline.figure,
            ),
        ):
            middle = [] if baseline is None else ["" if known is None else f"{known:.3f}"]
            table.add_row(name, *middle, f"{before:.3f}", f"{after:.3f}")
        out.print(table)
    if report.samples:
        shown = Table("held-out row", "expected", "got", show_lines=True)
        for sample in report.samples:
            shown.add_row(*map(escape, (sample.question, sample.expected, sample.got)))
        out.print(shown)
    notify(f"Adapter written to {out_dir}; serve it with:")
    notify(f"  neuroada serve {model} --adapter {out_dir.name}={out_dir}")
    if report.published is False:
        print_error(f"The server at {publish} does not serve it.")
        raise typer.Exit(1)


def _kept(out_dir: Path, save_steps: int) -> str:
    """Describe what an interrupted run keeps, as the end of a sentence."""
    from neuroada_serve.train.checkpoint import checkpoint_folder, newest_step

    folder = checkpoint_folder(out_dir)
    step = newest_step(folder)
    if step is not None:
        return (
            f": step {step} is kept in {folder}. The same command goes on from there; with --fresh "
            "it starts again"
        )
    if save_steps == 0:
        return ": nothing is kept, with --save-steps 0; the same command starts again"
    return " before the first step was kept; the same command starts again"
