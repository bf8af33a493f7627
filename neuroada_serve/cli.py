"""The `neuroada` command. Heavy imports wait until a command needs them."""

import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from neuroada_serve import uncollected
from neuroada_serve.benchmark.settings import OfflineConfig, ServingConfig, parse_goodput
from neuroada_serve.config import EngineConfig, ServerConfig, TrainConfig, help_of, parse_bytes
from neuroada_serve.convert_cli import COMMANDS, convert_app
from neuroada_serve.errors import EngineError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from neuroada_serve.engine.llm import LLM
    from neuroada_serve.train.rows import Data

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, serve and merge NeuroAda adapters. MODEL is a local Hugging Face folder, a .gguf "
    "file, `demo`, or a hub id.",
)
_MOST_LISTED = 20  # adapters that `serve` names at its start
err = Console(stderr=True)
out = Console()

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, demo, or a hub id.")
]
Dtype = Annotated[str, typer.Option(help=help_of(EngineConfig, "dtype"))]
Plain = Annotated[
    bool, typer.Option("--plain", help="Use prompts as they are, without the chat template.")
]


def main() -> None:
    """Console entry point."""
    # Read by OpenMP when torch is imported. Its threads otherwise spin for milliseconds while they
    # wait, which beside other work takes the time from each other; putting them to sleep at once
    # costs more still on an idle machine. So they spin for about as long as Python needs between
    # two operators: bench/LOG.md.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure this engine, and others beside it. The last line of stdout is one JSON document.",
)
app.add_typer(bench_app, name="bench")


def _command(
    function: Callable[..., None], group: typer.Typer = app, name: str | None = None
) -> Callable[..., None]:
    """Register a command; a user's mistake ends it with one sentence and exit code 2."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UsageError as error:
            _print_error(f"Error: {error}")
            raise typer.Exit(2) from None
        except EngineError as error:
            _print_error(f"Engine failure: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    group.command(name=name or function.__name__.strip("_"))(run)
    return run


def _bench_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `bench_NAME` as `bench NAME`."""
    return _command(function, bench_app, function.__name__.removeprefix("bench_"))


app.add_typer(convert_app, name="convert")
for _name, _function in COMMANDS.items():
    _command(_function, convert_app, _name)


@contextmanager
def _for_good() -> Iterator[None]:
    """What is imported and loaded inside stays until the process ends. The garbage collector never
    looks at it: neither now, nor in the steps of a server, nor on the way out."""
    with uncollected():
        yield
        gc.freeze()


def _print_error(message: str) -> None:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _notify(message: str) -> None:
    err.print(message, markup=False, highlight=False, soft_wrap=True)


@_command
def demo() -> None:
    """Serve the shipped adapters beside the base in one batch, then hot-merge one."""
    from neuroada_serve.demo import run_demo

    run_demo(out, _notify)


