"""GET /v1/models and GET /v1/models/{model}."""

from typing import Any

import anyio.to_thread
from fastapi import APIRouter

from neuroada_serve.server.body import BoundedRoute
from neuroada_serve.server.state import Server

router = APIRouter(route_class=BoundedRoute)


@router.get("/v1/models")
async def list_models(server: Server) -> dict[str, Any]:
    """List the base model, and every adapter that can be requested now."""
    models = server.models
    found = await anyio.to_thread.run_sync(server.adapters.describe)
    cards = [models.base_card(name) for name in models.base_names]
    cards += [models.adapter_card(a.name, a.since) for a in found if a.state == "ready"]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}")  # a base's name may hold a slash
async def get_model(model: str, server: Server) -> dict[str, Any]:
    """Describe the base model, or one adapter."""
    adapter = server.models.adapter_of(model)
    if adapter is None:
        return server.models.base_card(model)
    return server.models.adapter_card(adapter, server.adapters.describe_one(adapter).since)
