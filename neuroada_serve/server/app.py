"""The HTTP endpoint: OpenAI's routes, and vLLM's for loading adapters.

What can take long stays off the event loop: tokenizing and reading files go to threads, the engine
has its own.
"""

import time
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from neuroada_serve import __version__
from neuroada_serve.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Adapter
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import AdapterNotFoundError, NeuroAdaError, RequestError
from neuroada_serve.model.prompt import encode_chat, encode_text
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.answer import Answer, ChatAnswer, CompletionAnswer, Echo
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.guard import BodyLimit
from neuroada_serve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from neuroada_serve.server.streaming import EventStream, collect, unless_disconnected
from neuroada_serve.server.worker import Worker

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


def create_app(worker: Worker, config: ServerConfig) -> FastAPI:
    """The ASGI application over a worker that is entered before the first request comes."""
    app = FastAPI(
        title="NeuroAda Serve",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={
            "4XX": {"description": "The request is at fault."},
            "5XX": {"description": "The server failed, or takes no requests now."},
        },
    )
    app.add_middleware(BodyLimit)
    for kind in (Exception, HTTPException, RequestValidationError, NeuroAdaError, Failure):
        app.add_exception_handler(kind, _reply_failure)
    _add_status(app, worker)
    _add_models(app, worker)
    _add_generation(app, worker)
    _add_adapters(app, worker, config)
    return app


async def _reply_failure(request: Request, error: Exception) -> Response:
    return Failure.of(error).response()


async def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(400, f"Content-Type must be application/json, not {kind[:80]!r}")


def _add_status(app: FastAPI, worker: Worker) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503; no body."""
        return Response(status_code=200 if worker.ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


# --- models ----------------------------------------------------------------------------------


def _add_models(app: FastAPI, worker: Worker) -> None:
    base_name = worker.base.spec.name
    base_created = int(time.time())

    def card(name: str, created: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "neuroada-serve",
            "root": name,
            "parent": None if name == base_name else base_name,
            "max_model_len": worker.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The base model, and every adapter that can be requested now."""
        names = {base_name: base_created} | dict(worker.adapters)
        return {"object": "list", "data": [card(*item) for item in names.items()]}

    @app.get("/v1/models/{model:path}")  # a base's name may hold a slash
    async def get_model(model: str) -> dict[str, Any]:
        adapter = _adapter_of(model, worker)
        if adapter is None:
            return card(base_name, base_created)
        return card(adapter, worker.adapters[adapter])


def _adapter_of(model: str | None, worker: Worker) -> str | None:
    """The adapter that `model` names; None, and only None or the base's own name, is the base."""
    if model is None or model == worker.base.spec.name:
        return None
    if model not in worker.adapters:
        raise Failure(404, f"The model {model[:256]!r} does not exist.", "model")
    return model


# --- generation ------------------------------------------------------------------------------


