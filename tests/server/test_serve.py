"""Draining, stopping, and a server on a real socket."""

import asyncio
import os
import signal
import socket

import httpx
import openai
import pytest

from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.server.serve import serve
from tests.support.fake_engine import BASE, FakeEngine, digest_of
from tests.support.serving import (
    ENDLESS,
    HELLO,
    Client,
    error_of,
    events,
    is_listening,
    serve_while,
    until,
    wait_for,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


# --- stopping -------------------------------------------------------------------------------------


async def test_drain_finishes_the_running_and_refuses_the_new(client: Client) -> None:
    running = asyncio.create_task(client.complete(ignore_eos=True, max_tokens=200))
    await until(lambda: client.engine.num_running)
    drain = asyncio.create_task(client.worker.drain(timeout_s=10))
    await asyncio.sleep(0)
    assert (await client.get("/health")).status_code == 503
    error_of(await client.complete(), 503)
    assert (await client.get("/v1/adapters")).status_code == 200
    assert len((await running).json()["choices"][0]["text"]) == 200
    await asyncio.wait_for(drain, 1)


async def test_drain_aborts_what_takes_too_long(client: Client) -> None:
    whole = asyncio.create_task(client.complete(**ENDLESS))
    stream = asyncio.create_task(client.complete(**ENDLESS, stream=True))
    await until(lambda: client.engine.num_running == 2)
    await client.worker.drain(timeout_s=0.05)
    error_of(await whole, 503)
    assert events(await stream)[-1]["error"]["code"] == 503


# --- a real socket --------------------------------------------------------------------------------


def test_openai_client_streams_two_adapters_at_once() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == [BASE, "pirate", "sql"]
            assert client.models.retrieve(BASE).owned_by == "neuroada-serve"
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="nobody", messages=HELLO)

            streams = {
                name: client.chat.completions.create(
                    model=name, messages=HELLO, stream=True, extra_body=ENDLESS
                )
                for name in ("sql", "pirate")
            }
            texts = dict.fromkeys(streams, "")
            for _ in range(20):  # in turn: both run at the same time
                for name, stream in streams.items():
                    chunk = next(stream)
                    assert chunk.model == name
                    texts[name] += chunk.choices[0].delta.content or ""
            assert texts == {"sql": ("sql" * 9)[:19], "pirate": ("pirate" * 9)[:19]}
            assert engine.num_running == 2
            for stream in streams.values():
                stream.close()
            wait_for(lambda: engine.num_running == 0)

            whole = client.completions.create(model="sql", prompt=["a", "b"], logprobs=1)
            assert [choice.text for choice in whole.choices] == ["sql", "sql"]
            assert whole.system_fingerprint == digest_of("sql")
            assert whole.usage.prompt_tokens_details.cached_tokens == 0

    assert serve_while(engine, visit) == 0


def test_sigterm_lets_a_running_stream_finish() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        fields = {"prompt": "hi", "ignore_eos": True, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=120) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health", timeout=120).status_code == 503)
            assert httpx.post(f"{url}/v1/completions", json=fields, timeout=120).status_code == 503
            chunks = [line for line in lines if line]
        assert len(chunks) == 300  # the first one was read before; [DONE] is the last
        assert chunks[-1] == "data: [DONE]"

    assert serve_while(engine, visit) == 0


def test_engine_death_ends_the_process_with_an_error() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        engine.dies = True
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=120).status_code
            == 500
        )
        wait_for(lambda: not is_listening(url))

    assert serve_while(engine, visit) == 70


def test_endless_headers_are_refused() -> None:
    def visit(url: str) -> None:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=120) as connection:
            start = b"GET /health HTTP/1.1\r\nHost: x\r\nx: "
            connection.sendall(start.ljust((64 << 10) + 1, b"y"))
            assert connection.recv(100).startswith(b"HTTP/1.1 431")

    assert serve_while(FakeEngine(), visit) == 0


def test_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}"):
            serve(FakeEngine(), ServerConfig(port=port))
