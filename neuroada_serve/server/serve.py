"""Listen, serve, stop: uvicorn around one engine."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn

from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import NeuroAdaError, UsageError
from neuroada_serve.server.app import create_app
from neuroada_serve.server.worker import Engine, Worker

MAX_HEADER_BYTES = 65536
LAST_BYTES_TIMEOUT_S = 5  # for replies that are finished, or aborted, when the drain is over
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESCAN_SIGNAL = getattr(signal, "SIGHUP", None)  # Windows has none


def serve(
    engine: Engine,
    config: ServerConfig,
    on_ready: Callable[[str, int], None] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> int:
    """Serve an engine over HTTP until SIGINT or SIGTERM, or until the engine dies.

    After a signal new requests get 503 while running ones may finish for `drain_timeout_s`; a
    second signal ends them at once. SIGHUP has it look at the adapter directory again.

    Args:
        engine: not used by anyone else from here on.
        on_ready: called with address and port, once requests are heard.
        notify: told what came of SIGHUP.

    Returns:
        The process's exit code: 0 after a signal, 70 after the engine's death.

    Raises:
        UsageError: the address cannot be listened on.
    """
    listener = _listen(config.host, config.port)
    return asyncio.run(_serve(engine, config, listener, on_ready, notify))


async def _serve(
    engine: Engine,
    config: ServerConfig,
    listener: socket.socket,
    on_ready: Callable[[str, int], None] | None,
    notify: Callable[[str], None],
) -> int:
    worker = Worker(engine, config.max_waiting)
    server = _Server(worker, config, notify)
    worker.on_death = server.stop
    if on_ready is not None:
        host, port = listener.getsockname()[:2]
        server.on_ready = lambda: on_ready(host, port)
    async with worker:
        await server.serve(sockets=[listener])
    return os.EX_SOFTWARE if worker.dead else os.EX_OK


class _Server(uvicorn.Server):
    """uvicorn, with a stop that lets the engine finish while newcomers are told 503."""

    def __init__(self, worker: Worker, config: ServerConfig, notify: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(worker, config),
                http="h11",  # httptools has no limit on headers
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_BYTES_TIMEOUT_S,
            )
        )
        self._worker = worker
        self._drain_timeout_s = config.drain_timeout_s
        self._notify = notify
        self.on_ready: Callable[[], None] | None = None

    def stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_ready is not None:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The listener is still open: until the drain is over, newcomers get an answer.
        await self._worker.drain(self._drain_timeout_s, hurry=lambda: self.force_exit)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    def handle_rescan(self, sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._rescan, name="rescan", daemon=True).start()

    def _rescan(self) -> None:
        try:
            found = self._worker.adapters.rescan()
        except (NeuroAdaError, OSError) as error:  # the directory may have gone
            self._notify(f"Adapters not looked at again: {error}")
            return
        changes = ("added", found.added), ("replaced", found.replaced), ("removed", found.removed)
        said = [f"{what} {', '.join(names)}" for what, names in changes if names]
        said += [f"not served: {error}" for error in found.failed.values()]
        self._notify(f"Adapters looked at again: {'; '.join(said) or 'nothing has changed'}")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn's own raises the signal again at the end, and the exit code would be lost.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in STOP_SIGNALS}
        if RESCAN_SIGNAL is not None:
            before[RESCAN_SIGNAL] = signal.signal(RESCAN_SIGNAL, self.handle_rescan)
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
