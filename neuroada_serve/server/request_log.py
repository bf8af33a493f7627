"""The request log, one line per request, without prompts and answers."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_UNLOGGED = ("/health",)


class RequestLog:
    """Log every request; pure ASGI. Includes the summary of `request.state.answer`, if a handler
    has set it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNLOGGED:
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        state: dict[str, Any] = scope.setdefault("state", {})

        async def noted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted_send)
        finally:
            answer = state.get("answer")
            logger.info(
                "%s %s %s %s %.3f s%s",
                client_of(scope),
                scope["method"],
                scope["path"][:256],
                status or "without an answer",
                time.monotonic() - started,
                "" if answer is None else f" {answer.summary}",
            )


def client_of(scope: Scope) -> str:
    """Return address and port of the client."""
    host, port = scope.get("client") or ("unknown", 0)
    return f"{host}:{port}"
