"""The one thread that owns the engine, and its bridge to the event loop.

    event loop --- commands (add, abort) ---> engine thread: commands, step, commands, step, ...;
    event loop <-- replies, then one batch of outputs a step ---                asleep when idle

The engine is touched by its thread alone, but for `adapters`, which any thread may load, replace
and unload.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from neuroada_serve.adapters.directory import Rescan
from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.adapter_manager import AdapterInfo
from neuroada_serve.engine.faults import raise_device_fault
from neuroada_serve.errors import EngineError, NeuroAdaError
from neuroada_serve.metrics import EngineMetrics
from neuroada_serve.model.loader import BaseModel
from neuroada_serve.request import Output, SamplingParams
from neuroada_serve.server.heartbeat import Heartbeat
from neuroada_serve.server.tasks import heard
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
    """The engine as its thread drives it; `neuroada_serve.engine.engine.Engine` in earnest."""

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

    def make_place(
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
    def step(self, early: Callable[[list[Output]], None] | None = None) -> list[Output]: ...


@dataclass(frozen=True)
class _Command:
    """A call to make on the engine's thread. Without a reply, a failure ends the engine."""

    run: Callable[[], Any]
    reply: asyncio.Future[Any] | None = None


class EngineThread:
    """Runs an engine's steps, and commands between two of them. Methods are the event loop's.

    Args:
        deliver: gets the outputs of a step, on the event loop.
        on_death: called once on the event loop when the engine has failed, or its outputs cannot be
            delivered.
        heartbeat: entered for every step.

    dead: one of both has happened.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Sequence[Output]], None],
        on_death: Callable[[], None],
        heartbeat: Heartbeat,
    ) -> None:
        self.dead = False
        self.heartbeat = heartbeat
        self._engine = engine
        self._loop = loop
        self._deliver = deliver
        self._on_death = on_death
        self._replies: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        # The engine's `wakeup` is notified after a change of these.
        self._inbox: deque[_Command] = deque()
        self._closing = False

    @property
    def takes_commands(self) -> bool:
        return not (self.dead or self._closing)

    def start(self) -> None:
        self._thread.start()
        watch = self._loop.create_task(self.heartbeat.watch())
        self._watching = heard(watch, "the watch over hanging steps")

    async def stop(self) -> None:
        """End after the current step, or leave a long one behind."""
        self._closing = True
        self._engine.wakeup.notify()
        await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        self._watching.cancel()
        if self._thread.is_alive():
            logger.error("the engine is still in a step after %s s; left behind", JOIN_TIMEOUT_S)

    async def call(self, run: Callable[[], T]) -> T:
        """Call `run` on the engine's thread, between two steps, and return its result."""
        reply: asyncio.Future[T] = self._loop.create_future()
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)
        self._put(_Command(run, reply))
        return await reply

    def abort(self, request_id: str) -> None:
        """Have a request aborted."""
        self._put(_Command(lambda: self._engine.abort(request_id)))

    def fail_calls(self, error: NeuroAdaError) -> None:
        """End all calls that wait with an error."""
        for reply in list(self._replies):
            if not reply.done():
                reply.set_exception(error)

    def _put(self, command: _Command) -> None:
        self._inbox.append(command)
        self._engine.wakeup.notify()

    def _answer(self, replies: Sequence[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
        for reply, result, error in replies:
            if reply.done():  # its caller was cancelled
                continue
            if error is None:
                reply.set_result(result)
            else:
                reply.set_exception(error)

    def _is_first_failure(self, error: BaseException) -> bool:
        """Log what ends this, in any thread; return False if something has before."""
        if self.dead:
            return False
        cause = f"{type(error).__name__}: {error}"
        logger.critical("the engine failed and the server stops: %s", cause, exc_info=error)
        self.dead = True
        return True

    # --- the engine's thread --------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (commands := self._take()) is not None:
                with self.heartbeat:
                    self._execute(commands)
                    outputs = self._engine.step(self._hand_over)
                if outputs:
                    self._hand_over(outputs)
        except BaseException as error:
            if self._is_first_failure(error):
                self._call_soon(self._on_death)

    def _hand_over(self, outputs: list[Output]) -> None:
        self._post(self._deliver, outputs)

    def _take(self) -> list[_Command] | None:
        """Wait for work; return the commands to run before the next step, or None to stop."""
        has_work = self._inbox or not self.takes_commands or self._engine.has_unfinished
        self._engine.wakeup.wait(0 if has_work else None)
        if not self.takes_commands:
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
                raise_device_fault(error)
                if command.reply is None:
                    raise
                replies.append((command.reply, None, error))
            else:
                if command.reply is not None:
                    replies.append((command.reply, result, None))
        if replies:
            self._post(self._answer, replies)

    def _post(self, deliver: Callable[..., None], *args: Any) -> None:
        """Hand something over to the event loop. If it fails there, nobody would get an answer any
        more, so that is the end."""

        def run() -> None:
            try:
                deliver(*args)
            except Exception as error:
                if self._is_first_failure(error):
                    self._engine.wakeup.notify()
                    self._on_death()

        self._call_soon(run)

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            logger.debug("an engine output came after the event loop had closed")
