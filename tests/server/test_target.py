"""The forms that a request's target and method may have."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from neuroada_serve.server.target import RequestTarget
from tests.support.serving import serving


def seen(raw_path: bytes, method: str = "GET") -> Scope:
    """Return the scope that an application gets to see."""
    found: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope)

    scope = {
        "type": "http",
        "method": method,
        "path": raw_path.decode(),
        "raw_path": raw_path,
        "headers": [(b"host", b"localhost"), (b"accept", b"*/*")],
    }
    nothing: Any = None
    asyncio.run(RequestTarget(app)(scope, nothing, nothing))
    return found[0]


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"/v1/models", "/v1/models", b"localhost"),
        (b"http://box:8000/v1/models", "/v1/models", b"box:8000"),
        (b"HTTPS://box/v1/a%2Fb%20c", "/v1/a/b c", b"box"),
        (b"http://box", "/", b"box"),
        (b"/http://box/", "/http://box/", b"localhost"),
        (b"*", "*", b"localhost"),
    ],
)
def test_host_of_an_absolute_target_is_the_host(target: bytes, path: str, host: bytes) -> None:
    scope = seen(target)
    assert scope["path"] == path
    assert [value for name, value in scope["headers"] if name == b"host"] == [host]
    assert (b"accept", b"*/*") in scope["headers"]


def test_head_is_get_and_changes_nothing_for_other_methods() -> None:
    async def run() -> None:
        async with serving() as client:
            get, head = [await client.request(m, "/v1/models") for m in ("GET", "HEAD")]
            assert (head.status_code, dict(head.headers)) == (200, dict(get.headers))
            assert (await client.head("/v1/completions")).status_code == 405
            assert (await client.head("/nowhere")).status_code == 404

    asyncio.run(run())


def test_strange_host_in_an_absolute_target_is_refused_whatever_the_host_field_says() -> None:
    async def run() -> None:
        async with serving() as client:
            transport = client._transport
            for target, status in (
                ("http://evil.example/health", 421),
                ("http://[::1]/health", 200),
            ):
                found: list[int] = []
                scope = {
                    "type": "http",
                    "method": "GET",
                    "path": target,
                    "raw_path": target.encode(),
                    "query_string": b"",
                    "headers": [(b"host", b"localhost")],
                }

                async def send(message: Any, found: list[int] = found) -> None:
                    found.append(message.get("status"))

                async def receive() -> Any:
                    return {"type": "http.request", "body": b"", "more_body": False}

                await transport.app(scope, receive, send)
                assert found[0] == status

    asyncio.run(run())
