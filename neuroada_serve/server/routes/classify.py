"""POST /v1/classify, also as /classify."""

from fastapi import APIRouter, Depends, Request, Response

from neuroada_serve.request import CLASSIFY
from neuroada_serve.server.answer import ClassifyAnswer
from neuroada_serve.server.body import BoundedRoute, require_json
from neuroada_serve.server.protocol import ClassifyRequest
from neuroada_serve.server.state import Server
from neuroada_serve.server.streaming import reply, unless_disconnected

router = APIRouter(route_class=BoundedRoute)


@router.post("/classify", dependencies=[Depends(require_json)])  # vLLM's path
@router.post("/v1/classify", dependencies=[Depends(require_json)])
async def classify(http: Request, request: ClassifyRequest, server: Server) -> Response:
    """Classify one text or several, with the probability of each label."""
    adapter = server.models.adapter_of(request.model)
    with server.worker.arrival():
        encoding = server.prompts.encode(request.inputs, server.caller_of(http))
        ids, _ = await unless_disconnected(http.receive, encoding)
        answer = ClassifyAnswer(server.models.name_of(adapter), sum(map(len, ids)), len(ids))
        stream = await server.submit(http, answer, ids, CLASSIFY, adapter, request.cache_salt)
    return await reply(http, stream, answer)
