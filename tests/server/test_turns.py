"""One thread's work, shared."""

import asyncio
import threading

import pytest

from neuroada_serve.server.caller import Caller
from neuroada_serve.server.turns import Cancelled, Job, Turns

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


class Held:
    """Turns whose thread is held until `go`; what ran after that, in order."""

    def __init__(self) -> None:
        self.turns = Turns("test")
        self.done = list[str]()
        self._go = threading.Event()
        self.first = asyncio.create_task(
            self.turns.run(Caller("first"), 0.0, lambda _: self._go.wait(120))
        )

    async def ask(
        self, name: str, tenant: str, cost: float, client: str = ""
    ) -> "asyncio.Task[None]":
        task = asyncio.create_task(
            self.turns.run(Caller(tenant, client), cost, lambda _: self.done.append(name))
        )
        await asyncio.sleep(0)
        return task

    def go(self) -> None:
        self._go.set()


async def test_small_job_overtakes_large_ones_of_its_tenant() -> None:
    held = Held()
    large = [await held.ask(f"large {i}", "", 1000) for i in range(60)]
    small = await held.ask("small", "", 1)
    held.go()
    await asyncio.gather(small, *large)
    assert held.done[0] == "small"
    assert held.done[1:] == [f"large {i}" for i in range(60)]


async def test_tenants_share_by_cost_not_by_jobs() -> None:
    held = Held()
    tasks = [await held.ask(f"a{i}", "a", 100) for i in range(4)]
    tasks += [await held.ask(f"b{i}", "b", 50) for i in range(8)]
    held.go()
    await asyncio.gather(*tasks)
    for num in (3, 6, 9, 12):  # after every 200 + 100
        spent = sum(100 for name in held.done[:num] if name[0] == "a")
        assert abs(spent - sum(50 for name in held.done[:num] if name[0] == "b")) <= 100


async def test_clients_of_a_tenant_share_by_cost_and_get_no_more_than_one_alone() -> None:
    held = Held()
    tasks = [await held.ask(f"many{i % 3}", "a", 100, client=f"c{i % 3}") for i in range(9)]
    tasks += [await held.ask("loud", "b", 100, client="loud") for _ in range(9)]
    tasks += [await held.ask("quiet", "b", 100, client="quiet")]
    held.go()
    await asyncio.gather(*tasks)
    first = held.done[:12]
    assert first.index("quiet") <= 4
    assert [first.count(f"many{i}") for i in range(3)] == [2, 2, 2]


async def test_large_job_is_overtaken_by_no_more_than_its_own_cost() -> None:
    turns, done = Turns("test"), list[str]()
    go = threading.Event()
    tasks = [asyncio.create_task(turns.run(Caller(), 0.0, lambda _: go.wait(120)))]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(turns.run(Caller(), 100.0, lambda _: done.append("large"))))
    await asyncio.sleep(0)

    async def small_after_small() -> None:
        for _ in range(50):
            await turns.run(Caller(), 10.0, lambda _: done.append("small"))

    tasks += [asyncio.create_task(small_after_small()) for _ in range(2)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*tasks)
    assert done.index("large") <= 12


async def test_whoever_leaves_the_queue_costs_nothing() -> None:
    held = Held()
    leaving = [await held.ask(f"gone {i}", "", 1) for i in range(60)]
    staying = await held.ask("stayed", "", 5)
    for task in leaving:
        task.cancel()
    held.go()
    await staying
    assert held.done == ["stayed"]


async def test_running_job_is_told_that_nobody_waits() -> None:
    turns, began, ended = Turns("test"), threading.Event(), threading.Event()

    def work(job: Job) -> None:
        began.set()
        try:
            while True:
                job.check()
        except Cancelled:
            ended.set()
            raise

    task = asyncio.create_task(turns.run(Caller(), 1.0, work))
    while not began.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    assert await turns.run(Caller(), 1.0, lambda _: "next") == "next"
    assert ended.is_set()


async def test_failure_is_the_callers_and_the_thread_goes_on() -> None:
    turns = Turns("test")

    def fail(job: Job) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await turns.run(Caller(), 1.0, fail)
    assert await turns.run(Caller(), 1.0, lambda _: 7) == 7
