"""Parse request bodies: refuse one with too many parts before building anything from it, and parse
large ones off the event loop.

Parsing 2 MiB of {},{},... takes a tenth of a second and a hundred times its memory, and neither the
parser nor pydantic lets others run meanwhile. Long strings cost next to nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from neuroada_serve.server.failure import ClientClosed, Failure
from neuroada_serve.server.state import state_of

MAX_CONTAINERS = 8_192  # objects and lists
MAX_STRINGS = 65_536  # and names of fields
MAX_ITEMS = 262_144  # token ids, above all
_FEW_PARTS = 8_192  # below every bound: no need to count each kind
_SMALL_BYTES = 32_768  # milliseconds at worst
_NOTICING_TURNS = 3  # of the event loop, after which it knows that a client left behind its body


def parse_body(body: bytes) -> Any:
    """Return the value of a JSON body.

    Raises:
        HTTPException: 400, it is not valid JSON, or has more parts than any request needs.
    """
    if len(body) - len(body.translate(None, b'",[{')) > _FEW_PARTS:
        _check_shape(body)
    try:
        return from_json(body)
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def _check_shape(body: bytes) -> None:
    """Refuse a body with too many strings, containers or items; text in strings does not count."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    text = np.frombuffer(body, np.uint8)
    quotes = text == ord('"')
    outside = (np.cumsum(quotes, dtype=np.uint8) & 1) == 0  # a parity: it may wrap around
    for what, num, most in (
        ("strings", np.count_nonzero(quotes) // 2, MAX_STRINGS),
        ("objects and lists", _num(text, outside, "{") + _num(text, outside, "["), MAX_CONTAINERS),
        ("items", _num(text, outside, ","), MAX_ITEMS),
    ):
        if num > most:
            raise HTTPException(400, f"the body has {num} {what}, at most {most} are taken")


def _num(text: Any, outside: Any, character: str) -> int:
    return int(np.count_nonzero((text == ord(character)) & outside))


class _BoundedRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _SMALL_BYTES:
            return parse_body(body)
        # One at a time, so that the event loop runs between any two.
        server = await state_of(self)
        async with server.parsing:
            for _ in range(_NOTICING_TURNS):
                await asyncio.sleep(0)
            if await self.is_disconnected():
                raise ClientClosed
            return await anyio.to_thread.run_sync(parse_body, body)


class BoundedRoute(APIRoute):
    """FastAPI's route with `parse_body` instead of its own parser."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


async def require_json(request: Request) -> None:
    """Refuse content types that foreign web pages may send without a preflight request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(400, f"Content-Type must be application/json, not {kind[:80]!r}")
