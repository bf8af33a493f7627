"""One connection: uvicorn's HTTP/1.1, with time limits for whoever sends or reads slowly, or not at
all.

A client that closes its side, even if only for sending, has left as far as anyone can tell before
something is written to it: work that would last is ended, and it is told so (499), as it may still
be reading. What is there at once it gets.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from neuroada_serve.server.failure import Failure

_CLOSE_TIMEOUT_S = 2.0  # for the last bytes to a client that may not read them
_LATE_S = 1.0  # a timer that fires so late has been held up, and so have the bytes
# Parsed at once: h11 takes some 20 us for a chunk, which may have one byte.
_SLICE_BYTES = 4096
_PLAIN_SLICE_BYTES = 65536
_PARSING_S = 0.0005  # of large bodies, before others have the interpreter
_OTHERS_SHARE = 9.0  # how much longer they have it, the engine's thread above all
MAX_HEADER_BYTES = 65536  # and what comes with their last piece
_TOO_LARGE = 431
_MOST_REASON_CHARS = 200


@dataclass(frozen=True)
class ConnectionLimits:
    """How long a client may take; seconds.

    header_s: from the opening, or a later request's first byte, to the end of the headers.
    keep_alive_s: from an answer to the next request's first byte. Longer than clients keep theirs
        (httpx 5 s, aiohttp 15, nginx and AWS's balancers 60): a request that is on its way when its
        connection is closed is lost. Idle connections make way where others want their places.
    body_s: for a body, and one more for every `body_bytes_per_s` bytes received.
    linger_s: for a body that nobody wants any more, as it has been answered.
    write_s: that a client may leave what fills its connection unread, in all, with one more for
        every `write_bytes_per_s` bytes that it takes, up to this again. The system's buffers hold
        megabytes, so that whoever reads at that pace is seen to take them in rare large pieces.
    """

    header_s: float = 10.0
    keep_alive_s: float = 75.0
    body_s: float = 10.0
    body_bytes_per_s: float = 8192.0
    linger_s: float = 3.0
    write_s: float = 60.0
    write_bytes_per_s: float = 1024.0  # some five streamed tokens; Kestrel asks for 240


class _Waiting(Enum):
    """What the server waits for the client to send."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2
    LEFTOVER = 3  # the rest of a body whose request has been answered


class _Parser(h11.Connection):
    """h11's, which keeps what was wrong, and refuses bodies whose length two headers tell: proxies
    may go by the other one, and take the rest of the body for a request of its own."""

    fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_framing(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event


def _check_framing(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length are given")
    if b"transfer-encoding" in names and request.http_version < b"1.1":
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")


def _response(failure: Failure) -> bytes:
    """Return the whole HTTP response of a failure, after which the connection is closed."""
    body = failure.body()
    head = f"HTTP/1.1 {failure.status} {STATUS_PHRASES[failure.status].decode()}"
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    fields |= {**failure.headers, "connection": "close"}
    lines = head, *(f"{name}: {value}" for name, value in fields.items()), "", ""
    return "\r\n".join(lines).encode() + body


class Slices:
    """Parses what came in large pieces: a little of all connections' at a time, in turn, for a part
    of the time only. An event loop that is never idle takes the interpreter from the engine.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Connection] = deque()
        self._is_due = False
        self._next_turn = 0.0

    def add(self, connection: "Connection") -> None:
        self._waiting.append(connection)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._is_due:
            self._is_due = True
            self._loop.call_at(self._next_turn, self._parse)

    def _parse(self) -> None:
        self._is_due = False
        started = now = self._loop.time()
        try:
            while self._waiting and now < started + _PARSING_S:
                connection = self._waiting.popleft()
                if connection.parse_slice():
                    self._waiting.append(connection)
                now = self._loop.time()
        finally:
            self._next_turn = now + _OTHERS_SHARE * (now - started)
            self._schedule()


class _Deadline:
    """A time limit that may be moved; `on_expired` is called once it has passed.

    A timer that fires late has been held up by the event loop, and so have the client's bytes: it
    gets one more second.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[], None]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def set(self, timeout_s: float) -> None:
        self.cancel()
        self._at = self._loop.time() + timeout_s
        self._timer = self._loop.call_at(self._at, self._check)

    def extend(self, time_s: float) -> None:
        self._at += time_s

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if now < self._at:
            self._timer = self._loop.call_at(self._at, self._check)
        elif now > self._at + _LATE_S:
            self.set(_LATE_S)
        else:
            self._on_expired()


class _Reader:
    """The client as a reader: it must take what it is sent at some pace, or it is cut off.

    A whole answer may be megabytes at once, so pace is measured over all that it leaves unread.
    """

    def __init__(self, limits: ConnectionLimits, transport: asyncio.Transport) -> None:
        self._limits = limits
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._patience_s = limits.write_s
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes, when last looked at
        self._looked_at = 0.0

    def watch(self) -> None:
        """Begin to measure: the connection is full."""
        self._unread, self._looked_at = self._transport.get_write_buffer_size(), self._loop.time()
        self._timer = self._loop.call_later(self._patience_s, self._check)

    def unwatch(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._measure()

    def _check(self) -> None:
        self._measure()
        if self._patience_s > 0:
            self._timer = self._loop.call_later(self._patience_s, self._check)
        else:
            self._transport.abort()

    def _measure(self) -> None:
        now, left = self._loop.time(), self._transport.get_write_buffer_size()
        # While the loop was held up, nothing could be written either.
        waited = min(now - self._looked_at, self._patience_s + _LATE_S)
        earned = max(0, self._unread - left) / self._limits.write_bytes_per_s
        self._patience_s = min(self._limits.write_s, self._patience_s - waited + earned)
        self._unread, self._looked_at = left, now


class Connection(H11Protocol):
    """One client's HTTP/1.1 connection.

    Args:
        limits: how long the client may take.
        slices: shared by all.
        waiting: connections that have sent no whole request, longest first; it keeps its own place
            there.
    """

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        slices: Slices,
        waiting: dict[Any, None],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.conn = self._parser = _Parser(
            h11.SERVER, self.config.h11_max_incomplete_event_size or 65536
        )
        self._app, self.app = self.app, self._run_app
        self._limits = limits
        self._slices = slices
        self._all_waiting = waiting
        self._waits_for = _Waiting.NOTHING
        self._num_bytes = 0  # since it waits
        self._deadline = _Deadline(self.loop, self._on_late)
        self._has_left = False  # or closed its side
        self._is_refused = False
        self._reader: _Reader | None = None
        self._unparsed: deque[memoryview] = deque()

    def evict(self) -> None:
        """Close it for others' sake."""
        self.transport.abort()

    # --- what asyncio tells ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reader = _Reader(self._limits, transport)
        self._all_waiting[self] = None
        self._wait_for(_Waiting.HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all_waiting.pop(self, None)
        self._unparsed.clear()
        self._deadline.cancel()
        if self._reader is not None:
            self._reader.unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        if self._waits_for is _Waiting.NOTHING and self.conn.their_state is h11.IDLE:
            self._wait_for(_Waiting.HEADERS)  # of a later request
        self._num_bytes += len(data)
        if self._waits_for is _Waiting.BODY:
            self._deadline.extend(len(data) / self._limits.body_bytes_per_s)
        if not self._unparsed and len(data) <= _SLICE_BYTES:
            self.conn.receive_data(data)
            self.handle_events()
            return
        is_plain = self._waits_for is _Waiting.BODY and all(
            name != b"transfer-encoding" for name, _ in self.headers
        )
        step, view = _PLAIN_SLICE_BYTES if is_plain else _SLICE_BYTES, memoryview(data)
        is_queued = bool(self._unparsed)
        self._unparsed.extend(view[i : i + step] for i in range(0, len(data), step))
        if not is_queued:
            self.transport.pause_reading()
            self._slices.add(self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection open for writing."""
        cycle = self.cycle
        if self._is_refused or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        self._has_left = True
        cycle.message_event.set()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        assert self._reader is not None
        self._reader.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        assert self._reader is not None
        self._reader.unwatch()

    # --- the application ------------------------------------------------------------------------

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application. Once it has the body it hears of a client that has closed its side."""
        cycle, has_body = self.cycle, False

        async def receive_until_left() -> Message:
            nonlocal has_body
            message = None if has_body and self._has_left else await receive()
            if message is None or (has_body and self._has_left):
                return {"type": "http.disconnect"}
            has_body = has_body or not message.get("more_body", False)
            return message

        await self._app(scope, receive_until_left, send)
        if self._has_left and not cycle.response_complete:  # a stream, cut off
            cycle.disconnected = True
            self._close()

    # --- parsing --------------------------------------------------------------------------------

    def parse_slice(self) -> bool:
        """Parse one piece; return whether there are more."""
        if self._unparsed and not self.transport.is_closing():
            self.conn.receive_data(bytes(self._unparsed.popleft()))
            self.handle_events()
        if self._unparsed and not self.transport.is_closing():
            return True
        self._unparsed.clear()
        if not self.flow.read_paused:
            self.transport.resume_reading()
        return False

    def handle_events(self) -> None:
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Update what the server waits for."""
        if self.transport.is_closing() or self._is_refused:
            return
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            what = _Waiting.LEFTOVER if answered else _Waiting.BODY
            if self._waits_for is not what:
                self._wait_for(what)
        elif self.conn.their_state is not h11.IDLE or self._waits_for is not _Waiting.HEADERS:
            self._waits_for = _Waiting.NOTHING
        if answered or self._waits_for is _Waiting.BODY:
            self._all_waiting.setdefault(self)
        else:
            self._all_waiting.pop(self, None)
        if self._has_left and answered:  # and has sent no other request before that
            self.transport.close()
        is_idle = self._waits_for is _Waiting.NOTHING and self.conn.their_state is h11.IDLE
        if is_idle and answered and self.timeout_keep_alive_task is None:
            # The rest of an answered request's body has stopped uvicorn's timer.
            handle = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handle)

    def _unsupported_upgrade_warning(self) -> None:
        """Said of every request of a client that offers HTTP/2: it is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        fault = self._parser.fault
        status = 400 if fault is None else fault.error_status_hint
        if status == _TOO_LARGE:
            reason = f"the request's headers are larger than {MAX_HEADER_BYTES} bytes"
            self._refuse(Failure(status, reason))
        else:
            reason = msg if fault is None else f"no HTTP request: {fault}"
            self._refuse(Failure(status, reason[:_MOST_REASON_CHARS]))

    # --- time limits ----------------------------------------------------------------------------

    def _wait_for(self, what: _Waiting) -> None:
        self._waits_for = what
        self._num_bytes = 0
        limits = self._limits
        timeouts_s = {_Waiting.HEADERS: limits.header_s, _Waiting.BODY: limits.body_s}
        self._deadline.set(timeouts_s.get(what, limits.linger_s))

    def _on_late(self) -> None:
        """Close the connection, or refuse a request that has begun."""
        if self._waits_for is _Waiting.NOTHING or self.transport.is_closing():
            return
        has_begun = self._num_bytes > 0 or self._waits_for is _Waiting.BODY
        if self._waits_for is _Waiting.LEFTOVER or not has_begun:
            self._close()
        else:
            what = self._waits_for.name.lower()
            self._refuse(Failure(408, f"the request's {what} took too long to arrive"))

    def _refuse(self, failure: Failure) -> None:
        """Answer what is no whole request, past the application, and close; what is still sent is
        read and dropped for a while, as a reset could take the answer away."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_response(failure))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self._is_refused = True
        self._waits_for = _Waiting.NOTHING
        self._all_waiting.setdefault(self)
        self._unset_keepalive_if_required()
        self._unparsed.clear()
        self.flow.resume_reading()
        with suppress(OSError):  # it has gone already
            self.transport.write_eof()
        self.loop.call_later(self._limits.linger_s, self.transport.abort)

    def shutdown(self) -> None:
        if self._is_refused:
            self.evict()
        elif self._waits_for is _Waiting.BODY:
            self._refuse(Failure(503, "the server is shutting down", headers={"Retry-After": "1"}))
        else:
            super().shutdown()

    def _close(self) -> None:
        self.transport.close()
        self.loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)
