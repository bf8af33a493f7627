"""Routes about adapters: what there is; and, where the server allows it, vLLM's for loading and
unloading them, pins, the merge mode, and another look at the adapter directory.

Changes wait for files and for running requests, so each goes to a thread; none waits for another of
a different name.
"""

import logging
import os
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse

from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterNotFoundError,
    Unavailable,
)
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.protocol import (
    LoadAdapterRequest,
    MergeRequest,
    UnloadAdapterRequest,
)
from neuroada_serve.server.request_log import client_of
from neuroada_serve.server.rescans import Rescans, told
from neuroada_serve.server.threads import in_daemon_thread
from neuroada_serve.server.worker import Worker

logger = logging.getLogger(__name__)

_MOST_READING = 4  # threads that load
_MOST_WAITING = 64  # threads that unload, and so wait


async def require_json(request: Request) -> None:
    """Refuse what a web page of another origin could send without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(400, f"Content-Type must be application/json, not {kind[:80]!r}")


def add_admin(app: FastAPI, worker: Worker, config: ServerConfig, rescans: Rescans) -> None:
    """Add the routes to an application."""
    _add_reading(app, worker)
    _add_changes(app, worker, config, rescans)


def _add_reading(app: FastAPI, worker: Worker) -> None:
    @app.get("/v1/adapters")
    async def list_adapters() -> dict[str, Any]:
        """Every adapter with its version, state and place, and the memory they have."""
        adapters = worker.adapters
        found = await anyio.to_thread.run_sync(lambda: list(map(asdict, adapters.describe())))
        return {
            "object": "list",
            "data": found,
            "merge_mode": adapters.merge_mode,
            "merged": adapters.merged,
            "memory": adapters.memory(),
        }

    @app.get("/v1/adapters/{name}")
    async def get_adapter(name: str) -> dict[str, Any]:
        return asdict(worker.adapters.describe_one(name))


def _add_changes(app: FastAPI, worker: Worker, config: ServerConfig, rescans: Rescans) -> None:
    root = config.adapter_dir
    base_names = {worker.base.spec.name, *config.served_model_name}
    reading, waiting = anyio.CapacityLimiter(_MOST_READING), anyio.CapacityLimiter(_MOST_WAITING)

    async def require_permission() -> None:
        if not config.allow_runtime_adapters:
            raise Failure(
                403,
                "Adapters can be changed over HTTP only where the server was started with "
                "--allow-runtime-adapters.",
            )
        if not worker.ready:
            raise Unavailable("the server takes no requests: it is shutting down")

    async def require_directory() -> None:
        if root is None:
            raise Failure(403, "The server was started without --adapter-dir to load from.")

    def digest_of(name: str) -> str | None:
        try:
            return worker.adapters.describe_one(name).digest
        except AdapterError:
            return None

    def log(http: Request, name: str, what: str, digest: str | None) -> None:
        by, short = client_of(http.scope), (digest or "unknown")[:12]
        logger.info("adapter %r %s by %s, digest %s", name[:256], what, by, short)

    permission = [Depends(require_permission), Depends(require_json)]
    from_files = [*permission, Depends(require_directory)]

    @app.post("/v1/load_lora_adapter", dependencies=from_files, response_class=PlainTextResponse)
    async def load(http: Request, request: LoadAdapterRequest) -> str:
        """Serve an adapter from a folder under --adapter-dir."""
        assert root is not None
        before = digest_of(request.lora_name)
        async with reading:
            await in_daemon_thread(partial(_load, worker, root, request, base_names), "load")
        if (digest := digest_of(request.lora_name)) != before:
            what = "loaded" if before is None else f"replaced (digest {before[:12]} before)"
            log(http, request.lora_name, f"{what} from {request.lora_path[:256]!r}", digest)
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", dependencies=permission, response_class=PlainTextResponse)
    async def unload(http: Request, request: UnloadAdapterRequest) -> str:
        """Stop serving an adapter and free what it holds, once its requests have finished."""
        name, digest = request.lora_name, digest_of(request.lora_name)
        unload = partial(worker.adapters.unload, name, request.patience_s, request.abort)
        try:
            async with waiting:
                await in_daemon_thread(unload, "unload")
        except AdapterNotFoundError:
            raise Failure(404, f"No adapter named {name[:256]!r} is loaded.", "lora_name") from None
        log(http, name, "unloaded", digest)
        return f"Success: LoRA adapter '{name}' removed successfully."

    @app.post("/v1/adapters/rescan", dependencies=from_files)
    async def rescan(http: Request) -> dict[str, Any]:
        """Look at --adapter-dir again: serve new folders, replace changed ones, drop gone ones."""
        assert root is not None
        result = await rescans.join()
        logger.info("adapters looked at again by %s: %s", client_of(http.scope), told(result))
        found = asdict(result)
        # Where the directory is on this machine is none of a client's business.
        inside = f"{root}{os.sep}"
        failed = {name: why.replace(inside, "") for name, why in found["failed"].items()}
        return found | {"failed": failed}

    @app.post("/v1/adapters/merge", dependencies=permission)
    async def merge(http: Request, request: MergeRequest) -> dict[str, Any]:
        """Set the merge mode. What is merged follows between two steps."""
        worker.adapters.set_merge_mode(request.mode)
        logger.info("merge mode %r set by %s", request.mode[:256], client_of(http.scope))
        return {"merge_mode": worker.adapters.merge_mode, "merged": worker.adapters.merged}

    @app.post("/v1/adapters/{name}/pin", dependencies=permission)
    async def pin(http: Request, name: str) -> dict[str, Any]:
        """Keep an adapter on the device."""
        worker.adapters.pin(name)
        log(http, name, "pinned", digest_of(name))
        return asdict(worker.adapters.describe_one(name))

    @app.post("/v1/adapters/{name}/unpin", dependencies=permission)
    async def unpin(http: Request, name: str) -> dict[str, Any]:
        """Let an adapter leave the device like others again."""
        worker.adapters.pin(name, False)
        log(http, name, "unpinned", digest_of(name))
        return asdict(worker.adapters.describe_one(name))


def _load(
    worker: Worker, root: Path, request: LoadAdapterRequest, base_names: Collection[str]
) -> None:
    """Load from `lora_path`; failures quote the path as it was sent, never as it is here."""
    lora_path = request.lora_path
    outside = Failure(400, "lora_path must lead to a folder under --adapter-dir", "lora_path")
    try:
        path = (root / lora_path).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        raise outside from None
    if not path.is_relative_to(root.resolve()):
        raise outside
    try:
        worker.adapters.load(request.lora_name, path, root, request.load_inplace)
        worker.adapters.prefetch(request.lora_name)
    except AdapterConflictError as error:
        if request.load_inplace or request.lora_name in base_names:
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