@_command
def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Serve the adapter in PATH as NAME. Repeatable."),
    ] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option(help=help_of(ServerConfig, "adapter_dir"))
    ] = None,
    preload: Annotated[
        bool, typer.Option("--preload", help=help_of(ServerConfig, "preload"))
    ] = False,
    adapter_memory: Annotated[
        str | None, typer.Option(help=help_of(EngineConfig, "adapter_memory"))
    ] = None,
    adapter_host_memory: Annotated[
        str | None, typer.Option(help=help_of(EngineConfig, "adapter_host_memory"))
    ] = None,
    prefix_cache_memory: Annotated[
        str | None, typer.Option(help=help_of(EngineConfig, "prefix_cache_memory"))
    ] = None,
    tenant_header: Annotated[
        str | None, typer.Option(help=help_of(ServerConfig, "tenant_header"))
    ] = None,
    tenant_weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help=help_of(EngineConfig, "tenant_weights")),
    ] = None,
    adapter_weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help=help_of(EngineConfig, "adapter_weights")),
    ] = None,
    allow_runtime_adapters: Annotated[
        bool,
        typer.Option(
            "--allow-runtime-adapters", help=help_of(ServerConfig, "allow_runtime_adapters")
        ),
    ] = False,
    host: Annotated[str, typer.Option(help=help_of(ServerConfig, "host"))] = "127.0.0.1",
    port: Annotated[int, typer.Option(help=help_of(ServerConfig, "port"))] = 8000,
    merge: Annotated[str, typer.Option(help=help_of(EngineConfig, "merge"))] = "never",
    max_num_seqs: Annotated[int, typer.Option(help=help_of(EngineConfig, "max_num_seqs"))] = 16,
    max_model_len: Annotated[
        int | None, typer.Option(help=help_of(EngineConfig, "max_model_len"))
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help=help_of(EngineConfig, "max_num_batched_tokens"))
    ] = 512,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help=help_of(EngineConfig, "device"))] = "auto",
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help=help_of(EngineConfig, "enforce_eager"))
    ] = False,
    max_waiting: Annotated[int, typer.Option(help=help_of(ServerConfig, "max_waiting"))] = 256,
    drain_timeout_s: Annotated[
        float, typer.Option(help=help_of(ServerConfig, "drain_timeout_s"))
    ] = 10.0,
) -> None:
    """Serve a base and its adapters over an OpenAI-style HTTP endpoint."""
    server_config = ServerConfig(
        host=host,
        port=port,
        adapter_dir=adapter_dir,
        preload=preload,
        tenant_header=tenant_header,
        allow_runtime_adapters=allow_runtime_adapters,
        max_waiting=max_waiting,
        drain_timeout_s=drain_timeout_s,
    )
    adapters = _named_adapters(adapter or [])
    with _for_good():
        from neuroada_serve.benchmark.report import progress_bar
        from neuroada_serve.engine.llm import LLM
        from neuroada_serve.server.serve import serve as run_server

        with progress_bar(err) as progress:
            llm = LLM(
                model,
                adapters,
                adapter_dir=adapter_dir,
                preload=preload,
                notify=_notify,
                on_progress=_shown_in(progress),
                merge=merge,
                adapter_memory=_optional_bytes(adapter_memory),
                adapter_host_memory=_optional_bytes(adapter_host_memory),
                prefix_cache_memory=_optional_bytes(prefix_cache_memory),
                tenant_weights=_weights("--tenant-weight", tenant_weight or []),
                adapter_weights=_weights("--adapter-weight", adapter_weight or []),
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                dtype=dtype,
                device=device,
                enforce_eager=enforce_eager,
            )

    def on_ready(host: str, port: int) -> None:
        names = llm.adapters
        listed = ", ".join(names) if len(names) <= _MOST_LISTED else f"{len(names)} in all"
        _notify(
            f"Serving {llm.engine.base.spec.name} on http://{host}:{port}/v1; adapters: "
            f"{listed or 'none yet'}"
        )

    code = run_server(llm.engine, server_config, on_ready, _notify)
    metrics = llm.engine.metrics
    endings = ", ".join(f"{count} {reason.value}" for reason, count in metrics.num_finished.items())
    _notify(f"Stopped. Answers by ending: {endings}; {metrics.num_output_tokens} tokens in all.")
    if code:
        raise typer.Exit(code)


def _named_adapters(flags: list[str]) -> dict[str, Path]:
    """The adapters of --adapter NAME=PATH."""
    adapters: dict[str, Path] = {}
    for flag in flags:
        name, separator, path = flag.partition("=")
        if not separator or not name or not path:
            raise UsageError(f"--adapter takes NAME=PATH, got {flag!r}")
        adapters[name] = Path(path)
    return adapters


def _weights(option: str, flags: list[str]) -> dict[str, float]:
    """The shares of NAME=WEIGHT options."""
    weights: dict[str, float] = {}
    for flag in flags:
        name, separator, weight = flag.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise UsageError(f"{option} takes NAME=WEIGHT, such as big-customer=2, got {flag!r}")
    return weights


