"""The thread that owns the engine, and its bridge to the event loop.

    event loop --- commands (add, abort) ---> engine thread: commands, step, commands, step, ...;
    event loop <-- replies, then one batch of outputs a step ---                asleep when idle

Call methods of `Worker` only on the event loop that entered it. Only its own thread touches the
engine, except for `adapters`, which any thread may load, replace and unload.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from neuroada_serve.adapters.directory import Rescan
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.adapter_manager import AdapterInfo
from neuroada_serve.errors import EngineError, NeuroAdaError, Unavailable
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import Output, SamplingParams
from neuroada_serve.wakeup import Wakeup

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOIN_TIMEOUT_S = 10.0  # a step that takes longer than this is left behind at exit


class Names(Protocol):
    """The names that requests can use; `AdapterStore` in earnest."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def reserve(self, names: Sequence[str]) -> None: ...
    def acquire(self, name: str) -> Any: ...


class Merging(Protocol):
    """The weights' content; `MergeControl` in earnest."""

    @property
    def mode(self) -> str: ...
    @property
    def merged(self) -> str | None: ...

    def set_mode(self, mode: str) -> None: ...


class Adapters(Protocol):
    """The engine's adapters, for any thread; `AdapterManager` in earnest."""

    @property
    def store(self) -> Names: ...
    @property
    def merging(self) -> Merging: ...

    def describe(self) -> list[AdapterInfo]: ...
    def describe_one(self, name: str) -> AdapterInfo: ...
    def memory(self) -> Mapping[str, Mapping[str, int]]: ...
    def prefetch(self, name: str | None) -> None: ...
    def load(self, name: str, path: Path, root: Path, replace: bool = False) -> Any: ...
    def unload(self, name: str, timeout_s: float = 0.0, abort: bool = False) -> None: ...
    def pin(self, name: str, pinned: bool = True) -> None: ...
    def rescan(self) -> Rescan: ...


class Engine(Protocol):
    """Interface to the engine; implemented by `neuroada_serve.engine.engine.Engine`."""

    @property
    def wakeup(self) -> Wakeup: ...
    @property
    def base(self) -> BaseModel: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def adapters(self) -> Adapters: ...
    @property
    def has_unfinished(self) -> bool: ...
    @property
    def metrics(self) -> EngineMetrics: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...

    def may_queue(
        self, tenant: str, adapter: str | None, max_waiting: int, client: str = ""
    ) -> bool: ...
    def add_requests(
        self,
        request_ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: str = "",
        cache_salt: str = "",
        client: str = "",
    ) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...


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
        self._worker._forget(list(self._unfinished))
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


@dataclass(frozen=True)
class _Command:
    """A call to make on the engine's thread. Without a reply, a failure ends the engine."""

    run: Callable[[], Any]
    reply: asyncio.Future[Any] | None = None


class Worker:
    """Runs an engine in a thread while entered: `async with Worker(engine) as worker`.

    Args:
        max_waiting: once this many choices wait for a place in the batch, requests of callers
            that have their share of the queue are refused; at twice as many, all are.
        on_death: called once on the event loop if the engine dies, after its requests have failed.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 256,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._on_death = on_death
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

        # Of the event loop.
        self._streams: dict[str, Stream] = {}  # by engine request id
        self._replies: set[asyncio.Future[Any]] = set()
        self._draining = False
        self._arriving: set[asyncio.Task[Any]] = set()  # of requests that come before `submit`
        self._is_drained = False

        # Shared. The engine's `wakeup` is notified after a change.
        self._inbox: deque[_Command] = deque()
        self._closing = False
        self._dead = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the thread after its current step; unfinished requests fail."""
        self._closing = True
        self._engine.wakeup.notify()
        await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the engine is still in a step after %s s; left behind", JOIN_TIMEOUT_S)
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
        return self._dead

    @property
    def ready(self) -> bool:
        """True while requests are accepted, unless the queue is full."""
        return not (self._dead or self._draining or self._closing)

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
        self._require_ready()
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
        if self._dead or self._closing or asyncio.current_task() not in self._arriving:
            self._require_ready()
        self._engine.adapters.prefetch(adapter)  # while the engine finishes its step
        request_ids = [f"{request_id}-{i}" for i in range(len(prompts))]
        stream = Stream(self, request_ids, params.n)

        def add() -> None:
            if not self._engine.may_queue(tenant, adapter, self._max_waiting, client):
                raise Unavailable(f"{self._max_waiting} requests or more wait; try again later")
            self._engine.add_requests(
                request_ids, prompts, params, adapter, tenant, cache_salt, client
            )

        # Registered first: an output may come before the reply is looked at.
        self._streams.update(dict.fromkeys(request_ids, stream))
        try:
            await self._call(add)
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
            self._send_abort(request_id)
        for task in list(self._arriving):
            task.cancel()

    def _require_ready(self) -> None:
        if not self.ready:
            reason = "its engine failed" if self._dead else "it is shutting down"
            raise Unavailable(f"the server takes no requests: {reason}")

    async def _call(self, run: Callable[[], T]) -> T:
        """Call `run` on the engine's thread, between two steps, and return its result."""
        reply: asyncio.Future[T] = self._loop.create_future()
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)
        self._put(_Command(run, reply))
        return await reply

    def _forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._send_abort(request_id)

    def _send_abort(self, request_id: str) -> None:
        self._put(_Command(lambda: self._engine.abort(request_id)))

    def _put(self, command: _Command) -> None:
        self._inbox.append(command)
        self._engine.wakeup.notify()

    # --- what the engine's thread hands over, on the event loop ---------------------------------

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None and stream._push(output):
                del self._streams[output.request_id]

    def _answer(self, replies: Sequence[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
        for reply, result, error in replies:
            if reply.done():  # its caller was cancelled
                continue
            if error is None:
                reply.set_result(result)
            else:
                reply.set_exception(error)

    def _die(self) -> None:
        self._fail_all(EngineError("the engine failed"))
        self._on_death()

    def _fail_all(self, error: NeuroAdaError) -> None:
        for stream in set(self._streams.values()):
            stream._fail(error)
        self._streams.clear()
        for reply in list(self._replies):
            if not reply.done():
                reply.set_exception(error)

    # --- the engine's thread --------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (commands := self._take()) is not None:
                self._execute(commands)
                outputs = self._engine.step()
                if outputs:
                    self._post(self._deliver, outputs)
        except BaseException:
            logger.critical("the engine failed; the server stops", exc_info=True)
            self._dead = True
            self._post(self._die)

    def _take(self) -> list[_Command] | None:
        """Wait for work; return the commands to run before the next step, or None to stop."""
        has_work = self._inbox or self._closing or self._engine.has_unfinished
        self._engine.wakeup.wait(0 if has_work else None)
        if self._closing:
            return None
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def _execute(self, commands: Sequence[_Command]) -> None:
        replies: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
        for command in commands:
            try:
                result = command.run()
            except EngineError:
                raise
            except Exception as error:
                if command.reply is None:
                    raise
                replies.append((command.reply, None, error))
            else:
                if command.reply is not None:
                    replies.append((command.reply, result, None))
        if replies:
            self._post(self._answer, replies)

    def _post(self, deliver: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(deliver, *args)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            logger.debug("an engine output came after the event loop had closed")
