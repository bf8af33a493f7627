"""SIGTERM while requests are on their way: none is lost, none is served that nobody waits for, and
the process ends in time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support.fake_engine import ByteTokenizer, FakeEngine
from tests.support.python import ROOT
from tests.support.serving import serve_while, wait_for

pytestmark = pytest.mark.timeout(60)

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class HeldTokenizer(ByteTokenizer):
    """Takes until `go` for texts that begin with "held"."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        if text.startswith("held"):
            self.began.set()
            self.go.wait(30)
        return super().__call__(text, add_special_tokens)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    object.__setattr__(engine.base, "tokenizer", HeldTokenizer())
    yield engine
    engine.base.tokenizer.go.set()


@contextmanager
def asked(url: str, *prompts: str, **fields: Any) -> Iterator[list[Any]]:
    """So many requests at once; the futures of their replies."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        yield [
            pool.submit(
                httpx.post, f"{url}/v1/completions", json={"prompt": p, **fields}, timeout=20
            )
            for p in prompts
        ]


def terminate(url: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)


def test_request_that_is_tokenized_when_the_stop_comes_is_answered(engine: FakeEngine) -> None:
    def visit(url: str) -> None:
        with asked(url, "held", "held too") as replies:
            assert engine.base.tokenizer.began.wait(5)
            wait_for(lambda: len(replies) == 2)
            time.sleep(0.1)  # the other one waits for its turn
            terminate(url)
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "new"}).status_code == 503
            engine.base.tokenizer.go.set()
            for reply in replies:
                assert reply.result().json()["choices"][0]["text"] == "base"

    assert serve_while(engine, visit) == 0
    assert engine.num_leases == 0


def test_text_that_takes_longer_than_the_drain_is_given_up(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def visit(url: str) -> None:
        with asked(url, "held", "held too") as replies:
            assert engine.base.tokenizer.began.wait(5)
            time.sleep(0.1)
            terminate(url)
            for reply in replies:
                assert reply.result().status_code == 503
                assert "shutting down" in reply.result().json()["error"]["message"]

    started = time.monotonic()
    assert serve_while(engine, visit, drain_timeout_s=0.5) == 0
    assert time.monotonic() - started < 8
    assert not engine.requests
    assert "Traceback" not in caplog.text


def test_client_that_leaves_while_its_text_is_tokenized_holds_up_no_stop(
    engine: FakeEngine,
) -> None:
    def visit(url: str) -> None:
        body = b'{"prompt": "held"}'
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert engine.base.tokenizer.began.wait(5)
            os.kill(os.getpid(), signal.SIGTERM)

    started = time.monotonic()
    assert serve_while(engine, visit, drain_timeout_s=20) == 0
    assert time.monotonic() - started < 10
    assert not engine.requests


def test_second_signal_ends_what_is_tokenized(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def visit(url: str) -> None:
        with asked(url, "held") as (reply,):
            assert engine.base.tokenizer.began.wait(5)
            terminate(url)
            os.kill(os.getpid(), signal.SIGTERM)
            assert reply.result().status_code == 503

    assert serve_while(engine, visit, drain_timeout_s=20) == 0
    assert "Traceback" not in caplog.text


def test_body_that_is_still_coming_is_refused_and_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.settimeout(10)
            client.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ')
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            reply = b"".join(iter(lambda: client.recv(65536), b""))
            assert reply.startswith(b"HTTP/1.1 503")
            assert b"Retry-After: 1" in reply

    started = time.monotonic()
    assert serve_while(engine, visit) == 0
    assert time.monotonic() - started < 4
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


FOR_EVER = """
import sys, time
from tests.support.fake_engine import ByteTokenizer, FakeEngine
from neuroada_serve.config import ServerConfig
from neuroada_serve.server.serve import serve

class Endless(ByteTokenizer):
    def __call__(self, text, add_special_tokens=True):
        print("tokenizing", flush=True)
        time.sleep(600)

engine = FakeEngine()
object.__setattr__(engine.base, "tokenizer", Endless())
ready = lambda host, port: print(port, flush=True)
sys.exit(serve(engine, ServerConfig(port=0, drain_timeout_s=0.2), ready))
"""


def test_process_ends_though_a_text_is_tokenized_for_ever() -> None:
    command = [sys.executable, "-c", FOR_EVER]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with asked(url, "hello") as (reply,):
            assert server.stdout.readline() == "tokenizing\n"
            server.terminate()
            try:
                _, errors = server.communicate(timeout=20)
            finally:
                server.kill()
            assert reply.result().status_code == 503
        assert server.returncode == 0
        assert "Traceback" not in errors