def _optional_bytes(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def _shown_in(progress: "Progress") -> "Callable[[str, int, int], None]":
    """Shows work on adapters as it goes on, one bar for each kind."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        step = max(1, total // 100)
        progress.update(tasks[what], completed=done, refresh=done % step == 0 or done == total)

    return show


@_command
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
    lr: Annotated[str | None, typer.Option(help=help_of(TrainConfig, "lr"))] = None,
    epochs: Annotated[float | None, typer.Option(help=help_of(TrainConfig, "epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "max_steps"))] = None,
    batch_size: Annotated[int, typer.Option(help=help_of(TrainConfig, "batch_size"))] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option(help=help_of(TrainConfig, "gradient_accumulation"))
    ] = 1,
    max_length: Annotated[int, typer.Option(help=help_of(TrainConfig, "max_length"))] = 512,
    task_type: Annotated[str, typer.Option(help=help_of(TrainConfig, "task_type"))] = "CAUSAL_LM",
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help=help_of(TrainConfig, "labels"))
    ] = None,
    head_lr: Annotated[float, typer.Option(help=help_of(TrainConfig, "head_lr"))] = 1e-2,
    too_long: Annotated[str, typer.Option(help=help_of(TrainConfig, "too_long"))] = "skip",
    columns: Annotated[
        str, typer.Option(metavar="KEY=COLUMN,...", help=help_of(TrainConfig, "columns"))
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only say what the rows are, and train nothing.")
    ] = False,
    eval_fraction: Annotated[float, typer.Option(help=help_of(TrainConfig, "eval_fraction"))] = 0.1,
    eval_data: Annotated[str | None, typer.Option(help=help_of(TrainConfig, "eval_data"))] = None,
    eval_steps: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "eval_steps"))] = None,
    patience: Annotated[int | None, typer.Option(help=help_of(TrainConfig, "patience"))] = None,
    save_steps: Annotated[int, typer.Option(help=help_of(TrainConfig, "save_steps"))] = 50,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard checkpoints instead of going on from them.")
    ] = False,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server that loads every improved adapter: http://HOST:PORT, with --out under its "
            "--adapter-dir.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help=help_of(TrainConfig, "seed"))] = 0,
    warmup_ratio: Annotated[float, typer.Option(help=help_of(TrainConfig, "warmup_ratio"))] = 0.1,
    schedule: Annotated[str, typer.Option(help=help_of(TrainConfig, "schedule"))] = "linear",
    weight_decay: Annotated[float, typer.Option(help=help_of(TrainConfig, "weight_decay"))] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help=help_of(TrainConfig, "max_grad_norm"))] = 1.0,
    dtype: Dtype = "auto",
    bf16: Annotated[bool, typer.Option("--bf16", help=help_of(TrainConfig, "bf16"))] = False,
    recompute: Annotated[str, typer.Option(help=help_of(TrainConfig, "recompute"))] = "nothing",
    compile_: Annotated[
        bool, typer.Option("--compile", help=help_of(TrainConfig, "compile"))
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing", help=help_of(TrainConfig, "packing"))
    ] = False,
    bypass: Annotated[bool, typer.Option("--bypass", help=help_of(TrainConfig, "bypass"))] = False,
    quantize: Annotated[str, typer.Option(help=help_of(TrainConfig, "quantize"))] = "none",
    plain: Plain = False,
) -> None:
    """Train an adapter on rows of questions and answers, or a classifier; loss on answers only."""
    k_others, k_pattern = _k_by_module(k)
    config = TrainConfig(
        k=k_others,
        k_pattern=k_pattern,
        selection=cast(Any, selection),  # TrainConfig checks the words
        index_file=index_file,
        selection_rows=selection_rows,
        coverage=coverage,
        lr=_learning_rate(lr),
        gradient_accumulation=gradient_accumulation,
        eval_steps=eval_steps,
        patience=patience,
        save_steps=save_steps,
        schedule=cast(Any, schedule),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        recompute=cast(Any, recompute),
        compile=compile_,
        packing=packing,
        bypass=bypass,
        quantize=cast(Any, quantize),
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        too_long=cast(Any, too_long),
        task_type=cast(Any, task_type),
        labels=() if labels is None else tuple(_words(labels)),
        head_lr=head_lr,
        columns=_columns(columns),
        eval_fraction=eval_fraction,
        seed=seed,
        warmup_ratio=warmup_ratio,
        dtype=dtype,
        prompt_format="plain" if plain else "chat",
    )
    rows = _data(data)
    if eval_data is not None:
        config = replace(config, eval_data=_data(eval_data))

    from neuroada_serve.model.loader import load_base
    from neuroada_serve.model.source import resolve_model
    from neuroada_serve.train.processes import joined
    from neuroada_serve.train.trainer import train_adapter

    with joined() as processes:
        notify = _notify if processes.is_first else lambda message: None
        base = load_base(resolve_model(model, notify), config.dtype)
        if check:
            from neuroada_serve.train.data import load_data

            notify(f"{load_data(base, rows, config).report}.")
            return
        report = train_adapter(
            base, rows, out_dir, config, notify=notify, fresh=fresh, publish=publish
        )
    if not processes.is_first:
        return
    table = Table("held-out", "before", "after")
    if report.before is not None and report.after is not None:
        table.add_row("loss", f"{report.before.loss:.3f}", f"{report.after.loss:.3f}")
        share = "accuracy" if report.adapter.config.labels else "exact match"
        table.add_row(share, f"{report.before.exact_match:.3f}", f"{report.after.exact_match:.3f}")
        out.print(table)
    _notify(f"Adapter written to {out_dir}; serve it with:")
    _notify(f"  neuroada serve {model} --adapter {out_dir.name}={out_dir}")


def _k_by_module(text: str) -> tuple[int, dict[str, int]]:
    """8, or q_proj|v_proj=8,1: k of the modules that no pattern matches, and of the patterns'."""
    *parts, last = text.split(",")
    if "=" in last:
        parts, last = [*parts, last], "0"
    found = [re.fullmatch(r"\s*(\S+?)\s*=\s*(\d+)\s*", part) for part in parts]
    if not last.strip().isdecimal() or None in found:
        raise UsageError(f"--k takes a number or PATTERN=K,PATTERN=K,K, not {text!r}")
    return int(last), {each[1]: int(each[2]) for each in found if each is not None}


def _columns(text: str) -> dict[str, str]:
    """prompt=question,completion=reply as a mapping."""
    columns = {}
    for part in filter(None, text.split(",")):
        key, equals, column = part.partition("=")
        if not equals or not key or not column:
            raise UsageError(f"--columns takes KEY=COLUMN,KEY=COLUMN, not {text!r}")
        columns[key.strip()] = column.strip()
    return columns


def _learning_rate(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr takes a number or auto, not {text!r}") from None


def _data(source: str) -> "Data":
    """The rows that --data or --eval-data names."""
    if not source.startswith("hub:"):
        if not Path(source).is_file():
            raise UsageError(f"no file {source!r}")
        return Path(source)
    from neuroada_serve.train.hub import open_hub_rows

    _notify(f"Reading {source}.")
    return open_hub_rows(source)


def _llm_with(
    model: str, adapter: Path | None, dtype: str, **config: Any
) -> "tuple[LLM, str | None]":
    """A model with at most one adapter, and the name it is served under."""
    adapters = {} if adapter is None else {"adapter": adapter}
    with _for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(model, adapters, dtype=dtype, notify=_notify, **config)
    return llm, None if adapter is None else "adapter"


Adapter = Annotated[Path | None, typer.Option(help="Adapter folder; default: the base alone.")]


@_command
def _eval(
    model: Model,
    data: Annotated[str, typer.Option(help="Rows, as train takes them.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Adapter folder to score. Repeatable."),
    ] = None,
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
            help="What the answer stands behind; default 'the correct answer is ' where rows have "
            "an answer key."
        ),
    ] = None,
    pick: Annotated[
        str, typer.Option(help="Which option counts of those a text names: first or last.")
    ] = "first",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an answer. Default: 4 more than the right one; at least 32 for "
            "choice_generation and f1, 512 for number."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Most rows to use, from the top; default: all.")
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
    plain: Plain = False,
) -> None:
    """Score a base and adapters on the answers of rows, in one run."""
    rows = _data(data)
    folders = _adapters_to_score(adapter or [])
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
        choices=None if choices is None else _words(choices),
        pick=cast(Any, pick),  # EvalSettings checks the words
        max_tokens=max_tokens,
        limit=limit,
        prompt_format="plain" if plain else "chat",
    )
    if out_file is not None:
        report.check_out(out_file)
    with _for_good():
        from neuroada_serve.engine.llm import LLM

        llm = LLM(model, folders, dtype=dtype, notify=_notify)
    classifiers = [name for name in folders if llm.engine.adapters.store.get(name).labels]
    if classifiers:
        from neuroada_serve.evaluation.classifiers import evaluate_classifiers

        if others := [name for name in folders if name not in classifiers]:
            raise UsageError(
                f"{classifiers[0]} is a classifier and {others[0]} is not; score them apart"
            )
        if metric is not None:
            raise UsageError("a classifier has figures of its own; leave out --metric")
        base = False  # it has no head for these labels
        found = evaluate_classifiers(llm, rows, classifiers, limit, console=err)
    else:
        asked = [*([None] if base else []), *folders]
        found = evaluate(llm, rows, asked, settings, console=err)
    subjects = [*([report.BASE] if base else []), *folders]
    if out_file is not None:
        written = report.write_results(found, subjects, model, rows, out_file, _notify)
        _notify("Written: " + ", ".join(map(str, written)))
    if save:
        of_base, of_adapters = found.results[:base], found.results[base:]
        for folder, result in zip(folders.values(), of_adapters, strict=True):
            report.save_scores(folder, result, next(iter(of_base), None), rows, _notify)
            _notify(f"Scores saved in {folder}")
    if json_output:
        first = found.results[min(int(base), len(found.results) - 1)]  # adapter, else the base
        flat = {name: score.value for name, score in first.scores.items()}
        whole = report.document(found, subjects, model, rows)
        print(json.dumps({"rows": found.rows, **flat, **whole}))
        return
    out.print(report.score_table(found, subjects, f"{rows.name}, {found.rows} rows"))


