"""HTTP as it may come over a socket: old, odd, broken off, ambiguous."""

import http.client
import json
import re
import socket
import time
from collections.abc import Callable

import httpx
import openai
import pytest

from neuroada_serve.server.connection import MAX_HEADER_BYTES
from neuroada_serve.server.guard import MAX_BODY_BYTES
from neuroada_serve.server.timeouts import ConnectionLimits
from tests.support.fake_engine import FakeEngine
from tests.support.serving import serve_while, wait_for

pytestmark = pytest.mark.timeout(20)

FIELDS = b"Host: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "hi", "max_tokens": 4}'
STREAM = b'{"prompt": "hi", "stream": true}'
ENDLESS = b'{"prompt": "hi", "ignore_eos": true, "max_tokens": 5000}'
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
QUICK = ConnectionLimits(keep_alive_s=0.3, linger_s=0.3)
Ask = Callable[..., bytes]


def post(body: bytes = BODY, fields: bytes = b"", version: bytes = b"1.1") -> bytes:
    head = b"POST /v1/completions HTTP/%s\r\n%s%s" % (version, FIELDS, fields)
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def post_chunked(*chunks: bytes, fields: bytes = b"", trailers: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n%s\r\n"
    parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head % (FIELDS, fields) + parts + b"0\r\n" + trailers + b"\r\n"


def padded(size: int) -> bytes:
    return b'{"prompt": "hi"' + b" " * (size - 16) + b"}"


def statuses(reply: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", reply)]


def message(reply: bytes) -> str:
    return str(json.loads(reply.rpartition(b"\r\n\r\n")[2])["error"]["message"])


def replies(*requests: bytes, is_half: bool = False, engine: FakeEngine | None = None) -> bytes:
    """Return the answer's bytes until the server closes."""
    found: list[bytes] = []

    def visit(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.settimeout(10)
            for request in requests:
                connection.sendall(request)
            if is_half:
                connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                found.append(data)

    assert serve_while(engine or FakeEngine(), visit, limits=QUICK) == 0
    return b"".join(found)


# --- what is answered --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [b"", b"Connection: keep-alive\r\n"])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_http_1_0_gets_its_answer_up_to_the_end_of_the_connection(
    body: bytes, fields: bytes
) -> None:
    reply = replies(post(body, fields, version=b"1.0"))
    assert statuses(reply) == [200]
    assert b"transfer-encoding" not in reply.lower()
    assert reply.endswith(b"data: [DONE]\n\n" if body is STREAM else b"}")


def test_http_1_0_needs_no_host() -> None:
    assert statuses(replies(b"GET /version HTTP/1.0\r\n\r\n")) == [200]


def test_pipelined_posts_are_answered_in_order() -> None:
    prompts = (b"a", b"bb", b"ccc")
    reply = replies(b"".join(post(b'{"prompt": "%s"}' % prompt) for prompt in prompts))
    assert statuses(reply) == [200] * 3
    assert re.findall(rb'"prompt_tokens":(\d+)', reply) == [b"1", b"2", b"3"]


def test_body_is_asked_for_where_the_client_waits_for_that() -> None:
    assert statuses(replies(post(fields=b"Expect: 100-continue\r\n"))) == [100, 200]


def test_body_that_is_too_large_is_not_asked_for() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\n%sExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    assert statuses(replies(head % (FIELDS, MAX_BODY_BYTES + 1))) == [413]


@pytest.mark.parametrize("form", [post, post_chunked])
@pytest.mark.parametrize(("size", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
def test_body_may_have_exactly_the_limit(form: Ask, size: int, status: int) -> None:
    assert statuses(replies(form(padded(size)))) == [status]


def test_trailers_and_extensions_of_chunks_change_nothing() -> None:
    trailers = b"X-Checksum: 1\r\nContent-Length: 3\r\nHost: evil.example\r\n"
    request = post_chunked(BODY[:5], BODY[5:], trailers=trailers).replace(b"5\r\n", b"5;a=b\r\n", 1)
    assert statuses(replies(request + GET)) == [200, 200]


def test_lines_may_end_with_a_bare_line_feed() -> None:
    assert statuses(replies(post().replace(b"\r\n", b"\n"))) == [200]


def test_header_may_have_the_limit_and_no_more_than_a_piece_more() -> None:
    def get(size: int) -> bytes:
        start, end = b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: ", b"\r\n\r\n"
        return start + b"x" * (size - len(start) - len(end)) + end

    assert statuses(replies(get(MAX_HEADER_BYTES))) == [200]
    reply = replies(get(MAX_HEADER_BYTES + 8192))
    assert statuses(reply) == [431]
    assert message(reply) == "the request's headers are larger than 65536 bytes"


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (post_chunked(BODY, fields=b"Content-Length: 4\r\n"), 400, "both Transfer-Encoding and"),
        (post_chunked(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"), 400, "1.0 has no Transfer-Encoding"),
        (post_chunked(BODY, fields=b"Transfer-Encoding: chunked\r\n"), 501, "multiple Transfer-"),
        (post_chunked(BODY).replace(b" chunked", b" gzip, chunked"), 501, "Only Transfer-Encoding"),
        (post(fields=b"Content-Length: 4\r\n"), 400, "conflicting Content-Length"),
        (post(fields=b"Content-Length : 4\r\n"), 400, "illegal header line"),
        (post().replace(b"Length: ", b"Length: +"), 400, "bad Content-Length"),
        (post().replace(b"Length: ", b"Length: " + b"9" * 5000), 400, "bad Content-Length"),
        (post(fields=b"Host: other\r\n"), 400, "multiple Host"),
        (GET.replace(b"Host: localhost\r\n", b""), 400, "Missing mandatory Host"),
        (post_chunked(BODY).replace(b"\r\n21\r\n", b"\r\nzz\r\n"), 400, "illegal chunk header"),
        (b"\x16\x03\x01\x02\x00\x01" + b"\0" * 60, 400, "illegal request line"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ambiguous_request_is_refused_with_the_reason_and_nothing_after_it_is_heard(
    request_: bytes, status: int, said: str
) -> None:
    reply = replies(request_ + GET)
    assert statuses(reply) == [status]
    assert said in message(reply)
    assert b"connection: close" in reply


def test_same_length_given_twice_is_no_other_length() -> None:
    assert statuses(replies(post(fields=b"Content-Length: %d\r\n" % len(BODY)) + GET)) == [200, 200]


def test_refusal_arrives_though_the_client_goes_on_sending() -> None:
    """A reset for what was not read would take it away."""
    found: list[bytes] = []

    def visit(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.settimeout(5)
            connection.sendall(b"hello\r\n\r\n")
            for _ in range(5):
                time.sleep(0.02)
                connection.sendall(b"x" * 1000)
            found.append(connection.recv(65536))

    assert serve_while(FakeEngine(), visit, limits=QUICK) == 0
    assert statuses(found[0]) == [400]


# --- clients that close their side -------------------------------------------------------------


def test_what_is_there_at_once_is_answered_to_whoever_has_closed_its_side() -> None:
    assert statuses(replies(GET * 3, is_half=True)) == [200, 200, 200]
    assert statuses(replies(post(b"{}"), is_half=True)) == [400]


@pytest.mark.parametrize("body", [ENDLESS, ENDLESS[:-1] + b', "stream": true}'])
def test_nothing_runs_on_for_whoever_has_closed_its_side(body: bytes) -> None:
    engine = FakeEngine()
    reply = replies(post(body), is_half=True, engine=engine)
    assert statuses(reply) in ([499], [200])  # a stream may have begun
    if statuses(reply) == [499]:
        assert "closed its side" in message(reply)
    assert not engine.present
    assert all(sequence.num_sent < 5000 for sequence in engine.requests)


def test_stream_ends_when_its_reader_closes_its_side() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.settimeout(5)
            connection.sendall(post(ENDLESS[:-1] + b', "stream": true}'))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        wait_for(lambda: not engine.present)

    assert serve_while(engine, visit) == 0
    assert engine.requests[0].num_sent < 5000


def test_body_that_is_broken_off_is_no_request() -> None:
    engine = FakeEngine()
    assert replies(post()[:-5], is_half=True, engine=engine) == b""
    assert not engine.requests


# --- kept connections --------------------------------------------------------------------------


def test_idle_connection_outlives_the_pools_of_clients_and_balancers() -> None:
    assert ConnectionLimits().keep_alive_s > 65


def test_connection_that_is_idle_longer_than_headers_may_take_is_used_again() -> None:
    limits = ConnectionLimits(header_s=0.1, body_s=0.1, linger_s=0.1, keep_alive_s=5)

    def visit(url: str) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.connect()
        connection.auto_open = 0
        for body in (None, BODY, iter([BODY]), None):  # the third in chunks
            method, path = ("GET", "/version") if body is None else ("POST", "/v1/completions")
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert (reply.status, bool(reply.read())) == (200, True)
            time.sleep(0.3)
        connection.close()

    assert serve_while(FakeEngine(), visit, limits=limits) == 0


def test_openai_client_sees_no_error_where_kept_connections_are_closed_under_it() -> None:
    def visit(url: str) -> None:
        pool = httpx.Client(limits=httpx.Limits(keepalive_expiry=None))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", http_client=pool) as client:
            for pause_s in (0, 0.095, 0.098, 0.1, 0.1005, 0.102, 0.105, 0.3):
                time.sleep(pause_s)
                answer = client.completions.create(model="sql", prompt="hi")
                assert answer.choices[0].text == "sql"

    assert serve_while(FakeEngine(), visit, limits=ConnectionLimits(keep_alive_s=0.1)) == 0


def test_idle_connections_make_way() -> None:
    def visit(url: str) -> None:
        with httpx.Client() as first:
            assert first.get(f"{url}/version").status_code == 200
            with httpx.Client() as second:
                assert second.get(f"{url}/version").status_code == 200
            assert first.get(f"{url}/version").status_code == 200  # by a new connection

    assert serve_while(FakeEngine(), visit, max_connections=1) == 0
