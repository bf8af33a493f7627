"""POST /v1/chat/completions."""

from fastapi import APIRouter, Depends, Request, Response

from neuroada_serve.server.answer import ChatAnswer
from neuroada_serve.server.body import BoundedRoute, require_json
from neuroada_serve.server.protocol import ChatCompletionRequest
from neuroada_serve.server.state import Server
from neuroada_serve.server.streaming import reply, unless_disconnected

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/chat/completions", dependencies=[Depends(require_json)])
async def chat(http: Request, request: ChatCompletionRequest, server: Server) -> Response:
    """Answer a conversation."""
    adapter, params = server.models.adapter_of(request.model), request.sampling_params()
    messages = [m.model_dump(include={"role", "content"}) for m in request.messages]
    with server.worker.arrival():
        encoding = server.prompts.encode_chat(messages, server.caller_of(http))
        ids = await unless_disconnected(http.receive, encoding)
        answer = ChatAnswer(request, server.models.name_of(adapter), len(ids), params.n)
        stream = await server.submit(http, answer, [ids], params, adapter, request.cache_salt)
    return await reply(http, stream, answer)
