"""`neuroada train`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from neuroada_serve.cli.common import (
    ChatTemplate,
    Columns,
    Dtype,
    Model,
    Plain,
    columns_of,
    command,
    interrupted,
    notify,
    out,
    print_error,
    rows_of,
    words,
)
from neuroada_serve.config import TrainConfig, help_of
from neuroada_serve.errors import UsageError


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
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Adapter folder to write.")],
    k: Annotated[
        str, typer.Option(metavar="K|PATTERN=K,...,K", help=help_of(TrainConfig, "k"))
    ] = "1",
    selection: Annotated[str, typer.Option(help=help_of(TrainConfig, "selection"))] = "magnitude",
    index_file: Annotated[
        Path | None, typer.Option(help=help_of(TrainConfig, "index_file"))
    ] = None,
    selection_rows: Annotated[int, typer.Option(help=help_of(TrainConfig, "selection_rows"))] = 256,
    coverage: Annotated[float, typer.Option(help=help_of(TrainConfig, "coverage"))] = 1.0,
    tune_bias: Annotated[
        bool, typer.Option("--tune-bias", help=help_of(TrainConfig, "tune_bias"))
    ] = False,
    lr: Annotated[str | None, typer.Option(help=help_of(TrainConfig, "lr"))] = None,
    epochs: Annotated[float | None, typer.Option(help=help_of(TrainConfig, "epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "max_steps"))] = None,
    batch_size: Annotated[int, typer.Option(help=help_of(TrainConfig, "batch_size"))] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option(help=help_of(TrainConfig, "gradient_accumulation"))
    ] = 1,
    max_length: Annotated[int, typer.Option(help=help_of(TrainConfig, "max_length"))] = 512,
    max_model_len: Annotated[
        int | None, typer.Option(help=help_of(TrainConfig, "max_model_len"))
    ] = None,
    task_type: Annotated[str, typer.Option(help=help_of(TrainConfig, "task_type"))] = "CAUSAL_LM",
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help=help_of(TrainConfig, "labels"))
    ] = None,
    head_lr: Annotated[float, typer.Option(help=help_of(TrainConfig, "head_lr"))] = 1e-2,
    too_long: Annotated[str, typer.Option(help=help_of(TrainConfig, "too_long"))] = "skip",
    columns: Columns = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only say what the rows are, and train nothing.")
    ] = False,
    eval_fraction: Annotated[float, typer.Option(help=help_of(TrainConfig, "eval_fraction"))] = 0.1,
    eval_data: Annotated[str | None, typer.Option(help=help_of(TrainConfig, "eval_data"))] = None,
    eval_steps: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "eval_steps"))] = None,
    patience: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "patience"))] = None,
    samples: Annotated[int, typer.Option(help=help_of(TrainConfig, "samples"))] = 3,
    save_steps: Annotated[int, typer.Option(help=help_of(TrainConfig, "save_steps"))] = 50,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard checkpoints instead of going on from them.")
    ] = False,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server that loads the finished adapter: http://HOST:PORT, with --out under its "
            "--adapter-dir. Exit code 1 where it does not.",
        ),
    ] = None,
    publish_improved: Annotated[
        bool,
        typer.Option(
            "--publish-improved",
            help="Publish adapters on the way, too, and none that scores worse on the held-out "
            "rows than what is served.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help=help_of(TrainConfig, "seed"))] = 0,
    warmup_ratio: Annotated[float, typer.Option(help=help_of(TrainConfig, "warmup_ratio"))] = 0.1,
    schedule: Annotated[str, typer.Option(help=help_of(TrainConfig, "schedule"))] = "linear",
    weight_decay: Annotated[float, typer.Option(help=help_of(TrainConfig, "weight_decay"))] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help=help_of(TrainConfig, "max_grad_norm"))] = 1.0,
    dtype: Dtype = "auto",
    bf16: Annotated[bool, typer.Option("--bf16", help=help_of(TrainConfig, "bf16"))] = False,
    recompute: Annotated[str, typer.Option(help=help_of(TrainConfig, "recompute"))] = "nothing",
    recompute_share: Annotated[
        float, typer.Option(help=help_of(TrainConfig, "recompute_share"))
    ] = 1.0,
    compile_: Annotated[
        bool, typer.Option("--compile", help=help_of(TrainConfig, "compile"))
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing", help=help_of(TrainConfig, "packing"))
    ] = False,
    bypass: Annotated[bool, typer.Option("--bypass", help=help_of(TrainConfig, "bypass"))] = False,
    quantize: Annotated[str, typer.Option(help=help_of(TrainConfig, "quantize"))] = "none",
    chat_template: ChatTemplate = None,
    plain: Plain = False,
) -> None:
    """Train an adapter or a classifier on rows. The loss is on the answers."""
    k_others, k_pattern = _k_by_module(k)
    config = TrainConfig(
        k=k_others,
        k_pattern=k_pattern,
        selection=cast(Any, selection),  # TrainConfig checks the words
        index_file=index_file,
        selection_rows=selection_rows,
        coverage=coverage,
        tune_bias=tune_bias,
        lr=_learning_rate(lr),
        gradient_accumulation=gradient_accumulation,
        eval_steps=eval_steps,
        patience=patience,
        samples=samples,
        save_steps=save_steps,
        schedule=cast(Any, schedule),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        recompute=cast(Any, recompute),
        recompute_share=recompute_share,
        compile=compile_,
        packing=packing,
        bypass=bypass,
        quantize=cast(Any, quantize),
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        max_model_len=max_model_len,
        too_long=cast(Any, too_long),
        task_type=cast(Any, task_type),
        labels=() if labels is None else tuple(words(labels)),
        head_lr=head_lr,
        columns=columns_of(columns),
        eval_fraction=eval_fraction,
        seed=seed,
        warmup_ratio=warmup_ratio,
        dtype=dtype,
        prompt_format="plain" if plain else "chat",
    )
    rows = rows_of(data)
    if eval_data is not None:
        config = replace(config, eval_data=rows_of(eval_data))

    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model
    from neuroada_serve.train.processes import joined
    from neuroada_serve.train.trainer import check_place, train_adapter

    if not check:
        check_place(out_dir)
    with joined() as processes:
        tell = notify if processes.is_first else lambda message: None
        base = load_base(resolve_model(model, tell), config.dtype, chat_template=chat_template)
        if check:
            from neuroada_serve.train.data import load_data

            tell(f"{load_data(base, rows, config).report}.")
            return
        with interrupted(lambda: _kept(out_dir, save_steps)):
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
    from neuroada_serve.train.run import figure_name

    baseline = report.baseline
    if report.before is not None and report.after is not None:
        constant = [] if baseline is None else [f"always {baseline.answer!r}"]
        table = Table("held-out", *map(escape, constant), "before", "after")
        for name, before, after, known in (
            ("loss", report.before.loss, report.after.loss, baseline and baseline.loss),
            (
                figure_name(report.adapter.config.labels).replace("_", " "),
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
    """What an interrupted run leaves, as the end of a sentence."""
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


def _k_by_module(text: str) -> tuple[int, dict[str, int]]:
    """8, or q_proj|v_proj=8,1: k of the modules that no pattern matches, and of the patterns'."""
    *parts, last = text.split(",")
    if "=" in last:
        parts, last = [*parts, last], "0"
    found = [re.fullmatch(r"\s*(\S+?)\s*=\s*(\d+)\s*", part) for part in parts]
    if not last.strip().isdecimal() or None in found:
        raise UsageError(f"--k takes a number or PATTERN=K,PATTERN=K,K, not {text!r}")
    return int(last), {each[1]: int(each[2]) for each in found if each is not None}


def _learning_rate(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr takes a number or auto, not {text!r}") from None
