"""`neuroada demo` and `neuroada serve`."""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuroada_serve.cli.common import (
    Adapters,
    Model,
    adapters_of,
    command,
    err,
    for_good,
    notify,
    out,
)
from neuroada_serve.cli.flags import config_file
from neuroada_serve.config import EngineConfig, ServerConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    from neuroada_serve.server.signals import EarlySignals

_MOST_LISTED = 20  # adapters named when the server is ready
_LAST_S = 10.0  # for threads to end after a failure


@command
def demo() -> None:
    """Run the shipped adapters in one batch, then hot-merge one."""
    from neuroada_serve.demo import run_demo

    run_demo(out, notify)


@command
def serve(
    model: Model,
    *,
    adapter: Adapters = None,
    server: ServerConfig,
    engine: EngineConfig,
    file: Annotated[Path | None, config_file(ServerConfig)] = None,
) -> None:
    """Serve a base and its adapters over HTTP, with OpenAI's API."""
    from neuroada_serve.server.listener import bind
    from neuroada_serve.server.logs import logged
    from neuroada_serve.server.signals import EarlySignals

    # The port is bound first, so that one in use is reported before a minute of loading.
    with (
        EarlySignals(notify) as early,
        bind(server.host, server.port) as bound,
        logged(server.log_level),
    ):
        folders = adapters_of(adapter, reserved=server.served_model_name)
        code = _load_and_serve(model, folders, engine, server, bound, early)
    if code:
        raise typer.Exit(code)


def _load_and_serve(
    model: str,
    adapters: Mapping[str, Path],
    engine: EngineConfig,
    config: ServerConfig,
    bound: socket.socket,
    early: "EarlySignals",
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
                **vars(engine),
            )
            llm.engine.warm_up(partial(_shown_in(progress), "Recording decode steps"))

    notify(f"{llm.engine.kv_budget.describe(llm.engine.max_model_len)}.")

    def on_ready(host: str, port: int) -> None:
        names = llm.adapters
        listed = ", ".join(names) if len(names) <= _MOST_LISTED else f"{len(names)} in all"
        served = ", ".join(config.served_model_name) or llm.engine.base.spec.name
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        notify(f"Serving {served} on http://{where}/v1; adapters: {listed or 'none yet'}")

    code = run_server(llm.engine, config, on_ready, notify, bound=bound, early=early)
    if code:
        _end_at_latest(code)
    metrics = llm.engine.metrics
    endings = ", ".join(f"{count} {reason.value}" for reason, count in metrics.num_finished.items())
    notify(f"Stopped. Answers by ending: {endings}; {metrics.num_output_tokens} tokens in all.")
    return code


def _end_at_latest(code: int) -> None:
    """End the process with this code before long, even if a thread never comes back from a device
    that has failed."""
    timer = threading.Timer(_LAST_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _shown_in(progress: "Progress") -> Callable[[str, int, int], None]:
    """Return a function that shows the progress of work on adapters, one bar for each kind."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        step = max(1, total // 100)
        progress.update(tasks[what], completed=done, refresh=done % step == 0 or done == total)

    return show
