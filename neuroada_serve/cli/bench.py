"""`neuroada bench`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neuroada_serve.benchmark.settings import LatencyConfig, OfflineConfig, ServingConfig
from neuroada_serve.cli.common import Model, app, command, err, out, print_error
from neuroada_serve.errors import UsageError

bench_app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure this engine, and compare it with others.",
)
app.add_typer(bench_app)


def _bench_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `bench_NAME` as `bench NAME`."""
    return command(function, bench_app, function.__name__.removeprefix("bench_"))


ReportOut = Annotated[
    Path | None,
    typer.Option(
        "--out", help="JSON file to write with every sample; a plot goes beside it as .png."
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the JSON as the last line of stdout, and tables on stderr."),
]


@_bench_command
def bench_throughput(
    model: Model, config: OfflineConfig, report: ReportOut = None, json_output: Json = False
) -> None:
    """Measure tokens per second, with and without adapters.

    Of decode, of prefill, and of whole calls.
    """
    from neuroada_serve.benchmark.offline import bench_throughput as bench

    _check_report(report)
    _finish_bench(bench(model, config, err), report, json_output)


@_bench_command
def bench_latency(
    model: Model, config: LatencyConfig, report: ReportOut = None, json_output: Json = False
) -> None:
    """Measure time to first token and per output token."""
    from neuroada_serve.benchmark.offline import bench_latency as bench

    _check_report(report)
    _finish_bench(bench(model, config, err), report, json_output)


@_bench_command
def bench_serving(
    config: ServingConfig, report: ReportOut = None, json_output: Json = False
) -> None:
    """Measure a server while requests arrive over time.

    Without --base-url one of ours is started for this.
    """
    from neuroada_serve.benchmark.serving import bench_serving as bench

    _check_report(report)
    _finish_bench(bench(config, err), report, json_output)


def _check_report(report: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
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
