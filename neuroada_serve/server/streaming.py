"""Reply with outputs of the engine, whole or as events; stop when the client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from neuroada_serve.errors import NeuroAdaError, Unavailable
from neuroada_serve.request import FinishReason, Output
from neuroada_serve.server.answer import Answer, GenerationAnswer
from neuroada_serve.server.failure import ClientClosed, Failure
from neuroada_serve.server.worker import Stream

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which is cancelled if the client leaves first.

    Raises:
        ClientClosed: the client has left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientClosed
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def reply(http: Request, stream: Stream, answer: Answer) -> Response:
    """Reply to a request that the engine has accepted: with a JSON object, or with server-sent
    events if the client asked for them. The stream is closed in the end, whatever happens.

    Raises:
        ClientClosed: the client left before the reply began.
        Failure, Unavailable, EngineError: a choice could not be finished, and no event was sent.
    """
    if isinstance(answer, GenerationAnswer) and answer.is_streamed:
        try:
            await unless_disconnected(http.receive, _begun(stream))
        except BaseException:
            stream.close()
            raise
        return EventStream(stream, answer)
    try:
        body = await unless_disconnected(http.receive, _whole(stream, answer))
    finally:
        stream.close()
    return JSONResponse(body)


async def _begun(stream: Stream) -> None:
    """Wait for the first output: a request that fails at once gets an error's status, not a stream
    with an error in it."""
    first = await stream.first()
    if isinstance(first, NeuroAdaError):
        raise first
    _check(first)


async def _whole(stream: Stream, answer: Answer) -> dict[str, Any]:
    async for index, output in stream:
        _check(output)
        answer.add(index, output)
    return answer.whole()


class EventStream(StreamingResponse):
    """A reply in chunks. A failure after the first becomes an error event before [DONE]."""

    def __init__(self, stream: Stream, answer: GenerationAnswer) -> None:
        super().__init__(
            _events(stream, answer),
            headers={"Cache-Control": "no-cache"},
            media_type="text/event-stream",
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not StreamingResponse's own way: it may notice a lost client only when it next sends.
        try:
            with suppress(ClientClosed):
                await unless_disconnected(receive, self.stream_response(send))
        finally:
            self._stream.close()


async def _events(stream: Stream, answer: GenerationAnswer) -> AsyncIterator[bytes]:
    try:
        async for index, output in stream:
            _check(output)
            for chunk in answer.chunks(index, output):
                yield _event(_to_json(chunk))
        if answer.include_usage:
            yield _event(_to_json(answer.usage_chunk()))
    except Exception as error:
        if not isinstance(error, Failure | NeuroAdaError):
            logger.exception("a stream failed")
        yield _event(Failure.of(error).body())
    yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _to_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _check(output: Output) -> None:
    """Raise if the engine could not finish a choice."""
    if output.may_retry:
        raise Unavailable(output.error)
    if output.finish_reason is FinishReason.ERROR:
        raise Failure(500, output.error or "the engine could not finish this request")
    if output.finish_reason is FinishReason.ABORT:  # not by the client, which is still there
        raise Unavailable(
            "the request was ended: its adapter is unloaded, or the server is shutting down"
        )
