"""Time limits for clients that send or read slowly, or not at all."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

_LATE_S = 1.0  # a timer that fires so late was held up, and so were the client's bytes


@dataclass(frozen=True)
class ConnectionLimits:
    """Time limits for clients, in seconds.

    header_s: from the opening, or a later request's first byte, to the end of the headers.
    keep_alive_s: from an answer to the next request's first byte. Longer than clients keep theirs
        (httpx 5 s, aiohttp 15, nginx and AWS's balancers 60), as a request is lost if its
        connection is closed while it is under way. Idle connections are evicted for new ones.
    body_s: for a body, and one more for every `body_bytes_per_s` bytes received.
    linger_s: for the rest of a body whose request has been answered.
    write_s: in all, with bytes unread by the client in a full send buffer, and one more for every
        `write_bytes_per_s` bytes that it takes, up to this again. The system's buffers hold
        megabytes, so a client that reads at that pace takes them in rare large pieces.
    """

    header_s: float = 10.0
    keep_alive_s: float = 75.0
    body_s: float = 10.0
    body_bytes_per_s: float = 8192.0
    linger_s: float = 3.0
    write_s: float = 60.0
    write_bytes_per_s: float = 1024.0  # some five streamed tokens; Kestrel asks for 240


class Awaited(Enum):
    """The part of a request that the client has to send next."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2
    LEFTOVER = 3  # the rest of a body whose request has been answered


class ReceiveTimer:
    """Limits how long a client may take to send what is awaited.

    Args:
        on_timeout: called once the time for `awaited` is over.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: ConnectionLimits,
        on_timeout: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._on_timeout = on_timeout
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.awaited = Awaited.NOTHING
        self.num_bytes = 0  # received since then

    def start(self, awaited: Awaited) -> None:
        """Give the client the time for what is awaited now."""
        self.awaited = awaited
        self.num_bytes = 0
        limits = self._limits
        timeouts_s = {Awaited.HEADERS: limits.header_s, Awaited.BODY: limits.body_s}
        self._set_deadline(timeouts_s.get(awaited, limits.linger_s))

    def stop(self) -> None:
        """Await nothing more."""
        self.awaited = Awaited.NOTHING

    def receive(self, num_bytes: int) -> None:
        """Count received bytes; those of a body extend its time."""
        self.num_bytes += num_bytes
        if self.awaited is Awaited.BODY:
            self._deadline += num_bytes / self._limits.body_bytes_per_s

    def cancel(self) -> None:
        """Never call `on_timeout` again, unless started again."""
        if self._timer is not None:
            self._timer.cancel()

    def _set_deadline(self, timeout_s: float) -> None:
        self._deadline = self._loop.time() + timeout_s
        self.cancel()
        self._timer = self._loop.call_at(self._deadline, self._check)

    def _check(self) -> None:
        if self.awaited is Awaited.NOTHING:
            return
        now = self._loop.time()
        if now < self._deadline:  # it has been extended
            self._timer = self._loop.call_at(self._deadline, self._check)
        elif now > self._deadline + _LATE_S:
            self._set_deadline(_LATE_S)
        else:
            self._on_timeout()


class SendTimer:
    """Limits how long a client may leave a full send buffer unread, over a whole connection.

    Args:
        on_timeout: called once the client has read too little. A whole answer may be megabytes at
            once, so what counts is time, not how often the buffer is full.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.WriteTransport,
        limits: ConnectionLimits,
        on_timeout: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._limits = limits
        self._on_timeout = on_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._patience_s = limits.write_s
        self._num_unread = 0  # bytes, at the last look
        self._looked_at = 0.0

    def start(self) -> None:
        """The send buffer is full."""
        self._num_unread = self._transport.get_write_buffer_size()
        self._looked_at = self._loop.time()
        self._timer = self._loop.call_later(self._patience_s, self._check)

    def stop(self) -> None:
        """The send buffer has room again."""
        if self._timer is not None:
            self.cancel()
            self._timer = None
            self._look()

    def cancel(self) -> None:
        """Never call `on_timeout` again, unless started again."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self._look()
        if self._patience_s > 0:
            self._timer = self._loop.call_later(self._patience_s, self._check)
        else:
            self._on_timeout()

    def _look(self) -> None:
        now, num_unread = self._loop.time(), self._transport.get_write_buffer_size()
        # Where the loop was held up, nothing could be written either.
        waited_s = min(now - self._looked_at, self._patience_s + _LATE_S)
        earned_s = max(0, self._num_unread - num_unread) / self._limits.write_bytes_per_s
        self._patience_s = min(self._limits.write_s, self._patience_s - waited_s + earned_s)
        self._num_unread, self._looked_at = num_unread, now
