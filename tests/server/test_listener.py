"""More connections than there is room for, and no descriptors left."""

import logging
import resource
import socket
import time
from contextlib import ExitStack

import httpx
import pytest

from neuroada_serve.errors import UsageError
from neuroada_serve.server import listener
from neuroada_serve.server.listener import bind, most_connections
from tests.support.fake_engine import FakeEngine
from tests.support.serving import serve_while, wait_for

pytestmark = pytest.mark.timeout(300)


def address_of(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


def has_gone(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return not connection.recv(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_taken_port_is_found_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}.*--port"):
            bind("127.0.0.1", port)


def test_bound_port_refuses_until_it_is_served() -> None:
    with bind("localhost", 0) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname()[:2], timeout=1)


def test_unknown_host_is_named() -> None:
    with pytest.raises(UsageError, match=r"203\.0\.113\.7:80"):
        bind("203.0.113.7", 80)


def test_silent_connections_make_way_for_a_good_client() -> None:
    def visit(url: str) -> None:
        with ExitStack() as stack:
            silent = [
                stack.enter_context(socket.create_connection(address_of(url), timeout=120))
                for _ in range(30)
            ]
            for connection in silent[::2]:
                connection.sendall(b"GET /health HTTP/1.1\r\nHo")
            assert httpx.get(f"{url}/health", timeout=120).status_code == 200
            gone = [connection for connection in silent if has_gone(connection)]
            assert gone[0] is silent[0]  # it has waited longest
            assert 20 <= len(gone) <= 22

    assert serve_while(FakeEngine(), visit, max_connections=10) == 0


def test_connection_beyond_those_that_are_served_is_503() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        body = {"prompt": "hi", "ignore_eos": True, "max_tokens": 5000, "stream": True}
        with ExitStack() as stack:
            for _ in range(2):
                client = stack.enter_context(httpx.Client(timeout=120))
                stack.enter_context(client.stream("POST", f"{url}/v1/completions", json=body))
            reply = httpx.get(f"{url}/health", timeout=120)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.json()["error"]["type"] == "ServiceUnavailableError"
        wait_for(lambda: not engine.num_running)
        assert httpx.get(f"{url}/health", timeout=120).status_code == 200

    assert serve_while(engine, visit, max_connections=2) == 0


def test_whoever_is_refused_reads_why_though_it_asks_only_then() -> None:
    def visit(url: str) -> None:
        body = {"prompt": "hi", "ignore_eos": True, "max_tokens": 5000, "stream": True}
        with (
            httpx.Client() as busy,
            busy.stream("POST", f"{url}/v1/completions", json=body),
            socket.create_connection(address_of(url), timeout=5) as refused,
        ):
            time.sleep(0.1)
            for part in (b"GET /health HTTP/1.1\r\n", b"Host: localhost\r\n", b"\r\n"):
                refused.sendall(part)  # a reset would come after the first
                time.sleep(0.05)
            assert refused.recv(100).startswith(b"HTTP/1.1 503")

    assert serve_while(FakeEngine(), visit, max_connections=1) == 0


def test_stop_does_not_wait_for_whoever_is_refused() -> None:
    silent = socket.socket()

    def visit(url: str) -> None:
        body = {"prompt": "hi", "ignore_eos": True, "max_tokens": 5000, "stream": True}
        with httpx.Client() as busy, busy.stream("POST", f"{url}/v1/completions", json=body):
            silent.connect(address_of(url))
            wait_for(lambda: silent.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 503")

    assert serve_while(FakeEngine(), visit, max_connections=1) == 0
    silent.close()


def test_without_descriptors_it_says_so_once_and_recovers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "_ACCEPT_RETRY_S", 0.05)
    monkeypatch.setattr(listener, "most_connections", lambda asked: 1000)

    def visit(url: str) -> None:
        # The client's own sockets are of this process too: they are opened first.
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(40)]
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (clients[-1].fileno() + 5, hard))
            try:
                for client in clients:
                    client.settimeout(120)
                    client.connect(address_of(url))
                wait_for(lambda: "cannot accept a connection" in caplog.text)
                clients[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert clients[-1].recv(100).startswith(b"HTTP/1.1 200")  # others made way
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with caplog.at_level(logging.WARNING):
        assert serve_while(FakeEngine(), visit) == 0
    assert caplog.text.count("cannot accept a connection: Too many open files") < 100
    assert "Traceback" not in caplog.text


def test_connections_are_as_many_as_there_are_descriptors_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [1024, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.__setitem__(0, new[0]))
    assert most_connections(None) == 1024 - 128
    assert most_connections(100) == 100
    with pytest.raises(UsageError, match="ulimit -n"):
        most_connections(1000)
    limits[:] = 1024, 4096  # it may have more, and takes them
    assert most_connections(None) == 4096 - 128
    assert limits[0] == 4096


def test_server_that_can_accept_no_connection_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object) -> bool:
        raise KeyError("of the listener")

    def visit(url: str) -> None:
        assert httpx.get(f"{url}/health").status_code == 200
        monkeypatch.setattr(listener.Listener, "_is_full", property(fail))
        with socket.create_connection(address_of(url)):
            wait_for(lambda: "the accepting of connections failed" in caplog.text)

    assert serve_while(FakeEngine(), visit) == 70