def _adapters_to_score(flags: list[str]) -> dict[str, Path]:
    """The folders of --adapter PATH or NAME=PATH by name; without one, their folder's."""
    folders: dict[str, Path] = {}
    for flag in flags:
        name, separator, path = flag.partition("=")
        if not separator or Path(flag).exists():
            name, path = Path(flag).resolve().name, flag
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name) or not path:
            raise UsageError(f"--adapter {flag!r}: write NAME={path}, NAME of letters and digits")
        if name in folders or name == "base":
            raise UsageError(f"two models are called {name!r}: name one, --adapter NAME={path}")
        folders[name] = Path(path)
    return folders


@_command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    adapter: Adapter = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling; default: a random one.")
    ] = None,
    dtype: Dtype = "auto",
    plain: Plain = False,
) -> None:
    """Answer one prompt, streamed to the terminal."""
    from neuroada_serve.request import Output, SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    llm, name = _llm_with(model, adapter, dtype, max_num_seqs=1)

    def show(output: Output) -> None:
        sys.stdout.write(output.text)
        sys.stdout.flush()

    if plain or not llm.engine.base.has_chat_template:
        llm.generate(prompt, params, name, on_output=show)
    else:
        llm.chat([{"role": "user", "content": prompt}], params, name, on_output=show)
    print()


