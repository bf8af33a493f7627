"""The state that all routes share, and the dependency that hands it to a handler."""

from dataclasses import dataclass, field
from typing import Annotated, cast

from anyio import CapacityLimiter
from fastapi import Depends, Request

from neuroada_serve.config import ServerConfig
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.answer import Answer
from neuroada_serve.server.caller import Caller, caller_of
from neuroada_serve.server.engine_thread import Adapters
from neuroada_serve.server.models import Models
from neuroada_serve.server.prompts import Prompts
from neuroada_serve.server.rescans import Rescans
from neuroada_serve.server.worker import Stream, Worker


@dataclass(frozen=True)
class ServerState:
    """One application's shared objects, kept in `app.state.server`.

    parsing, loading, unloading: how many large bodies are parsed, adapters loaded and adapters
        unloaded at a time, each in a thread of its own. Unloading waits for requests to finish.
    """

    worker: Worker
    config: ServerConfig
    models: Models
    prompts: Prompts
    rescans: Rescans
    parsing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    loading: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    unloading: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(64))

    @property
    def adapters(self) -> Adapters:
        return self.worker.adapters

    def caller_of(self, http: Request) -> Caller:
        """The tenant and the client that sent a request."""
        return caller_of(http, self.config)

    async def submit(
        self,
        http: Request,
        answer: Answer,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: str | None,
        cache_salt: str | None,
    ) -> Stream:
        """Hand token ids to the engine and return the stream of their outputs; see `Worker.submit`.

        The request log reports `answer`.
        """
        tenant, client = self.caller_of(http)
        http.state.answer = answer
        return await self.worker.submit(
            answer.id, prompts, params, adapter, tenant, cache_salt or "", client
        )


async def state_of(http: Request) -> ServerState:
    """The state of the application that received a request."""
    return cast(ServerState, http.app.state.server)


Server = Annotated[ServerState, Depends(state_of)]
