"""Error replies, always in OpenAI's error envelope."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterInUseError,
    AdapterNotFoundError,
    RequestError,
    Unavailable,
    UsageError,
)
from neuroada_serve.server.protocol import describe_faults

logger = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    421: "MisdirectedRequestError",
    431: "RequestHeadersTooLargeError",
    499: "ClientClosedRequestError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ClientClosed(HTTPException):
    """The client has closed its side of the connection; it may still read this, see connection.py.

    An HTTPException, the only kind that FastAPI lets out of a request's `json()`.
    """

    def __init__(self) -> None:
        super().__init__(
            499,  # nginx's number
            "the client closed its side of the connection before it had its answer",
        )


@dataclass(eq=False)
class Failure(Exception):
    """An error reply. Its message is read by clients: no paths, no text of foreign exceptions."""

    status: int
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None  # OpenAI's error code where there is one, else the status

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Return the reply to an exception of any kind."""
        match error:
            case Failure():
                return error
            case RequestValidationError():
                return cls(400, *describe_faults(error.errors()))
            case HTTPException():
                return cls(error.status_code, str(error.detail), headers=error.headers or {})
            case Unavailable():
                return cls(503, str(error), headers={"Retry-After": "1"})
            case RequestError():
                return cls(400, str(error), error.param)
            case AdapterNotFoundError():
                return cls(404, str(error))
            case AdapterConflictError() | AdapterInUseError():
                return cls(409, str(error))
            case UsageError():
                return cls(400, str(error))
        return cls(500, "the server failed; its log has the cause")

    def body(self) -> bytes:
        error: dict[str, Any] = {
            "message": self.message,
            "type": _TYPES.get(self.status, "APIError"),
            "param": self.param,
            "code": self.code or self.status,
        }
        return json.dumps({"error": error}).encode()  # ASCII: it may quote surrogates

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")
