"""Work off the event loop, one at a time, for whoever has had least of it."""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from neuroada_serve.engine.accounts import Accounts, Party, charge
from neuroada_serve.server.caller import Caller
from neuroada_serve.server.threads import in_daemon_thread

T = TypeVar("T")

# What it goes by among its caller's, its number, its cost, told when it comes, who pays.
_Turn = tuple[float, int, float, asyncio.Future[None], list[Party]]


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Job:
    """What runs may ask now and then whether it should go on."""

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


class Turns:
    """One job at a time. Tenants share its time by cost, and so do the clients of one; of one
    client's jobs the cheap go first, but each is overtaken by no more than its own cost.

    Of the event loop. A caller that is cancelled leaves the queue; if its job runs already, it is
    told by `Job.check`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
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
        working = in_daemon_thread(lambda: work(job), self._name)
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
