"""Run work off the event loop: each in a thread of its own, or in turns by fair shares."""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from neuroada_serve.engine.accounts import Accounts, Party, charge
from neuroada_serve.server.caller import Caller

T = TypeVar("T")

# Order among its caller's jobs, sequence number, cost, done when the turn comes, payers.
_Turn = tuple[float, int, float, asyncio.Future[None], list[Party]]


def in_daemon_thread(run: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Start a thread for `run` and return a future of its result, on the running event loop. The
    thread does not keep the process alive, as an executor's would."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if found.cancelled():
            return
        if error is None:
            found.set_result(result)
        else:
            found.set_exception(error)

    def main() -> None:
        result, failure = None, None
        try:
            result = run()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=main, name=name, daemon=True).start()
    return found


class Cancelled(Exception):
    """Raised in a job whose result nobody waits for any more."""


class Job:
    """Tells running work whether its result is still wanted."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Return if the result is still wanted; call this now and then.

        Raises:
            Cancelled: it is not.
        """
        if self._cancelled.is_set():
            raise Cancelled


class Turns:
    """Run one job at a time, by fair shares; use on the event loop only.

    Tenants share the time by cost, and so do the clients of a tenant. Of one client's jobs the
    cheap ones go first, but a job is overtaken by no more than its own cost. If a caller is
    cancelled, its job leaves the queue; if it is running, `Job.check` tells it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._order = itertools.count()
        self._accounts = Accounts({}, {})  # of those who wait
        self._waiting: dict[Caller, list[_Turn]] = {}
        self._served = 0.0
        self._is_busy = False

    async def run(self, caller: Caller, cost: float, work: Callable[[Job], T]) -> T:
        """Run `work` in a thread when its turn has come; return its result."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        line = self._accounts.enter(caller)
        queue = self._waiting.setdefault(caller, [])
        heapq.heappush(queue, (self._served + cost, next(self._order), cost, turn, line))
        self._begin_turn()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end_turn()
            raise
        job = Job()
        working = in_daemon_thread(lambda: work(job), self._name)
        working.add_done_callback(self._end_turn)
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            job.cancel()
            raise
        return working.result()

    def _end_turn(self, working: asyncio.Future[Any] | None = None) -> None:
        if working is not None and not working.cancelled():
            working.exception()  # retrieved, as its caller may have left
        self._is_busy = False
        self._begin_turn()

    def _begin_turn(self) -> None:
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
        """Return the client that has had least, of the tenant that has had least."""
        names, party = [], self._accounts.root
        while party.parties:
            name, party = min(party.parties.items(), key=lambda item: item[1].counter)
            names.append(name)
        return Caller(*names)
