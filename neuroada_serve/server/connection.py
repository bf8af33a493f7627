"""One connection: uvicorn's HTTP/1.1, with time limits and strict framing.

A client that closes its side, even if only for sending, may have left: nobody can tell before
something is written to it. So work that would last is stopped and answered with 499, as the client
may still be reading. A reply that is ready at once is sent.
"""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from neuroada_serve.server.failure import Failure
from neuroada_serve.server.timeouts import Awaited, ConnectionLimits, ReceiveTimer, SendTimer

_CLOSE_TIMEOUT_S = 2.0  # for the last bytes to a client that may not read them
# Bytes parsed at a time: h11 takes some 20 us for a chunk, which may have one byte.
_SLICE_BYTES = 4096
_PLAIN_SLICE_BYTES = 65536
_PARSING_S = 0.0005  # for large bodies, before other threads get the interpreter
_OTHERS_SHARE = 9.0  # times as long for the others, above all the engine's thread
MAX_HEADER_BYTES = 65536  # and the rest of their last piece
_TOO_LARGE = 431
_MOST_REASON_CHARS = 200


class _Parser(h11.Connection):
    """h11's parser, which keeps the fault it found, and refuses a body whose length two headers
    give: a proxy may believe the other one, and take the rest of the body for another request."""

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


class Slices:
    """Parses large pieces of data a slice at a time, all connections in turn, and only for a share
    of the time: an event loop that is never idle takes the interpreter from the engine.
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


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, with time limits and strict framing.

    Args:
        limits: time limits for the client.
        slices: shared by all connections.
        waiting: connections that have not sent a whole request, oldest first; each adds and
            removes itself.
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
        self._receiving = ReceiveTimer(self.loop, limits, self._on_receive_timeout)
        self._sending: SendTimer | None = None  # while connected
        self._has_left = False  # or closed its side
        self._is_refused = False
        self._unparsed: deque[memoryview] = deque()

    def evict(self) -> None:
        """Close the connection at once, to make room or because the client is too slow."""
        self.transport.abort()

    # --- called by asyncio ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._sending = SendTimer(self.loop, transport, self._limits, self.evict)
        self._all_waiting[self] = None
        self._receiving.start(Awaited.HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all_waiting.pop(self, None)
        self._unparsed.clear()
        self._receiving.cancel()
        if self._sending is not None:
            self._sending.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        if self._receiving.awaited is Awaited.NOTHING and self.conn.their_state is h11.IDLE:
            self._receiving.start(Awaited.HEADERS)  # of a later request
        self._receiving.receive(len(data))
        if not self._unparsed and len(data) <= _SLICE_BYTES:
            self._parse(data)
            return
        is_plain = self._receiving.awaited is Awaited.BODY and not _is_chunked(self.headers)
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
        if self._sending is not None:
            self._sending.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.stop()

    # --- the application ------------------------------------------------------------------------

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application. Once it has the body, it hears if the client closes its side."""
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

    def _parse(self, data: bytes) -> None:
        if self._is_refused:
            return
        self.conn.receive_data(data)
        self.handle_events()

    def parse_slice(self) -> bool:
        """Parse the next slice and return whether there are more."""
        if self._unparsed and not self.transport.is_closing():
            self._parse(bytes(self._unparsed.popleft()))
        if self._unparsed and not self.transport.is_closing():
            return True
        self._unparsed.clear()
        if not self.flow.read_paused:
            self.transport.resume_reading()
        return False

    def handle_events(self) -> None:
        super().handle_events()
        self._update_awaited()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_awaited()

    def _update_awaited(self) -> None:
        """Start or stop the timer for what the client has to send now."""
        if self.transport.is_closing() or self._is_refused:
            return
        receiving = self._receiving
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            awaited = Awaited.LEFTOVER if answered else Awaited.BODY
            if receiving.awaited is not awaited:
                receiving.start(awaited)
        elif self.conn.their_state is not h11.IDLE or receiving.awaited is not Awaited.HEADERS:
            receiving.stop()
        if answered or receiving.awaited is Awaited.BODY:
            self._all_waiting.setdefault(self)
        else:
            self._all_waiting.pop(self, None)
        if self._has_left and answered:  # and sent no other request before that
            self.transport.close()
        is_idle = receiving.awaited is Awaited.NOTHING and self.conn.their_state is h11.IDLE
        if is_idle and answered and self.timeout_keep_alive_task is None:
            # The rest of an answered request's body has stopped uvicorn's timer.
            handle = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handle)

    def _unsupported_upgrade_warning(self) -> None:
        """Do not log that a client offered HTTP/2; it is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        fault = self._parser.fault
        status = 400 if fault is None else fault.error_status_hint
        if status == _TOO_LARGE:
            reason = f"the request's headers are larger than {MAX_HEADER_BYTES} bytes"
            self._refuse(Failure(status, reason))
        else:
            reason = msg if fault is None else f"no HTTP request: {fault}"
            self._refuse(Failure(status, reason[:_MOST_REASON_CHARS]))

    # --- endings --------------------------------------------------------------------------------

    def _on_receive_timeout(self) -> None:
        if self.transport.is_closing():
            return
        awaited = self._receiving.awaited
        if awaited is Awaited.LEFTOVER or (
            awaited is Awaited.HEADERS and not self._receiving.num_bytes
        ):
            self._close()
        else:
            what = awaited.name.lower()
            self._refuse(Failure(408, f"the request's {what} took too long to arrive"))

    def _refuse(self, failure: Failure) -> None:
        """Answer an incomplete or invalid request without the application, and close. For a while
        what the client still sends is read and discarded, as a reset could discard the answer."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_response(failure))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self._is_refused = True
        self._receiving.stop()
        self._all_waiting.setdefault(self)
        self._unset_keepalive_if_required()
        self._unparsed.clear()
        self.flow.resume_reading()
        with suppress(OSError):  # the client has left already
            self.transport.write_eof()
        self.loop.call_later(self._limits.linger_s, self.transport.abort)

    def shutdown(self) -> None:
        if self._is_refused:
            self.evict()
        elif self._receiving.awaited is Awaited.BODY:
            self._refuse(Failure(503, "the server is shutting down", headers={"Retry-After": "1"}))
        else:
            super().shutdown()

    def _close(self) -> None:
        self.transport.close()
        self.loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)


def _is_chunked(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" for name, _ in headers)


def _response(failure: Failure) -> bytes:
    """Write a failure as an HTTP/1.1 response that ends the connection."""
    body = failure.body()
    head = f"HTTP/1.1 {failure.status} {STATUS_PHRASES[failure.status].decode()}"
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    fields |= {**failure.headers, "connection": "close"}
    lines = head, *(f"{name}: {value}" for name, value in fields.items()), "", ""
    return "\r\n".join(lines).encode() + body
