"""Listen, serve and stop: uvicorn around one engine."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import NeuroAdaError
from neuroada_serve.server.app import create_app
from neuroada_serve.server.connection import Connection, Slices
from neuroada_serve.server.engine_thread import Engine
from neuroada_serve.server.guard import is_loopback
from neuroada_serve.server.listener import Listener, bind, most_connections
from neuroada_serve.server.rescans import Rescans, summary
from neuroada_serve.server.signals import RESCAN_SIGNAL, EarlySignals
from neuroada_serve.server.stats import ThroughputLog
from neuroada_serve.server.tasks import heard
from neuroada_serve.server.timeouts import ConnectionLimits
from neuroada_serve.server.worker import Worker

logger = logging.getLogger(__name__)

LAST_BYTES_TIMEOUT_S = 5  # for replies already finished or aborted at the end of the drain
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    engine: Engine,
    config: ServerConfig,
    on_ready: Callable[[str, int], None] | None = None,
    notify: Callable[[str], None] = lambda message: None,
    *,
    bound: socket.socket | None = None,
    early: EarlySignals | None = None,
    limits: ConnectionLimits | None = None,
) -> int:
    """Serve an engine over HTTP until SIGINT or SIGTERM, or until the engine dies.

    After a signal new requests get 503, while running ones may finish for `drain_timeout_s`; a
    second signal aborts them at once. SIGHUP rescans the adapter directory.

    Args:
        engine: must not be used elsewhere from here on.
        on_ready: called with address and port once the server listens.
        notify: gets warnings for the user before the server listens.
        bound: a socket bound to the address already, see `listener.bind`.
        early: signals that came before; a SIGHUP among them leads to a rescan.
        limits: time limits for clients.

    Returns:
        The process's exit code: 0 after a signal, 70 after the engine's death, or where it was
        left behind in a step that hangs.

    Raises:
        UsageError: the address cannot be listened on.
    """
    bound = bound or bind(config.host, config.port)
    early, limits = early or EarlySignals(), limits or ConnectionLimits()
    with bound:
        return asyncio.run(_serve(engine, config, bound, on_ready, notify, early, limits))


async def _serve(
    engine: Engine,
    config: ServerConfig,
    bound: socket.socket,
    on_ready: Callable[[str, int], None] | None,
    notify: Callable[[str], None],
    early: EarlySignals,
    limits: ConnectionLimits,
) -> int:
    max_connections = most_connections(config.max_connections)
    host, port = bound.getsockname()[:2]
    if not is_loopback(host):
        notify(
            f"Anyone who can reach port {port} of this machine can use this server: there is no "
            "authentication. Put a proxy in front, or leave --host at 127.0.0.1."
        )
    ready = (lambda: None) if on_ready is None else partial(on_ready, host, port)
    server = _Server(engine, config, early, limits, max_connections, ready)
    async with server.worker:
        log = heard(asyncio.create_task(ThroughputLog(engine).run()), "the throughput log")
        try:
            await server.serve(sockets=[bound])
        finally:
            log.cancel()
    failed = server.failed or server.worker.dead or server.worker.hangs
    return os.EX_SOFTWARE if failed else os.EX_OK


class _Server(uvicorn.Server):
    """uvicorn, whose shutdown lets running requests finish while new ones get 503.

    failed: it has stopped by itself, as it could not go on.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        early: EarlySignals,
        limits: ConnectionLimits,
        max_connections: int,
        on_ready: Callable[[], None],
    ) -> None:
        self.worker = Worker(engine, config.max_waiting, self.stop, config.step_timeout_s)
        rescans = Rescans(self.worker.adapters)
        super().__init__(
            uvicorn.Config(
                create_app(self.worker, config, rescans),
                http="h11",  # Connection is a subclass of its protocol
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]  # adds seconds
                timeout_graceful_shutdown=LAST_BYTES_TIMEOUT_S,
            )
        )
        self._drain_timeout_s = config.drain_timeout_s
        self._early = early
        self._limits = limits
        self._max_connections = max_connections
        self._rescans = rescans
        self._rescanning: set[asyncio.Task[None]] = set()
        self._on_ready = on_ready
        self.failed = False

    def fail(self) -> None:
        self.failed = True
        self.stop()

    def stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Replaces uvicorn's own, which lets asyncio listen.
        assert sockets is not None
        await self.lifespan.startup()
        waiting: dict[Any, None] = {}
        make = partial(
            Connection,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self._limits,
            slices=Slices(),
            waiting=waiting,
        )
        connections = self.server_state.connections
        self._listener = Listener(
            sockets[0], make, connections, waiting, self._max_connections, self.fail
        )
        self.servers = []
        self.started = True
        if self._early.hung_up:
            self._rescan()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The listener stays open, so that new requests get a reply until the drain is over.
        await self.worker.drain(self._drain_timeout_s, hurry=lambda: self.force_exit)
        await self._listener.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    def handle_rescan(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._rescan)

    def _rescan(self) -> None:
        if self._rescans.is_pending:  # it will see the change that this signal announces
            return
        rescanning = asyncio.get_running_loop().create_task(self._rescan_and_log())
        self._rescanning.add(heard(rescanning, "the rescan of SIGHUP"))
        rescanning.add_done_callback(self._rescanning.discard)

    async def _rescan_and_log(self) -> None:
        try:
            found = await self._rescans.join()
        except (NeuroAdaError, OSError) as error:  # the directory may have gone
            logger.warning("adapter directory not rescanned by SIGHUP: %s", error)
        else:
            # A signal gets no reply, so failures are reported here only.
            level = logging.WARNING if found.failed else logging.INFO
            logger.log(level, "adapter directory rescanned by SIGHUP: %s", summary(found))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn's own raises the signal again at the end, which would lose the exit code.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        before = {sig: signal.signal(sig, self.handle_exit) for sig in STOP_SIGNALS}
        if RESCAN_SIGNAL is not None:
            before[RESCAN_SIGNAL] = signal.signal(RESCAN_SIGNAL, self.handle_rescan)
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
