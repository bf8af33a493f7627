"""The HTTP endpoint: OpenAI's routes; those about adapters are in admin.py.

What can take long stays off the event loop: large bodies and tokenizing go to threads, the engine
has its own.
"""

import socket

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from neuroada_serve import __version__
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import NeuroAdaError
from neuroada_serve.request import CLASSIFY, SamplingParams
from neuroada_serve.server.admin import add_admin, require_json
from neuroada_serve.server.answer import (
    Answer,
    ChatAnswer,
    ClassifyAnswer,
    CompletionAnswer,
    Echo,
)
from neuroada_serve.server.body import CLIENT_CLOSED, CLIENT_CLOSED_REQUEST, BoundedRoute
from neuroada_serve.server.caller import caller_of
from neuroada_serve.server.failure import Failure
from neuroada_serve.server.guard import BodyLimit, BrowserGuard, is_loopback
from neuroada_serve.server.models import Models, add_models
from neuroada_serve.server.prompts import Prompts
from neuroada_serve.server.protocol import (
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    GenerationRequest,
)
from neuroada_serve.server.request_log import RequestLog
from neuroada_serve.server.rescans import Rescans
from neuroada_serve.server.streaming import EventStream, begun, collect, unless_disconnected
from neuroada_serve.server.target import RequestTarget
from neuroada_serve.server.worker import Stream, Worker


def create_app(worker: Worker, config: ServerConfig, rescans: Rescans | None = None) -> FastAPI:
    """The ASGI application over a worker that is entered before the first request comes.

    Args:
        rescans: shared with whoever else has the adapter directory looked at again.
    """
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
    app.router.route_class = BoundedRoute
    app.state.parsing = anyio.CapacityLimiter(1)
    app.add_middleware(BodyLimit)
    app.add_middleware(BrowserGuard, allowed_hosts=_hosts(config))
    app.add_middleware(RequestTarget)
    if config.enable_log_requests:
        app.add_middleware(RequestLog)
    for kind in (Exception, HTTPException, RequestValidationError, NeuroAdaError, Failure):
        app.add_exception_handler(kind, _reply_failure)
    _add_status(app, worker)
    models = Models(worker, config)
    add_models(app, worker, models)
    prompts = Prompts(worker.base, worker.max_model_len)
    _add_generation(app, worker, config, models, prompts)
    _add_classification(app, worker, config, models, prompts)
    add_admin(app, worker, config, rescans or Rescans(worker.adapters))
    return app


def _hosts(config: ServerConfig) -> list[str]:
    """Names that clients may use for this server."""
    own = [] if is_loopback(config.host) else [config.host, socket.gethostname()]
    return [*config.allowed_hosts, *own]


def _client_closed() -> Response:
    """To a client that may still read, see connection.py."""
    return Failure(CLIENT_CLOSED_REQUEST, CLIENT_CLOSED).response()


async def _reply_failure(request: Request, error: Exception) -> Response:
    return Failure.of(error).response()


def _add_status(app: FastAPI, worker: Worker) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503; no body."""
        return Response(status_code=200 if worker.ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


# --- generation ------------------------------------------------------------------------------


def _add_generation(
    app: FastAPI,
    worker: Worker,
    config: ServerConfig,
    models: Models,
    prompts: Prompts,
) -> None:
    @app.post("/v1/completions", dependencies=[Depends(require_json)])
    async def complete(http: Request, request: CompletionRequest) -> Response:
        """Continue one prompt, or several."""
        adapter, params = models.adapter_of(request.model), request.sampling_params()
        with worker.arrival():
            encoding = prompts.encode(request.prompts, caller_of(http, config), bool(request.echo))
            if (encoded := await unless_disconnected(http.receive, encoding)) is None:
                return _client_closed()
            ids, texts = encoded
            answer = CompletionAnswer(
                request,
                models.shown(adapter),
                num_prompt_tokens=sum(map(len, ids)),
                num_choices=len(ids) * params.n,
                echoes=[Echo(*text) for text in texts for _ in range(params.n)],
            )
            stream = await submit(http, request, answer, ids, params, adapter)
        return await reply(http, request, answer, stream)

    @app.post("/v1/chat/completions", dependencies=[Depends(require_json)])
    async def chat(http: Request, request: ChatCompletionRequest) -> Response:
        """Answer a conversation."""
        adapter, params = models.adapter_of(request.model), request.sampling_params()
        messages = [m.model_dump(include={"role", "content"}) for m in request.messages]
        with worker.arrival():
            encoding = prompts.encode_chat(messages, caller_of(http, config))
            if (ids := await unless_disconnected(http.receive, encoding)) is None:
                return _client_closed()
            answer = ChatAnswer(request, models.shown(adapter), len(ids), params.n)
            stream = await submit(http, request, answer, [ids], params, adapter)
        return await reply(http, request, answer, stream)

    async def submit(
        http: Request,
        request: GenerationRequest,
        answer: Answer,
        ids: list[list[int]],
        params: SamplingParams,
        adapter: str | None,
    ) -> Stream:
        caller, salt = caller_of(http, config), request.cache_salt or ""
        http.state.answer = answer
        return await worker.submit(
            answer.id, ids, params, adapter, caller.tenant, salt, caller.client
        )

    async def reply(
        http: Request, request: GenerationRequest, answer: Answer, stream: Stream
    ) -> Response:
        if request.stream:
            # A request that fails at once gets an error's status, not a stream with an error in it.
            try:
                started = await unless_disconnected(http.receive, begun(stream))
            except BaseException:
                stream.close()
                raise
            if started is not None:
                return EventStream(stream, answer, request.include_usage)
            stream.close()
            return _client_closed()
        try:
            body = await unless_disconnected(http.receive, collect(stream, answer))
        finally:
            stream.close()
        return _client_closed() if body is None else JSONResponse(body)


# --- classification --------------------------------------------------------------------------


def _add_classification(
    app: FastAPI,
    worker: Worker,
    config: ServerConfig,
    models: Models,
    prompts: Prompts,
) -> None:
    @app.post("/classify", dependencies=[Depends(require_json)])  # vLLM's path
    @app.post("/v1/classify", dependencies=[Depends(require_json)])
    async def classify(http: Request, request: ClassifyRequest) -> Response:
        """The probabilities of a classifier's labels, for one text or several."""
        adapter = models.adapter_of(request.model)
        with worker.arrival():
            encoding = prompts.encode(request.inputs, caller_of(http, config))
            if (encoded := await unless_disconnected(http.receive, encoding)) is None:
                return _client_closed()
            inputs, _ = encoded
            answer = ClassifyAnswer(models.shown(adapter), sum(map(len, inputs)), len(inputs))
            caller, salt = caller_of(http, config), request.cache_salt or ""
            http.state.answer = answer
            stream = await worker.submit(
                answer.id, inputs, CLASSIFY, adapter, caller.tenant, salt, caller.client
            )
        try:
            body = await unless_disconnected(http.receive, collect(stream, answer))
        finally:
            stream.close()
        return _client_closed() if body is None else JSONResponse(body)
