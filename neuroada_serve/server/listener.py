"""The listening socket: bound before the model is loaded, listening once requests can be served,
with no more connections than there are file descriptors for."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, MutableSet
from typing import Any

from neuroada_serve.errors import UsageError
from neuroada_serve.server.tasks import heard

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_ACCEPT_RETRY_S = 0.5
_LINGER_S = 1.0  # for a refused client to read the reply
_MOST_LINGERING = 32  # refused clients at a time; they take reserved descriptors
_MOST_DEFAULT_CONNECTIONS = 8192
_MOST_DESCRIPTORS = 65536  # to which a process raises its own limit, if allowed
_RESERVED_DESCRIPTORS = 128  # for adapter files, libraries and the event loop
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s"
)
_FULL_BODY = (
    b'{"error": {"message": "too many connections; try again later", '
    b'"type": "ServiceUnavailableError", "param": null, "code": 503}}'
)


def bind(host: str, port: int) -> socket.socket:
    """Bind an address without listening yet, so that early clients are refused and do not wait.

    Raises:
        UsageError: the address is in use, or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def listen(bound: socket.socket) -> None:
    """Listen on a bound socket.

    Raises:
        UsageError: another process began to listen there in the meantime.
    """
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(
        f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
    )


def most_connections(asked: int | None) -> int:
    """Return how many connections may be open at once, after raising this process's limit on file
    descriptors as far as allowed.

    Args:
        asked: wanted number of connections; None for as many as the descriptors allow, up to 8192.

    Raises:
        UsageError: there are not enough descriptors.
    """
    if resource is None:
        return asked or _MOST_DEFAULT_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_DESCRIPTORS if hard == unlimited else min(hard, _MOST_DESCRIPTORS)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has one more limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    room = _MOST_DESCRIPTORS if soft == unlimited else soft
    room = max(room - _RESERVED_DESCRIPTORS, room // 2, 1)
    if asked is not None and asked > room:
        raise UsageError(
            f"--max-connections {asked} needs more open files than this process may have: at most "
            f"{room} connections here; raise `ulimit -n`, or ask for fewer"
        )
    return min(room, _MOST_DEFAULT_CONNECTIONS) if asked is None else asked


class Listener:
    """Accepts connections until closed.

    asyncio's own server has no limit on connections, and logs thousands of lines per second once
    descriptors run out.

    Args:
        make: returns the protocol of a new connection.
        connections: the open ones.
        waiting: those that have not sent a whole request, oldest first; the first one is evicted
            if there is no place for a new connection.
        on_failure: called if it can accept none any more.
    """

    def __init__(
        self,
        bound: socket.socket,
        make: Callable[[], asyncio.Protocol],
        connections: MutableSet[Any],
        waiting: dict[Any, None],
        max_connections: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = bound
        self._make = make
        self._connections = connections
        self._waiting = waiting
        self._max_connections = max_connections
        self._opening: set[asyncio.Task[Any]] = set()
        self._lingering: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        bound.setblocking(False)
        listen(bound)
        accepting = self._loop.create_task(self._accept())
        self._accepting = heard(accepting, "the accepting of connections", on_failure)

    async def close(self) -> None:
        ending = [self._accepting, *self._lingering]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.sleep(0)  # until the loop has released the socket

    async def _accept(self) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(self._socket)
            except OSError as error:
                logger.warning("cannot accept a connection: %s", error.strerror)
                self._evict()
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            try:
                self._take(accepted)
            except BaseException:
                accepted.close()
                raise
            await asyncio.sleep(0)  # let others run, as many may come at once

    def _take(self, accepted: socket.socket) -> None:
        """Open a connection, or refuse it where there is no place."""
        if self._is_full and not self._evict():
            self._refuse(accepted)
            return
        opening = self._loop.create_task(self._open(accepted))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has left already
            await self._loop.connect_accepted_socket(self._make, accepted)

    @property
    def _is_full(self) -> bool:
        return len(self._connections) + len(self._opening) >= self._max_connections

    def _evict(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        del self._waiting[longest]
        longest.evict()
        return True

    def _refuse(self, accepted: socket.socket) -> None:
        logger.warning("%d connections are open; a new one is refused", self._max_connections)
        if len(self._lingering) >= _MOST_LINGERING:
            accepted.close()
            return
        lingering = self._loop.create_task(self._tell_full(accepted))
        self._lingering.add(lingering)
        lingering.add_done_callback(self._lingering.discard)

    async def _tell_full(self, refused: socket.socket) -> None:
        """Reply 503 and keep reading, as a reset could discard the reply."""
        with refused, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                refused.send(_FULL % (len(_FULL_BODY), _FULL_BODY))
                refused.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(refused, 65536):
                    pass
