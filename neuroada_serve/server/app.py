"""The HTTP application: its routers, what stands before them, and what failures become.

What can take long stays off the event loop: large bodies and tokenizing go to threads, the engine
has its own.
"""

import socket

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from neuroada_serve import __version__
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import NeuroAdaError
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.guard import BodyLimit, BrowserGuard, is_loopback
from neuroada_serve.server.models import Models
from neuroada_serve.server.prompts import Prompts
from neuroada_serve.server.request_log import RequestLog
from neuroada_serve.server.rescans import Rescans
from neuroada_serve.server.routes import adapters, chat, classify, completions, health, models
from neuroada_serve.server.state import ServerState
from neuroada_serve.server.target import RequestTarget
from neuroada_serve.server.worker import Worker

# Every route of the server is in one of these.
ROUTERS = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    classify.router,
    adapters.router,
)


def create_app(worker: Worker, config: ServerConfig, rescans: Rescans | None = None) -> FastAPI:
    """Make the ASGI application; the caller enters `worker` before the first request comes.

    Args:
        rescans: shared with other callers that rescan the adapter directory.
    """
    app = FastAPI(
        title="NeuroAda Serve",
        version=__version__,
        docs_url=None,  # Swagger UI and ReDoc load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        responses={
            "4XX": {"description": "The request is at fault."},
            "5XX": {"description": "The server failed, or takes no requests now."},
        },
    )
    app.state.server = ServerState(
        worker,
        config,
        Models(worker, config),
        Prompts(worker.base, worker.max_model_len),
        rescans or Rescans(worker.adapters),
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(BrowserGuard, allowed_hosts=_hosts(config))
    app.add_middleware(RequestTarget)
    if config.enable_log_requests:
        app.add_middleware(RequestLog)
    for kind in (Exception, HTTPException, RequestValidationError, NeuroAdaError, Failure):
        app.add_exception_handler(kind, _reply_failure)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _hosts(config: ServerConfig) -> list[str]:
    """Names by which clients may address this server."""
    own = [] if is_loopback(config.host) else [config.host, socket.gethostname()]
    return [*config.allowed_hosts, *own]


async def _reply_failure(request: Request, error: Exception) -> Response:
    return Failure.of(error).response()
