"""POST /v1/completions."""

from fastapi import APIRouter, Depends, Request, Response

from neuroada_serve.server.answer import CompletionAnswer, Echo
from neuroada_serve.server.body import BoundedRoute, require_json
from neuroada_serve.server.protocol import CompletionRequest
from neuroada_serve.server.state import Server
from neuroada_serve.server.streaming import reply, unless_disconnected

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/completions", dependencies=[Depends(require_json)])
async def complete(http: Request, request: CompletionRequest, server: Server) -> Response:
    """Continue one prompt, or several."""
    adapter, params = server.models.adapter_of(request.model), request.sampling_params()
    with server.worker.arrival():
        encoding = server.prompts.encode(
            request.prompts, server.caller_of(http), with_texts=bool(request.echo)
        )
        ids, texts = await unless_disconnected(http.receive, encoding)
        answer = CompletionAnswer(
            request,
            server.models.name_of(adapter),
            num_prompt_tokens=sum(map(len, ids)),
            num_choices=len(ids) * params.n,
            echoes=[Echo(*text) for text in texts for _ in range(params.n)],
        )
        stream = await server.submit(http, answer, ids, params, adapter, request.cache_salt)
    return await reply(http, stream, answer)
