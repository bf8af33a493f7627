"""Guards before the application: sizes of bodies, and other web pages."""

from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from neuroada_serve.server.guard import BodyLimit, is_loopback
from tests.support.fake_engine import FakeEngine
from tests.support.serving import error_of, serve_while, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8000", "10.0.0.5"]
    + ["app.localhost", "localhost."],
)
async def test_own_names_and_addresses_are_hosts(host: str) -> None:
    async with serving() as client:
        assert (await client.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "test", "[x]:1"])
async def test_rebound_name_reaches_nothing(host: str) -> None:
    async with serving() as client:
        for reply in (
            await client.get("/v1/models", headers={"host": host}),
            await client.post("/v1/completions", json={"prompt": "hi"}, headers={"host": host}),
            await client.get("/nothing", headers={"host": host}),
        ):
            assert "--allowed-host" in error_of(reply, 421)["message"]
        assert client.engine.requests == []


async def test_allowed_hosts_are_allowed() -> None:
    async with serving(allowed_hosts=("Llm.example",)) as client:
        assert (await client.get("/health", headers={"host": "llm.example:80"})).status_code == 200
        assert (await client.get("/health", headers={"host": "x.example"})).status_code == 421
    async with serving(allowed_hosts=("*",)) as client:
        assert (await client.get("/health", headers={"host": "x.example"})).status_code == 200


@pytest.mark.parametrize(
    "allowed", ["ui.example:8443", "https://ui.example", "http://ui.example:80/"]
)
async def test_allowed_host_may_be_given_with_scheme_and_port(allowed: str) -> None:
    async with serving(allowed_hosts=(allowed,)) as client:
        assert (await client.get("/health", headers={"host": "ui.example"})).status_code == 200


PAGES = [
    {"origin": "https://evil.example"},
    {"origin": "http://203.0.113.7"},
    {"origin": "http://localhost.evil.example"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", PAGES)
@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/classify", {"model": "sql", "input": "hi"}),
        ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
        ("/v1/adapters/merge", {"mode": "sql"}),
    ],
)
async def test_other_pages_neither_generate_nor_change(
    headers: dict[str, str], route: str, body: dict[str, Any]
) -> None:
    async with serving(allow_runtime_adapters=True) as client:
        error_of(await client.post(route, json=body, headers=headers), 403)
        assert client.engine.requests == []
        assert client.engine.adapters.calls == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://10.0.0.5:8000", "host": "10.0.0.5:8000"},
        {"origin": "https://ui.example", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-origin"},
    ],
)
async def test_own_and_allowed_pages_may_generate(headers: dict[str, str]) -> None:
    async with serving(allowed_hosts=("ui.example",)) as client:
        reply = await client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
        assert reply.status_code == 200


@pytest.mark.parametrize(("host", "said"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_whoever_opens_the_server_to_others_is_told(host: str, said: bool) -> None:
    lines = list[str]()

    def visit(url: str) -> None:
        assert (
            httpx.get(url.replace("0.0.0.0", "127.0.0.1") + "/health", timeout=120).status_code
            == 200
        )

    assert serve_while(FakeEngine(), visit, lines.append, host=host) == 0
    assert ("no authentication" in " ".join(lines)) == said


def test_loopback_is_known() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "192.168.0.1", "example.org"]))


async def test_bodies_have_a_bound_together() -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * 80}

    async def send(message: Message) -> None:
        pass

    async def read_beside_another(scope: Scope, receive_limited: Receive, send: Send) -> None:
        await receive_limited()
        if scope["path"] == "/first":
            await limit(scope | {"path": "/second"}, receive, send)

    limit = BodyLimit(read_beside_another, max_bytes=100, max_total_bytes=150)
    scope = {"type": "http", "headers": [], "path": "/first"}
    with pytest.raises(HTTPException) as refused:
        await limit(scope, receive, send)
    assert refused.value.status_code == 503
    await limit(scope | {"path": "/second"}, receive, send)  # all has been given back
