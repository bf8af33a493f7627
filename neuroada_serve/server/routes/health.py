"""GET /health and GET /version."""

from fastapi import APIRouter, Response

from neuroada_serve import __version__
from neuroada_serve.server.body import BoundedRoute
from neuroada_serve.server.state import Server

router = APIRouter(route_class=BoundedRoute)


@router.get("/health")
async def health(server: Server) -> Response:
    """Return 200 without a body while requests are accepted, else 503 with the reason."""
    server.worker.require_ready()
    return Response()


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of this package."""
    return {"version": __version__}