def _add_generation(app: FastAPI, worker: Worker) -> None:
    base = worker.base
    # One at a time: a fast tokenizer may refuse a second thread ("Already borrowed").
    tokenizing = anyio.CapacityLimiter(1)

    @app.post("/v1/completions", dependencies=[Depends(_require_json)])
    async def complete(http: Request, request: CompletionRequest) -> Response:
        """Continue one prompt, or several."""
        adapter, params = _adapter_of(request.model, worker), request.sampling_params()
        given = request.prompts

        def decode(ids: list[int]) -> str:
            try:
                return str(base.tokenizer.decode(ids))
            except (OverflowError, TypeError, ValueError, IndexError):
                raise RequestError("prompt has ids that are no tokens", "prompt") from None

        def encode() -> tuple[list[list[int]], list[Echo]]:
            prompts = [encode_text(base, p) if isinstance(p, str) else p for p in given]
            if not request.echo:
                return prompts, []
            echoes = [
                Echo(p if isinstance(p, str) else decode(p), decode(ids[:1]))
                for p, ids in zip(given, prompts, strict=True)
            ]
            return prompts, [echo for echo in echoes for _ in range(params.n)]

        prompts, echoes = await anyio.to_thread.run_sync(encode, limiter=tokenizing)
        answer = CompletionAnswer(
            request,
            adapter or base.spec.name,
            num_prompt_tokens=sum(map(len, prompts)),
            num_choices=len(prompts) * params.n,
            echoes=echoes,
        )
        return await reply(http, request, answer, prompts, params, adapter)

    @app.post("/v1/chat/completions", dependencies=[Depends(_require_json)])
    async def chat(http: Request, request: ChatCompletionRequest) -> Response:
        """Answer a conversation."""
        adapter, params = _adapter_of(request.model, worker), request.sampling_params()
        messages = [message.for_template for message in request.messages]
        prompt = await anyio.to_thread.run_sync(encode_chat, base, messages, limiter=tokenizing)
        answer = ChatAnswer(request, adapter or base.spec.name, len(prompt), params.n)
        return await reply(http, request, answer, [prompt], params, adapter)

    async def reply(
        http: Request,
        request: GenerationRequest,
        answer: Answer,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: str | None,
    ) -> Response:
        stream = await worker.submit(answer.id, prompts, params, adapter)
        if request.stream:
            return EventStream(stream, answer, request.include_usage)
        try:
            body = await unless_disconnected(http.receive, collect(stream, answer))
        finally:
            stream.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST) if body is None else JSONResponse(body)


# --- adapters --------------------------------------------------------------------------------


def _add_adapters(app: FastAPI, worker: Worker, config: ServerConfig) -> None:
    root = config.adapter_dir
    reading = anyio.CapacityLimiter(4)

    async def require_permission() -> None:
        if not config.allow_runtime_adapters or root is None:
            raise Failure(
                403,
                "Adapters can be loaded and unloaded over HTTP only where the server was started "
                "with --allow-runtime-adapters and --adapter-dir.",
            )

    permission = [Depends(require_permission), Depends(_require_json)]

    @app.post("/v1/load_lora_adapter", dependencies=permission, response_class=PlainTextResponse)
    async def load(request: LoadAdapterRequest) -> str:
        """Serve an adapter from a folder under --adapter-dir."""
        name = request.lora_name
        if name in worker.adapters and not request.load_inplace:
            raise Failure(
                400,
                f"An adapter named {name!r} is already loaded; load_inplace=true replaces it.",
                "lora_name",
            )
        assert root is not None
        adapter = await anyio.to_thread.run_sync(
            _read_adapter, worker, root, request.lora_path, limiter=reading
        )
        await worker.add_adapter(name, adapter, request.load_inplace)
        return f"Success: LoRA adapter '{name}' added successfully."

    @app.post("/v1/unload_lora_adapter", dependencies=permission, response_class=PlainTextResponse)
    async def unload(request: UnloadAdapterRequest) -> str:
        """Stop serving an adapter; its running requests finish."""
        name = request.lora_name
        if name not in worker.adapters:
            raise Failure(404, f"No adapter named {name[:256]!r} is loaded.", "lora_name")
        await worker.remove_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."


def _read_adapter(worker: Worker, root: Path, lora_path: str) -> Adapter:
    """The adapter at `lora_path`; failures quote the path as it was sent, never as it is here."""
    outside = Failure(400, "lora_path must lead to a folder under --adapter-dir", "lora_path")
    try:
        path = (root / lora_path).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        raise outside from None
    if not path.is_relative_to(root.resolve()):
        raise outside
    try:
        return worker.read_adapter(path, root)
    except AdapterNotFoundError:
        raise Failure(
            404,
            f"No adapter at lora_path {lora_path[:256]!r}: it must be a folder that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}.",
            "lora_path",
        ) from None
    except OSError:
        raise Failure(400, "the files at lora_path cannot be read", "lora_path") from None
