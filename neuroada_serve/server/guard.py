"""What stands before the application; pure ASGI, as framework middleware hides disconnects."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2 << 20


class BodyLimit:
    """Refuses a request body above `max_bytes` with 413, as soon as it shows."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_bytes = max_bytes

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
            num_received += len(message.get("body", b""))
            if max(num_declared, num_received) > self.max_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_bytes} bytes")
            return message

        await self.app(scope, receive_within_limit, send)
