"""Middleware that brings the target and method of a request into one form; pure ASGI."""

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)


class RequestTarget:
    """Treat a target such as http://host/v1/models, which every server must accept (RFC 9112,
    3.2.2), as /v1/models with that host; and HEAD as GET, whose body is not sent then."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if absolute := _ABSOLUTE.fullmatch(scope.get("raw_path") or b""):
                host, path = absolute.groups()
                scope = {**scope, "raw_path": path or b"/", "path": unquote(path or b"/")}
                others = [(name, value) for name, value in scope["headers"] if name != b"host"]
                scope["headers"] = [(b"host", host), *others]
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)
