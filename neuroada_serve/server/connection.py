"""One connection: uvicorn's HTTP/1.1, with time limits for whoever sends slowly or not at all."""

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from neuroada_serve.server.failure import Failure

_CLOSE_TIMEOUT_S = 2.0  # for the last bytes to a client that may not read them
_LATE_S = 1.0  # a timer that fires so late has been held up, and so have the bytes
# Parsed at once: h11 takes some 20 us for a chunk, which may have one byte.
_SLICE_BYTES = 4096
_PLAIN_SLICE_BYTES = 65536
_PARSING_S = 0.0005  # of large bodies, before others have the interpreter
_OTHERS_SHARE = 9.0  # how much longer they have it, the engine's thread above all


@dataclass(frozen=True)
class ConnectionLimits:
    """How long a client may take; seconds.

    header_s: from the opening, or a later request's first byte, to the end of the headers.
    keep_alive_s: from an answer to the next request's first byte.
    body_s: for a body, and one more for every `body_bytes_per_s` bytes received.
    linger_s: for a body that nobody wants any more, as it has been answered.
    write_s: for a client that reads nothing of what fills its connection.
    """

    header_s: float = 10.0
    keep_alive_s: float = 5.0
    body_s: float = 10.0
    body_bytes_per_s: float = 8192.0
    linger_s: float = 3.0
    write_s: float = 60.0


class _Waiting(Enum):
    """What the server waits for the client to send."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2
    LEFTOVER = 3  # the rest of a body whose request has been answered


class Slices:
    """Parses what came in large pieces: a little of all connections' at a time, in turn, for a part
    of the time only. An event loop that is never idle takes the interpreter from the engine, whose
    steps then take three times as long.
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
    """
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
        self._limits = limits
        self._slices = slices
        self._all_waiting = waiting
        self._waits_for = _Waiting.NOTHING
        self._num_bytes = 0  # since it waits
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unparsed: deque[memoryview] = deque()

    def evict(self) -> None:
        """Close it for others' sake."""
        self.transport.abort()

    # --- what asyncio tells ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all_waiting[self] = None
        self._wait_for(_Waiting.HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all_waiting.pop(self, None)
        self._unparsed.clear()
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._waits_for is _Waiting.NOTHING and self.conn.their_state is h11.IDLE:
            self._wait_for(_Waiting.HEADERS)  # of a later request
        self._num_bytes += len(data)
        if self._waits_for is _Waiting.BODY:
            self._deadline += len(data) / self._limits.body_bytes_per_s
        if not self._unparsed and len(data) <= _SLICE_BYTES:
            self._parse(data)
            return
        is_plain = self._waits_for is _Waiting.BODY and not self._is_chunked
        step, view = _PLAIN_SLICE_BYTES if is_plain else _SLICE_BYTES, memoryview(data)
        is_queued = bool(self._unparsed)
        self._unparsed.extend(view[i : i + step] for i in range(0, len(data), step))
        if not is_queued:
            self.transport.pause_reading()
            self._slices.add(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_s, self._look_at_reader, left)

    def _look_at_reader(self, left_before: int) -> None:
        """Whoever has read none of what waited goes. A whole answer may be megabytes at once."""
        if self.transport.get_write_buffer_size() < left_before:
            self._wait_for_reader()
        else:
            self.evict()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # --- parsing --------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()

    def parse_slice(self) -> bool:
        """Whether there are more."""
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
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Find what is waited for now."""
        if self.transport.is_closing():
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

    @property
    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def _unsupported_upgrade_warning(self) -> None:
        """Said of every request of a client that offers HTTP/2: it is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(Failure(400, msg))

    # --- time limits ----------------------------------------------------------------------------

    def _wait_for(self, what: _Waiting) -> None:
        self._waits_for = what
        self._num_bytes = 0
        limits = self._limits
        timeouts_s = {_Waiting.HEADERS: limits.header_s, _Waiting.BODY: limits.body_s}
        self._set_deadline(timeouts_s.get(what, limits.linger_s))

    def _set_deadline(self, timeout_s: float) -> None:
        self._deadline = self.loop.time() + timeout_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        if self._waits_for is _Waiting.NOTHING or self.transport.is_closing():
            return
        now = self.loop.time()
        if now < self._deadline:  # it has been moved
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
        elif now > self._deadline + _LATE_S:
            self._set_deadline(_LATE_S)
        elif self._waits_for is _Waiting.LEFTOVER or (
            self._waits_for is _Waiting.HEADERS and not self._num_bytes
        ):
            self._close()
        else:
            what = self._waits_for.name.lower()
            self._refuse(Failure(408, f"the request's {what} took too long to arrive"))

    def _refuse(self, failure: Failure) -> None:
        """Answer what is no whole request, past the application, and close."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = failure.body()
            head = f"HTTP/1.1 {failure.status} {STATUS_PHRASES[failure.status].decode()}"
            lines = head, "content-type: application/json", f"content-length: {len(body)}"
            self.transport.write("\r\n".join((*lines, "connection: close", "", "")).encode() + body)
        if cycle is not None:
            cycle.disconnected = True
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self.loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)