@_command
def classify(
    model: Model,
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to classify.")],
    adapter: Annotated[Path, typer.Option(help="Folder of a classifier's adapter.")],
    dtype: Dtype = "auto",
) -> None:
    """Label texts by a classifier: a line for each, its label and the labels' probabilities."""
    llm, name = _llm_with(model, adapter, dtype)
    for output in llm.classify(text, name):
        shares = zip(output.labels, output.probs, strict=True)
        print(output.label, *(f"{label}={share:.4f}" for label, share in shares), sep="\t")


@_command
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the checkpoint: auto (as stored), float32, ...")
    ] = "auto",
) -> None:
    """Write base and adapter as one plain Hugging Face checkpoint."""
    EngineConfig(dtype=dtype)  # refuses an unknown dtype before the model is loaded

    from neuroada_serve.model.export import export_merged
    from neuroada_serve.model.source import resolve_model

    export_merged(resolve_model(model, _notify), adapter, out_dir, dtype)
    _notify(f"Checkpoint written to {out_dir}")


@_command
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
) -> None:
    """Show what an adapter holds, after checking its files."""
    import torch

    from neuroada_serve.adapters.format import WEIGHTS_FILE
    from neuroada_serve.adapters.reader import load_adapter

    loaded = load_adapter(adapter)
    config = loaded.config
    values = torch.cat([part.bypass.float().flatten() for part in loaded.modules.values()])
    dtypes = {str(part.bypass.dtype).removeprefix("torch.") for part in loaded.modules.values()}
    table = Table(show_header=False, title=str(adapter))
    for key, value in (
        ("base", config.base_model_name_or_path),
        ("base fingerprint", config.base_fingerprint),
        ("digest", loaded.digest),
        ("k", config.k),
        ("selection", config.selection),
        ("task", config.task_type),
        *([("labels", ", ".join(config.labels))] if config.labels else []),
        ("target modules", ", ".join(config.target_modules)),
        ("modules", len(loaded.modules)),
        ("values", f"{loaded.nnz:,} {', '.join(sorted(dtypes))}"),
        ("weights file", f"{(adapter / WEIGHTS_FILE).stat().st_size:,} bytes"),
        ("mean |value|", f"{values.abs().mean():.4g}"),
        ("largest |value|", f"{values.abs().max():.4g}"),
        ("values that are 0", f"{(values == 0).float().mean():.1%}"),
        ("metadata", json.dumps(dict(config.metadata), indent=2, ensure_ascii=False)),
    ):
        table.add_row(key, str(value))
    out.print(table, markup=False)


