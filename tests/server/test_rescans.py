"""Another look at the adapter directory, asked for far too often."""

import asyncio
import threading

import pytest

from neuroada_serve.server.rescans import Rescans
from tests.support.fake_engine import FakeEngine

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


class SlowAdapters:
    """Rescans that take until they may end."""

    def __init__(self) -> None:
        self.num_running = self.num_begun = self.most_running = 0
        self.may_end = threading.Event()

    def rescan(self) -> int:
        self.num_begun += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        begun = self.num_begun
        assert self.may_end.wait(120)
        self.num_running -= 1
        return begun


async def test_thousands_make_one_that_runs_and_one_that_waits() -> None:
    adapters = SlowAdapters()
    rescans = Rescans(adapters)  # type: ignore[arg-type]
    first = asyncio.create_task(rescans.join())
    while not adapters.num_running:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(rescans.join()) for _ in range(7480)]
    await asyncio.sleep(0.01)
    assert rescans.is_pending
    assert adapters.num_begun == 1
    adapters.may_end.set()
    assert await first == 1
    assert set(await asyncio.gather(*others)) == {2}
    assert (adapters.num_begun, adapters.most_running) == (2, 1)
    assert not rescans.is_pending


async def test_whoever_leaves_takes_nobody_with_him() -> None:
    adapters = SlowAdapters()
    rescans = Rescans(adapters)  # type: ignore[arg-type]
    first, second = (asyncio.create_task(rescans.join()) for _ in range(2))
    while not adapters.num_running:
        await asyncio.sleep(0.001)
    first.cancel()
    adapters.may_end.set()
    assert await second == 1


async def test_failure_reaches_those_who_asked_and_the_next_works() -> None:
    rescans = Rescans(FakeEngine().adapters)
    with pytest.raises(Exception, match="no adapter directory"):
        await rescans.join()
    with pytest.raises(Exception, match="no adapter directory"):
        await rescans.join()
