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

T = TypeVar("T")

_MOST_SILENT = 4096  # tenants whose account is kept while they ask for nothing


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
    """One job at a time. Tenants share the thread by cost; of one tenant's jobs the cheap go first,
    but each is overtaken by no more than its own cost.

    Of the event loop. A caller that is cancelled leaves the queue; if its job runs already, it is
    told by `Job.check`.
    """

    def __init__(self, name: str) -> None:
        self._thread = _Thread(name)
        self._order = itertools.count()
        self._waiting: dict[str, list[tuple[float, int, float, asyncio.Future[None]]]] = {}
        self._spent: dict[str, float] = {}
        self._floor = 0.0  # what the tenant had spent that was served last
        self._served = 0.0
        self._is_busy = False

    async def run(self, tenant: str, cost: float, work: Callable[[Job], T]) -> T:
        """The result of `work`, when its turn has come."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        if tenant not in self._waiting:  # nobody saves up a claim by staying silent
            self._spent[tenant] = max(self._spent.get(tenant, 0.0), self._floor)
        queue = self._waiting.setdefault(tenant, [])
        heapq.heappush(queue, (self._served + cost, next(self._order), cost, turn))
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
            tenant = min(self._waiting, key=lambda name: self._spent[name])
            _, _, cost, turn = heapq.heappop(self._waiting[tenant])
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if turn.done():  # its caller has left
                continue
            self._is_busy = True
            self._floor = max(self._floor, self._spent[tenant])
            self._spent[tenant] += cost
            self._served += cost
            turn.set_result(None)
        if len(self._spent) > _MOST_SILENT:
            self._spent = {name: self._spent[name] for name in self._waiting}