# --- bench -----------------------------------------------------------------------------------


def _offline_option(name: str) -> Any:
    return typer.Option(help=help_of(OfflineConfig, name))


def _serving_option(name: str) -> Any:
    return typer.Option(help=help_of(ServingConfig, name))


Concurrency = Annotated[str, _offline_option("concurrency")]
Popularity = Annotated[str, _offline_option("popularity")]
Ks = Annotated[str, _offline_option("k")]
NumAdapters = Annotated[int, _offline_option("num_adapters")]
PromptLen = Annotated[int, _offline_option("prompt_len")]
OutputLen = Annotated[int, _offline_option("output_len")]
Rounds = Annotated[int, _offline_option("rounds")]
Seed = Annotated[int, _offline_option("seed")]
TextFile = Annotated[Path | None, _offline_option("text_file")]
BenchDtype = Annotated[str, _offline_option("dtype")]
Device = Annotated[str, _offline_option("device")]
Threads = Annotated[int | None, _offline_option("threads")]
BatchedTokens = Annotated[int, _offline_option("max_num_batched_tokens")]
Check = Annotated[bool, _offline_option("check")]
Peers = Annotated[list[str] | None, typer.Option("--peer", help=help_of(OfflineConfig, "peers"))]
PeerPython = Annotated[Path | None, _offline_option("peer_python")]
PeerEager = Annotated[bool | None, _offline_option("peer_eager")]
LoraRank = Annotated[int, _offline_option("lora_rank")]
ReportOut = Annotated[
    Path | None,
    typer.Option("--out", help="Write the JSON there too, and a plot beside it as .png."),
]


@_bench_command
def bench_throughput(
    model: Model,
    concurrency: Concurrency = "1,4,16",
    popularity: Popularity = "identical,distinct,merged",
    k: Ks = "1,8",
    num_adapters: NumAdapters = 16,
    prompt_len: PromptLen = 32,
    output_len: OutputLen = 64,
    prefill_len: Annotated[int, _offline_option("prefill_len")] = 512,
    rounds: Rounds = 5,
    seed: Seed = 0,
    text_file: TextFile = None,
    dtype: BenchDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    max_num_batched_tokens: BatchedTokens = 512,
    check: Check = True,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_eager: PeerEager = None,
    lora_rank: LoraRank = 8,
    report: ReportOut = None,
) -> None:
    """Tokens per second of decode, prefill and whole calls, with and without adapters."""
    config = OfflineConfig(
        concurrency=_integers("--concurrency", concurrency),
        popularity=_words(popularity),
        k=_integers("--k", k),
        num_adapters=num_adapters,
        prompt_len=prompt_len,
        output_len=output_len,
        prefill_len=prefill_len,
        rounds=rounds,
        seed=seed,
        text_file=text_file,
        dtype=dtype,
        device=device,
        threads=threads,
        max_num_batched_tokens=max_num_batched_tokens,
        check=check,
        peers=tuple(peer or ()),
        peer_python=peer_python,
        peer_eager=peer_eager,
        lora_rank=lora_rank,
    )

    from neuroada_serve.benchmark.offline import bench_throughput as bench

    _finish_bench(bench(model, config, err), report)


