"""GET /health and GET /version."""

from fastapi import APIRouter, Response

from neuroada_serve import __version__
from neuroada_serve.server.body import BoundedRoute
from neuroada_serve.server.state import Server

router = APIRouter(route_class=BoundedRoute)


@router.get("/health")
async def health(server: Server) -> Response:
    """Return 200 while requests are accepted, else 503; no body."""
    return Response(status_code=200 if server.worker.ready else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of this package."""
    return {"version": __version__}
