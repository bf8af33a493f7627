"""Work for one thread, for whoever has had least of it."""

import asyncio
import heapq
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from neuroada_serve.engine.accounts import Accounts, Party, charge
from neuroada_serve.server.caller import Caller

T = TypeVar("T")

# What it goes by among its caller's, its number, its cost, told when it comes, who pays.
_Turn = tuple[float, int, float, asyncio.Future[None], list[Party]]


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Job:
    """What runs in the thread may ask now and then whether it should go on."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """
        Raises:
            Cancelled: it should not.
        """
        if self._cancelled.is_set():
            raise Cancelled


class _Thread:
    """One that does what it is given, in order. Not an executor's: it does not keep a process alive
    whose work takes for ever."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._main, args=(self._todo,), name=name, daemon=True).start()
        weakref.finalize(self, self._todo.put, None)

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Its result, when it has one."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if found.cancelled():
                return
            if error is None:
                found.set_result(result)
            else:
                found.set_exception(error)

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, failure)

        self._todo.put(run)
        return found

    @staticmethod
    def _main(todo: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
        while (run := todo.get()) is not None:
            run()


class Turns:
    """One job at a time. Tenants share the thread by cost, and so do the clients of one; of one
    client's jobs the cheap go first, but each is overtaken by no more than its own cost.

    Of the event loop. A caller that is cancelled leaves the queue; if its job runs already, it is
    told by `Job.check`.
    """

    def __init__(self, name: str) -> None:
        self._thread = _Thread(name)
        self._order = itertools.count()
        self._accounts = Accounts({}, {})  # of those who wait
        self._waiting: dict[Caller, list[_Turn]] = {}
        self._served = 0.0
        self._is_busy = False

    async def run(self, caller: Caller, cost: float, work: Callable[[Job], T]) -> T:
        """The result of `work`, when its turn has come."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        line = self._accounts.enter(caller)
        queue = self._waiting.setdefault(caller, [])
        heapq.heappush(queue, (self._served + cost, next(self._order), cost, turn, line))
        self._take_next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back()
            raise
        job = Job()
        working = self._thread.start(lambda: work(job))
        working.add_done_callback(self._give_back)
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            job.cancel()
            raise
        return working.result()

    def _give_back(self, working: asyncio.Future[Any] | None = None) -> None:
        if working is not None and not working.cancelled():
            working.exception()  # its caller may have left, and nobody else looks
        self._is_busy = False
        self._take_next()

    def _take_next(self) -> None:
        while not self._is_busy and self._waiting:
            caller = self._next_caller()
            _, _, cost, turn, line = heapq.heappop(self._waiting[caller])
            if not self._waiting[caller]:
                del self._waiting[caller]
            if not turn.done():  # else its caller has left
                self._is_busy = True
                self._served += cost
                charge(line, cost)
                turn.set_result(None)
            self._accounts.leave(caller)

    def _next_caller(self) -> Caller:
        """Of the tenant that has had least, the client that has."""
        names, party = [], self._accounts.root
        while party.parties:
            name, party = min(party.parties.items(), key=lambda item: item[1].counter)
            names.append(name)
        return Caller(*names)