@_bench_command
def bench_latency(
    model: Model,
    concurrency: Concurrency = "1",
    popularity: Popularity = "identical,merged",
    k: Ks = "1,8",
    num_adapters: NumAdapters = 16,
    num_prompts: Annotated[int, _offline_option("num_prompts")] = 8,
    prompt_len: PromptLen = 32,
    output_len: OutputLen = 64,
    rounds: Rounds = 5,
    seed: Seed = 0,
    text_file: TextFile = None,
    dtype: BenchDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    max_num_batched_tokens: BatchedTokens = 512,
    check: Check = True,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_eager: PeerEager = None,
    lora_rank: LoraRank = 8,
    report: ReportOut = None,
) -> None:
    """Time to first token and per output token, a few requests at a time."""
    config = OfflineConfig(
        concurrency=_integers("--concurrency", concurrency),
        popularity=_words(popularity),
        k=_integers("--k", k),
        num_adapters=num_adapters,
        num_prompts=num_prompts,
        prompt_len=prompt_len,
        output_len=output_len,
        prefill_len=0,
        rounds=rounds,
        seed=seed,
        text_file=text_file,
        dtype=dtype,
        device=device,
        threads=threads,
        max_num_batched_tokens=max_num_batched_tokens,
        check=check,
        peers=tuple(peer or ()),
        peer_python=peer_python,
        peer_eager=peer_eager,
        lora_rank=lora_rank,
    )

    from neuroada_serve.benchmark.offline import bench_latency as bench

    _finish_bench(bench(model, config, err), report)


@_bench_command
def bench_serving(
    base_url: Annotated[str | None, _serving_option("base_url")] = None,
    model: Annotated[str | None, _serving_option("model")] = None,
    lora_modules: Annotated[str, _serving_option("lora_modules")] = "",
    popularity: Annotated[str, _serving_option("popularity")] = "base,uniform",
    num_adapters: Annotated[int, _serving_option("num_adapters")] = 16,
    k: Annotated[int, _serving_option("k")] = 1,
    num_prompts: Annotated[int, _serving_option("num_prompts")] = 64,
    request_rate: Annotated[float, _serving_option("request_rate")] = math.inf,
    burstiness: Annotated[float, _serving_option("burstiness")] = 1.0,
    max_concurrency: Annotated[int | None, _serving_option("max_concurrency")] = None,
    input_len: Annotated[int, _serving_option("input_len")] = 32,
    output_len: Annotated[int, _serving_option("output_len")] = 32,
    goodput: Annotated[list[str] | None, _serving_option("goodput")] = None,
    rounds: Annotated[int, _serving_option("rounds")] = 1,
    seed: Annotated[int, _serving_option("seed")] = 0,
    vocab: Annotated[int, _serving_option("vocab")] = 1000,
    timeout_s: Annotated[float, _serving_option("timeout_s")] = 600.0,
    report: ReportOut = None,
) -> None:
    """Load a running server, or one started for the purpose, with requests as they arrive."""
    config = ServingConfig(
        base_url=base_url,
        model=model,
        lora_modules=_words(lora_modules),
        popularity=_words(popularity),
        num_adapters=num_adapters,
        k=k,
        num_prompts=num_prompts,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        input_len=input_len,
        output_len=output_len,
        goodput=parse_goodput(goodput or []),
        rounds=rounds,
        seed=seed,
        vocab=vocab,
        timeout_s=timeout_s,
    )

    from neuroada_serve.benchmark.serving import bench_serving as bench

    _finish_bench(bench(config, err), report)


def _finish_bench(result: dict[str, Any], report: Path | None) -> None:
    from neuroada_serve.benchmark.report import write_report

    write_report(result, report, err)
    if not all(check["ok"] for check in result.get("check") or ()):
        _print_error("Error: answers differ from the reference op's; nothing was timed")
        raise typer.Exit(1)


def _words(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise UsageError(f"{flag} takes integers such as 1,4,16, got {text!r}") from None
