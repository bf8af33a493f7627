"""Middleware before the application; pure ASGI, as framework middleware hides disconnects."""

import ipaddress
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuroada_serve.server.failure import Failure

MAX_BODY_BYTES = 2 << 20
MAX_BODIES_BYTES = 256 << 20
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class BodyLimit:
    """Refuse a request body above `max_bytes` with 413, as soon as its size shows; and with 503
    one that would take all bodies in memory above `max_total_bytes`."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        max_total_bytes: int = MAX_BODIES_BYTES,
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self._num_free = max_total_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        num_declared = int(declared) if declared.isdigit() else 0
        num_received = 0

        async def receive_within_limit() -> Message:
            nonlocal num_received
            message: Message = {"body": b""} if num_declared > self.max_bytes else await receive()
            num_new = len(message.get("body", b""))
            num_received += num_new
            self._num_free -= num_new
            if max(num_declared, num_received) > self.max_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_bytes} bytes")
            if self._num_free < 0:
                raise HTTPException(503, "too many large requests at once", {"Retry-After": "1"})
            return message

        try:
            await self.app(scope, receive_within_limit, send)
        finally:
            self._num_free += num_received


class BrowserGuard:
    """Refuse requests that foreign web pages send through a browser on this machine.

    A page whose name was pointed at this address (DNS rebinding) sends its own name as Host, any
    other page its own Origin. An IP address as Host is accepted, as no name was rebound.

    Args:
        allowed_hosts: names to accept as Host and Origin, besides localhost; "*" accepts all.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] = ()) -> None:
        self.app = app
        self._allowed = {_name_of_allowed(host) for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = None
        if scope["type"] == "http" and "*" not in self._allowed:
            failure = self._failure(scope["method"], dict(scope["headers"]))
        if failure is None:
            await self.app(scope, receive, send)
        else:
            await failure.response()(scope, receive, send)

    def _failure(self, method: str, headers: dict[bytes, bytes]) -> Failure | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = _name_of(host)
        if not (self._is_ours(name) or _is_address(name) or not host):
            return Failure(
                421,
                f"Host {host[:256]!r} is not a name of this server; start it with --allowed-host "
                f"{name[:256] or 'NAME'}, or '*' for any",
            )
        if method in _SAFE_METHODS:  # change nothing, and other pages cannot read the reply
            return None
        origin = headers.get(b"origin")
        if origin is not None:
            page = origin.decode("latin-1")
            if "://" in page:
                found = _name_of(page.partition("://")[2])
                if self._is_ours(found) or found == name:
                    return None
            return Failure(
                403,
                f"requests of web pages from {page[:256]!r} are not allowed; start the server with "
                "--allowed-host and their name to let them",
            )
        if headers.get(b"sec-fetch-site") == b"cross-site":
            return Failure(403, "requests of other web pages are not allowed")
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        return _is_address(name) and ipaddress.ip_address(name).is_loopback


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address to listen on."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _name_of(authority: str) -> str:
    """Return the name in NAME, NAME:PORT, [ADDRESS] or [ADDRESS]:PORT."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower().rstrip(".")


def _name_of_allowed(host: str) -> str:
    """Return the name in an allowed host, which may be a name, an authority or an origin."""
    host = host.rpartition("://")[2].rstrip("/")
    return host.lower() if _is_address(host) else _name_of(host)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
