"""Clients that send slowly, or nothing: with limits of some tenths of a second."""

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from neuroada_serve.server.connection import Connection, Slices
from neuroada_serve.server.timeouts import ConnectionLimits
from tests.support.fake_engine import FakeEngine
from tests.support.serving import serve_while, wait_for

pytestmark = pytest.mark.timeout(300)

SHORT = ConnectionLimits(
    header_s=0.2,
    keep_alive_s=0.2,
    body_s=0.2,
    body_bytes_per_s=1e6,
    linger_s=0.2,
    write_s=0.2,
    write_bytes_per_s=2000,
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def visit_with(
    visit: Callable[[Callable[[], socket.socket], str], None],
    limits: ConnectionLimits = SHORT,
    **options,
) -> None:
    """`visit` gets what opens a connection to a server of short limits, and its URL."""

    def run(url: str) -> None:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        visit(lambda: socket.create_connection(address, timeout=120), url)

    assert serve_while(FakeEngine(), run, limits=limits, **options) == 0


def send_slowly(connection: socket.socket, data: bytes, times: int, every_s: float) -> None:
    for _ in range(times):
        connection.sendall(data)
        time.sleep(every_s)


def rest_of(connection: socket.socket) -> bytes:
    """Return the bytes that come until the server closes."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHo", b"408"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n", b"408"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"200"),  # and then nothing
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", b"200"),
    ],
)
def test_whoever_stops_sending_is_disconnected(sent: bytes, status: bytes) -> None:
    def visit(connect, url: str) -> None:
        with connect() as connection:
            connection.sendall(sent)
            assert rest_of(connection)[9:12] == status

    visit_with(visit)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ",
        HEAD + b"Content-Length: 100000\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_byte_now_and_then_does_not_keep_a_connection(head: bytes) -> None:
    def visit(connect, url: str) -> None:
        drop = b"1\r\nx\r\n" if b"chunked" in head else b"x"
        with connect() as connection:
            connection.sendall(head)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                send_slowly(connection, drop, 100, every_s=0.05)

    visit_with(visit)


def test_body_without_end_is_refused_and_not_read_for_ever() -> None:
    def visit(connect, url: str) -> None:
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with connect() as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                send_slowly(connection, chunk, 2000, every_s=0.002)

    visit_with(visit)


def test_steady_body_may_take_its_time() -> None:
    def visit(connect, url: str) -> None:
        body = b'{"prompt": "hi"' + b" " * 400_000 + b"}"
        with connect() as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 40_000):  # 0.4 s in all: the pace that is asked for
                send_slowly(connection, body[start : start + 40_000], 1, every_s=0.04)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")

    visit_with(visit)


def test_long_answer_outlasts_every_limit() -> None:
    def visit(connect, url: str) -> None:
        body = {"prompt": "hi", "ignore_eos": True, "max_tokens": 600}  # a millisecond each
        started = time.monotonic()
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code == 200
        assert time.monotonic() - started > 0.5

    visit_with(visit)


def test_stream_that_nobody_reads_is_ended() -> None:
    engine = FakeEngine(max_num_seqs=100)

    def visit(url: str) -> None:
        body = b'{"prompt": "hi", "n": 100, "ignore_eos": true, "max_tokens": 4000, "stream": true}'
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: engine.num_running == 100)
        wait_for(lambda: engine.num_running == 0)
        assert all(sequence.num_sent < 4000 for sequence in engine.requests)
        connection.close()

    assert serve_while(engine, visit, limits=SHORT) == 0


def test_chunks_of_a_byte_hold_up_nobody() -> None:
    """h11 takes some 20 us for each: 40,000 at once would be a second."""

    def visit(connect, url: str) -> None:
        with connect() as connection, httpx.Client(timeout=120) as good:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"1\r\n \r\n" * 40_000)
            slowest = 0.0
            for _ in range(20):
                started = time.monotonic()
                assert good.get(f"{url}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - started)
            assert slowest < 0.4

    visit_with(visit, limits=replace(SHORT, body_s=5))  # its bytes are sent at once


def test_pipelined_requests_are_all_answered() -> None:
    def visit(connect, url: str) -> None:
        with connect() as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
            assert rest_of(connection).count(b"HTTP/1.1 200") == 1000

    visit_with(visit)


class Pipe(asyncio.Transport):
    """A transport that only counts its unwritten bytes."""

    def __init__(self, size: int) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.left = size
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.is_aborted = True


def connected(pipe: Pipe) -> Connection:
    config = uvicorn.Config(lambda *args: None, log_config=None)
    connection = Connection(config, ServerState(), {}, limits=SHORT, slices=Slices(), waiting={})
    connection.connection_made(pipe)
    connection._receiving.cancel()
    return connection


def read_slowly(bytes_a_time: int, times: int, pauses: int = 1) -> bool:
    """Return whether a connection survives a client that reads so much ten times a second of
    each full buffer, and whose answer is then over."""

    async def run() -> bool:
        connection = connected(pipe := Pipe(10_000))
        for _ in range(pauses):
            pipe.left = 10_000
            connection.pause_writing()
            for _ in range(times):
                await asyncio.sleep(0.1)
                pipe.left -= bytes_a_time
            connection.resume_writing()
        return not pipe.is_aborted

    return asyncio.run(run())


def test_whoever_reads_slowly_but_steadily_gets_all() -> None:
    assert read_slowly(bytes_a_time=250, times=8)


def test_whoever_reads_nothing_is_disconnected() -> None:
    assert not read_slowly(bytes_a_time=0, times=4)


def test_whoever_reads_below_the_least_pace_is_disconnected() -> None:
    assert not read_slowly(bytes_a_time=20, times=5)


def test_patience_is_for_all_of_an_answer_and_not_for_each_full_buffer() -> None:
    assert read_slowly(bytes_a_time=20, times=1)
    assert not read_slowly(bytes_a_time=20, times=1, pauses=5)


def test_stream_that_is_read_byte_by_byte_is_ended() -> None:
    engine = FakeEngine(max_num_seqs=100)

    def visit(url: str) -> None:
        body = b'{"prompt": "hi", "n": 100, "ignore_eos": true, "max_tokens": 4000, "stream": true}'
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            wait_for(lambda: engine.num_running == 100)
            while engine.num_running:
                connection.recv(1)
                time.sleep(0.01)
        assert all(sequence.num_sent < 4000 for sequence in engine.requests)

    assert serve_while(engine, visit, limits=replace(SHORT, write_s=0.5)) == 0


def test_refusal_of_whoever_has_gone_is_no_failure() -> None:
    class Gone(Pipe):
        def is_closing(self) -> bool:
            return False

        def write(self, data: bytes) -> None:
            """Discard it."""

        def write_eof(self) -> None:
            raise OSError(107, "Transport endpoint is not connected")

    async def run() -> bool:
        connection = connected(pipe := Gone(0))
        connection.data_received(b"hello\r\n\r\n")
        await asyncio.sleep(2 * SHORT.linger_s)
        return pipe.is_aborted

    assert asyncio.run(run())


def test_what_is_no_http_gets_the_envelope() -> None:
    def visit(connect, url: str) -> None:
        with connect() as connection:
            connection.sendall(b"hello\r\n\r\n")
            reply = rest_of(connection)
        assert reply.startswith(b"HTTP/1.1 400")
        assert b'"type": "BadRequestError"' in reply

    visit_with(visit)


class Clock:
    """A loop whose time passes only in callbacks."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self.due.append((when, callback))


class LargeBody:
    def __init__(self, clock: Clock, slices: int) -> None:
        self.clock, self.left = clock, slices

    def parse_slice(self) -> bool:
        self.clock.now += 0.0002
        self.left -= 1
        return self.left > 0


def test_large_bodies_leave_others_most_of_the_interpreter(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    slices = Slices()
    bodies = [LargeBody(clock, 32) for _ in range(60)]
    for body in bodies:
        slices.add(body)
    while clock.due:
        ((when, parse),) = clock.due
        clock.due.clear()
        clock.now = max(clock.now, when)
        began = clock.now
        parse()
        assert clock.now - began < 0.001
    assert all(body.left == 0 for body in bodies)
    spent = 60 * 32 * 0.0002
    assert clock.now - 100 > 9 * spent
    assert clock.now - 100 < 5  # for 120 MB
