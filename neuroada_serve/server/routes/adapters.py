"""Routes about adapters: list them; and, where the server allows it, load, unload and pin them, set
the merge mode, and scan the adapter directory again. Loading and unloading are vLLM's routes.

Changes wait for files and for running requests, so each runs in a thread, and none waits for
another of a different name.
"""

import logging
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse

from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterNotFoundError,
)
from neuroada_serve.server.body import BoundedRoute, require_json
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.protocol import (
    LoadAdapterRequest,
    MergeRequest,
    UnloadAdapterRequest,
)
from neuroada_serve.server.request_log import client_of
from neuroada_serve.server.rescans import summary
from neuroada_serve.server.state import Server, ServerState
from neuroada_serve.server.turns import in_daemon_thread

logger = logging.getLogger(__name__)

router = APIRouter(route_class=BoundedRoute)


# --- what a change needs ---------------------------------------------------------------------


async def require_permission(server: Server) -> None:
    """Refuse changes that --allow-runtime-adapters does not allow, or that come too late."""
    if not server.config.allow_runtime_adapters:
        raise Failure(
            403,
            "Adapters can be changed over HTTP only where the server was started with "
            "--allow-runtime-adapters.",
        )
    server.worker.require_ready()


async def require_directory(server: Server) -> Path:
    """Return the directory to load from, or refuse where the server has none."""
    if server.config.adapter_dir is None:
        raise Failure(403, "The server was started without --adapter-dir to load from.")
    return server.config.adapter_dir


PERMISSION = [Depends(require_permission), Depends(require_json)]
AdapterDir = Annotated[Path, Depends(require_directory)]


# --- reading ---------------------------------------------------------------------------------


@router.get("/v1/adapters")
async def list_adapters(server: Server) -> dict[str, Any]:
    """List every adapter with its version, state and place, the memory they use, and the KV
    cache."""
    adapters, metrics = server.adapters, server.worker.metrics
    found = await anyio.to_thread.run_sync(lambda: list(map(asdict, adapters.describe())))
    return {
        "object": "list",
        "data": found,
        "merge_mode": adapters.merging.mode,
        "merged": adapters.merging.merged,
        "memory": adapters.memory(),
        "kv_cache": {
            **asdict(metrics.kv),
            "free": metrics.kv.free,
            "preemptions": metrics.num_preemptions,
        },
    }


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, server: Server) -> dict[str, Any]:
    return asdict(server.adapters.describe_one(name))


# --- changes ---------------------------------------------------------------------------------


@router.post("/v1/load_lora_adapter", dependencies=PERMISSION, response_class=PlainTextResponse)
async def load(
    http: Request, request: LoadAdapterRequest, server: Server, directory: AdapterDir
) -> str:
    """Serve an adapter from a folder under --adapter-dir."""
    before = _digest_of(server, request.lora_name)
    async with server.loading:
        await in_daemon_thread(partial(_load, server, request, directory), "load")
    if (digest := _digest_of(server, request.lora_name)) != before:
        what = "loaded" if before is None else f"replaced (digest {before[:12]} before)"
        _log(http, request.lora_name, f"{what} from {request.lora_path[:256]!r}", digest)
    return f"Success: LoRA adapter '{request.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", dependencies=PERMISSION, response_class=PlainTextResponse)
async def unload(http: Request, request: UnloadAdapterRequest, server: Server) -> str:
    """Stop serving an adapter and free what it holds, once its requests have finished."""
    name, digest = request.lora_name, _digest_of(server, request.lora_name)
    unload = partial(server.adapters.unload, name, request.patience_s, request.abort)
    try:
        async with server.unloading:
            await in_daemon_thread(unload, "unload")
    except AdapterNotFoundError:
        raise Failure(404, f"No adapter named {name[:256]!r} is loaded.", "lora_name") from None
    _log(http, name, "unloaded", digest)
    return f"Success: LoRA adapter '{name}' removed successfully."


@router.post("/v1/adapters/rescan", dependencies=PERMISSION)
async def rescan(http: Request, server: Server, directory: AdapterDir) -> dict[str, Any]:
    """Rescan --adapter-dir: serve new folders, replace changed ones, unload removed ones."""
    result = await server.rescans.join()
    logger.info("adapter directory rescanned by %s: %s", client_of(http.scope), summary(result))
    found = asdict(result)
    # Clients do not learn where the directory is on this machine.
    inside = f"{directory}{os.sep}"
    failed = {name: why.replace(inside, "") for name, why in found["failed"].items()}
    return found | {"failed": failed}


@router.post("/v1/adapters/merge", dependencies=PERMISSION)
async def merge(http: Request, request: MergeRequest, server: Server) -> dict[str, Any]:
    """Set the merge mode. The weights follow between two steps."""
    server.adapters.merging.set_mode(request.mode)
    logger.info("merge mode %r set by %s", request.mode[:256], client_of(http.scope))
    merging = server.adapters.merging
    return {"merge_mode": merging.mode, "merged": merging.merged}


@router.post("/v1/adapters/{name}/pin", dependencies=PERMISSION)
async def pin(http: Request, name: str, server: Server) -> dict[str, Any]:
    """Keep an adapter on the device, whatever else needs room."""
    server.adapters.pin(name)
    _log(http, name, "pinned", _digest_of(server, name))
    return asdict(server.adapters.describe_one(name))


@router.post("/v1/adapters/{name}/unpin", dependencies=PERMISSION)
async def unpin(http: Request, name: str, server: Server) -> dict[str, Any]:
    """Allow an adapter to be evicted from the device again."""
    server.adapters.pin(name, False)
    _log(http, name, "unpinned", _digest_of(server, name))
    return asdict(server.adapters.describe_one(name))


def _load(server: ServerState, request: LoadAdapterRequest, directory: Path) -> None:
    """Load from `lora_path`; failures quote the path as it was sent, never as it is here."""
    name, lora_path = request.lora_name, request.lora_path
    outside = Failure(400, "lora_path must lead to a folder under --adapter-dir", "lora_path")
    try:
        path = (directory / lora_path).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        raise outside from None
    if not path.is_relative_to(directory.resolve()):
        raise outside
    try:
        server.adapters.load(name, path, directory, request.load_inplace)
        server.adapters.prefetch(name)
    except AdapterConflictError as error:
        if request.load_inplace or server.models.is_reserved(name):
            raise
        raise Failure(409, f"{error}; load_inplace=true replaces it", "lora_name") from None
    except AdapterNotFoundError:
        raise Failure(
            404,
            f"No adapter at lora_path {lora_path[:256]!r}: it must be a folder that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}.",
            "lora_path",
        ) from None
    except OSError:
        raise Failure(400, "the files at lora_path cannot be read", "lora_path") from None


def _digest_of(server: ServerState, name: str) -> str | None:
    try:
        return server.adapters.describe_one(name).digest
    except AdapterError:
        return None


def _log(http: Request, name: str, what: str, digest: str | None) -> None:
    by, short = client_of(http.scope), (digest or "unknown")[:12]
    logger.info("adapter %r %s by %s, digest %s", name[:256], what, by, short)
