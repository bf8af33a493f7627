"""`neuroada bench`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neuroada_serve.benchmark.settings import OfflineConfig, ServingConfig, parse_goodput
from neuroada_serve.cli.common import Model, app, command, err, out, print_error, words
from neuroada_serve.config import help_of
from neuroada_serve.errors import UsageError

bench_app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure this engine, and others beside it.",
)
app.add_typer(bench_app)


def _bench_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `bench_NAME` as `bench NAME`."""
    return command(function, bench_app, function.__name__.removeprefix("bench_"))


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
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help=help_of(OfflineConfig, "deterministic"))
]
Check = Annotated[bool, _offline_option("check")]
Peers = Annotated[list[str] | None, typer.Option("--peer", help=help_of(OfflineConfig, "peers"))]
PeerPython = Annotated[Path | None, _offline_option("peer_python")]
PeerEager = Annotated[bool | None, _offline_option("peer_eager")]
LoraRank = Annotated[int, _offline_option("lora_rank")]
ReportOut = Annotated[
    Path | None,
    typer.Option("--out", help="Write every sample there as JSON, and a plot beside it as .png."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the JSON as the last line of stdout, tables on stderr."),
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
    deterministic: Deterministic = False,
    check: Check = True,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_eager: PeerEager = None,
    lora_rank: LoraRank = 8,
    report: ReportOut = None,
    json_output: Json = False,
) -> None:
    """Tokens per second, with and without adapters. Of decode, prefill and whole calls."""
    config = OfflineConfig(
        concurrency=_integers("--concurrency", concurrency),
        popularity=words(popularity),
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
        deterministic=deterministic,
        check=check,
        peers=tuple(peer or ()),
        peer_python=peer_python,
        peer_eager=peer_eager,
        lora_rank=lora_rank,
    )

    from neuroada_serve.benchmark.offline import bench_throughput as bench

    _check_report(report)
    _finish_bench(bench(model, config, err), report, json_output)


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
    deterministic: Deterministic = False,
    check: Check = True,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_eager: PeerEager = None,
    lora_rank: LoraRank = 8,
    report: ReportOut = None,
    json_output: Json = False,
) -> None:
    """Time to first token and per output token at few requests."""
    config = OfflineConfig(
        concurrency=_integers("--concurrency", concurrency),
        popularity=words(popularity),
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
        deterministic=deterministic,
        check=check,
        peers=tuple(peer or ()),
        peer_python=peer_python,
        peer_eager=peer_eager,
        lora_rank=lora_rank,
    )

    from neuroada_serve.benchmark.offline import bench_latency as bench

    _check_report(report)
    _finish_bench(bench(model, config, err), report, json_output)


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
    json_output: Json = False,
) -> None:
    """Load a server with requests as they arrive. It runs already, or is started for this."""
    config = ServingConfig(
        base_url=base_url,
        model=model,
        lora_modules=words(lora_modules),
        popularity=words(popularity),
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

    _check_report(report)
    _finish_bench(bench(config, err), report, json_output)


def _check_report(report: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    if report is None:
        return
    from neuroada_serve.adapters.durable import check_writable

    if report.is_dir():
        raise UsageError(f"--out {report} is a folder")
    check_writable(report.parent, report)


def _finish_bench(result: dict[str, Any], report: Path | None, json_output: bool) -> None:
    from neuroada_serve.benchmark.report import write_report

    write_report(result, report, err if json_output else out, err, json_output)
    if not all(check["ok"] for check in result.get("check") or ()):
        print_error("Error: answers differ from the reference op's; nothing was timed")
        raise typer.Exit(1)


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise UsageError(f"{flag} takes integers such as 1,4,16, got {text!r}") from None
