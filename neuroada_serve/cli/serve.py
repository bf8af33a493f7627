"""`neuroada demo` and `neuroada serve`."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuroada_serve.cli.common import (
    Adapters,
    ChatTemplate,
    Deterministic,
    Dtype,
    Model,
    adapters_of,
    command,
    err,
    for_good,
    notify,
    out,
)
from neuroada_serve.config import EngineConfig, ServerConfig, help_of, parse_bytes
from neuroada_serve.errors import UsageError
from neuroada_serve.server.listener import bind
from neuroada_serve.server.logs import logged
from neuroada_serve.server.signals import EarlySignals

if TYPE_CHECKING:
    from rich.progress import Progress

_MOST_LISTED = 20  # adapters that `serve` names at its start


@command
def demo() -> None:
    """Serve the shipped adapters in one batch, then hot-merge one."""
    from neuroada_serve.demo import run_demo

    run_demo(out, notify)


@command
def serve(
    model: Model,
    adapter: Adapters = None,
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
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=help_of(ServerConfig, "served_model_name")),
    ] = None,
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
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help=help_of(EngineConfig, "device"))] = "auto",
    deterministic: Deterministic = False,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help=help_of(EngineConfig, "enforce_eager"))
    ] = False,
    max_connections: Annotated[
        int | None, typer.Option(help=help_of(ServerConfig, "max_connections"))
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=help_of(ServerConfig, "allowed_hosts")),
    ] = None,
    log_level: Annotated[str, typer.Option(help=help_of(ServerConfig, "log_level"))] = "info",
    enable_log_requests: Annotated[
        bool,
        typer.Option("--enable-log-requests", help=help_of(ServerConfig, "enable_log_requests")),
    ] = False,
    max_waiting: Annotated[int, typer.Option(help=help_of(ServerConfig, "max_waiting"))] = 256,
    drain_timeout_s: Annotated[
        float, typer.Option(help=help_of(ServerConfig, "drain_timeout_s"))
    ] = 10.0,
) -> None:
    """Serve a base and its adapters over HTTP, OpenAI-style."""
    server_config = ServerConfig(
        host=host,
        port=port,
        adapter_dir=adapter_dir,
        preload=preload,
        tenant_header=tenant_header,
        allow_runtime_adapters=allow_runtime_adapters,
        max_waiting=max_waiting,
        max_connections=max_connections,
        allowed_hosts=tuple(allowed_host or ()),
        served_model_name=tuple(served_model_name or ()),
        log_level=log_level,
        enable_log_requests=enable_log_requests,
        drain_timeout_s=drain_timeout_s,
    )
    engine_options: dict[str, Any] = {
        "merge": merge,
        "adapter_memory": _optional_bytes(adapter_memory),
        "adapter_host_memory": _optional_bytes(adapter_host_memory),
        "prefix_cache_memory": _optional_bytes(prefix_cache_memory),
        "tenant_weights": _weights("--tenant-weight", tenant_weight or []),
        "adapter_weights": _weights("--adapter-weight", adapter_weight or []),
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "chat_template": chat_template,
        "dtype": dtype,
        "device": device,
        "deterministic": deterministic,
        "enforce_eager": enforce_eager,
    }
    # The port is taken first: whether it is free should not show after a minute of loading only.
    with EarlySignals(notify) as early, bind(host, port) as bound, logged(log_level):
        code = _load_and_serve(
            model,
            adapters_of(adapter, reserved=server_config.served_model_name),
            engine_options,
            server_config,
            bound,
            early,
        )
    if code:
        raise typer.Exit(code)


def _load_and_serve(
    model: str,
    adapters: Mapping[str, Path],
    engine_options: dict[str, Any],
    config: ServerConfig,
    bound: socket.socket,
    early: EarlySignals,
) -> int:
    with for_good():
        from neuroada_serve.benchmark.report import progress_bar
        from neuroada_serve.engine.llm import LLM
        from neuroada_serve.server.serve import serve as run_server

        with progress_bar(err) as progress:
            llm = LLM(
                model,
                adapters,
                adapter_dir=config.adapter_dir,
                preload=config.preload,
                notify=notify,
                on_progress=_shown_in(progress),
                **engine_options,
            )

    def on_ready(host: str, port: int) -> None:
        names = llm.adapters
        listed = ", ".join(names) if len(names) <= _MOST_LISTED else f"{len(names)} in all"
        served = ", ".join(config.served_model_name) or llm.engine.base.spec.name
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        notify(f"Serving {served} on http://{where}/v1; adapters: {listed or 'none yet'}")

    code = run_server(llm.engine, config, on_ready, notify, bound=bound, early=early)
    metrics = llm.engine.metrics
    endings = ", ".join(f"{count} {reason.value}" for reason, count in metrics.num_finished.items())
    notify(f"Stopped. Answers by ending: {endings}; {metrics.num_output_tokens} tokens in all.")
    return code


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


def _shown_in(progress: "Progress") -> Callable[[str, int, int], None]:
    """Shows work on adapters as it goes on, one bar for each kind."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        step = max(1, total // 100)
        progress.update(tasks[what], completed=done, refresh=done % step == 0 or done == total)

    return show
