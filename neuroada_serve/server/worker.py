"""The engine as the event loop sees it: streams of outputs, and an orderly end.

Call methods of `Worker` only on the event loop that entered it.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from neuroada_serve.errors import EngineError, NeuroAdaError, Unavailable
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import Output, SamplingParams
from neuroada_serve.server.engine_thread import Adapters, Engine, EngineThread
from neuroada_serve.server.heartbeat import Heartbeat


class Stream:
    """The outputs of one submission, as (choice, Output), in the order the engine made them.

    Choice c of prompt p is number p * n + c. Iteration ends after every choice's final output;
    it raises EngineError when the engine dies. Close a stream that is not read to its end.
    """

    def __init__(self, worker: "Worker", request_ids: Sequence[str], n: int) -> None:
        self._worker = worker
        self._first_choice = {request_id: i * n for i, request_id in enumerate(request_ids)}
        self._unfinished = {request_id: n for request_id in request_ids}
        self._arrived: asyncio.Queue[Output | NeuroAdaError] = asyncio.Queue()
        self._first: Output | NeuroAdaError | None = None
        self._num_unread_finals = n * len(request_ids)

    async def first(self) -> Output | NeuroAdaError:
        """Wait for the output, or the error, that iteration will begin with."""
        if self._first is None:
            self._first = await self._arrived.get()
        return self._first

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        while self._num_unread_finals:
            item, self._first = await self.first(), None
            if isinstance(item, NeuroAdaError):
                raise item
            self._num_unread_finals -= item.finished
            yield self._first_choice[item.request_id] + item.index, item

    def close(self) -> None:
        """Abort unfinished choices and discard their outputs. Idempotent."""
        self._worker._abort(list(self._unfinished))
        self._unfinished.clear()

    def _push(self, output: Output) -> bool:
        """Add an output; return whether it was the last one of its engine request."""
        self._arrived.put_nowait(output)
        self._unfinished[output.request_id] -= output.finished
        if self._unfinished[output.request_id]:
            return False
        del self._unfinished[output.request_id]
        return True

    def _fail(self, error: NeuroAdaError) -> None:
        self._unfinished.clear()
        self._arrived.put_nowait(error)


class Worker:
    """Runs an engine in a thread while entered: `async with Worker(engine) as worker`.

    Args:
        max_waiting: once this many choices wait for a place in the batch, requests of callers
            that have their share of the queue are refused; at twice as many, all are.
        on_death: called once on the event loop if the engine dies, after its requests have failed.
        step_timeout_s: while a step takes longer, requests are refused.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 256,
        on_death: Callable[[], None] = lambda: None,
        step_timeout_s: float = math.inf,
    ) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._on_death = on_death
        loop = asyncio.get_running_loop()
        heartbeat = Heartbeat(step_timeout_s)
        self._thread = EngineThread(engine, loop, self._deliver, self._die, heartbeat)
        self._streams: dict[str, Stream] = {}  # by engine request id
        self._arriving: set[asyncio.Task[Any]] = set()  # of requests that come before `submit`
        self._draining = False
        self._is_drained = False

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the thread after its current step; unfinished requests fail."""
        await self._thread.stop()
        self._fail_all(Unavailable("the server is shutting down"))

    # --- what the server asks ----------------------------------------------------------------

    @property
    def base(self) -> BaseModel:
        return self._engine.base

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def adapters(self) -> Adapters:
        return self._engine.adapters

    @property
    def dead(self) -> bool:
        return self._thread.dead

    @property
    def hangs(self) -> bool:
        """True while a step takes too long."""
        return self._thread.heartbeat.hangs_s is not None

    @property
    def ready(self) -> bool:
        """True while requests are accepted, unless the queue is full."""
        return self._thread.takes_commands and not self._draining and not self.hangs

    @property
    def idle(self) -> bool:
        return not (self._streams or self._arriving)

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """Count a request as running before `submit`, so that a drain waits for it, and cancels
        its task when time is up.

        Raises:
            Unavailable: not `ready`, or the drain's time is up.
        """
        self.require_ready()
        task = asyncio.current_task()
        assert task is not None
        self._arriving.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_drained:
                raise
            task.uncancel()
            raise Unavailable("the server is shutting down") from None
        finally:
            self._arriving.discard(task)

    async def submit(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None,
        tenant: str = "",
        cache_salt: str = "",
        client: str = "",
    ) -> Stream:
        """Hand prompts to the engine, all or none, and return once it has accepted them.

        Raises:
            Unavailable: not `ready`, unless only a drain began after this request's `arrival`; or
                the queue is full.
            RequestError, AdapterNotFoundError: from the engine.
        """
        if not self._thread.takes_commands or asyncio.current_task() not in self._arriving:
            self.require_ready()
        self._engine.adapters.prefetch(adapter)  # while the engine finishes its step
        request_ids = [f"{request_id}-{i}" for i in range(len(prompts))]
        stream = Stream(self, request_ids, params.n)

        def add() -> None:
            if not self._engine.make_place(tenant, adapter, self._max_waiting, client):
                raise Unavailable(f"{self._max_waiting} requests or more wait; try again later")
            self._engine.add_requests(
                request_ids, prompts, params, adapter, tenant, cache_salt, client
            )

        # Registered first: an output may come before the reply is looked at.
        self._streams.update(dict.fromkeys(request_ids, stream))
        try:
            await self._thread.call(add)
        except BaseException:  # cancellation too
            stream.close()
            raise
        return stream

    async def drain(self, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests; let running ones finish for `timeout_s`, then abort them.

        Args:
            hurry: polled meanwhile; True aborts them at once.
        """
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while not self.idle and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.02)
        self._is_drained = True
        for request_id in list(self._streams):
            self._thread.abort(request_id)
        for task in list(self._arriving):
            task.cancel()

    def require_ready(self) -> None:
        """Refuse everything once the engine has failed or the server is shutting down, and while
        a step hangs.

        Raises:
            Unavailable
        """
        hangs_s = self._thread.heartbeat.hangs_s
        if self.dead:
            reason = "its engine failed"
        elif self._draining or not self._thread.takes_commands:
            reason = "it is shutting down"
        elif hangs_s is not None:
            reason = f"a step of its engine has taken {hangs_s:.0f} s so far"
        else:
            return
        raise Unavailable(f"the server takes no requests: {reason}")

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._thread.abort(request_id)

    # --- what the engine's thread hands over, on the event loop ---------------------------------

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None and stream._push(output):
                del self._streams[output.request_id]

    def _die(self) -> None:
        self._fail_all(EngineError("the engine failed"))
        self._on_death()

    def _fail_all(self, error: NeuroAdaError) -> None:
        for stream in set(self._streams.values()):
            stream._fail(error)
        self._streams.clear()
        self._thread.fail_calls(error)
