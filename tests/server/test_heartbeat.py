"""A step that hangs: /health says so, the log shows where, and all is well once it ends."""

import asyncio
import logging
import threading
from contextlib import suppress

import httpx
import pytest

from neuroada_serve.server import engine_thread
from neuroada_serve.server.heartbeat import Heartbeat
from tests.support.fake_engine import FakeEngine
from tests.support.serving import error_of, serve_while, serving, until, wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


class HangingEngine(FakeEngine):
    """Hangs in a step with a request until `may_end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()

    def step(self, early=None):
        if self.present:
            self.hang_here()
        return super().step(early)

    def hang_here(self) -> None:
        self.may_end.wait(120)


def test_only_a_step_beyond_the_limit_hangs() -> None:
    now = [0.0]
    heartbeat = Heartbeat(10.0, lambda: now[0])
    now[0] = 1000.0  # asleep until now
    assert heartbeat.hangs_s is None
    with heartbeat:
        now[0] += 10.0
        assert heartbeat.hangs_s is None
        now[0] += 1.0
        assert heartbeat.hangs_s == 11.0
    assert heartbeat.hangs_s is None


def test_step_that_raises_hangs_no_more() -> None:
    now = [0.0]
    heartbeat = Heartbeat(10.0, lambda: now[0])
    with suppress(ValueError), heartbeat:
        raise ValueError
    now[0] = 1000.0
    assert heartbeat.hangs_s is None


async def test_hang_is_logged_once_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    heartbeat, may_end = Heartbeat(0.02), threading.Event()

    def hang_here() -> None:
        with heartbeat:
            may_end.wait(120)

    def said(level: int) -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.levelno == level]

    watching = asyncio.create_task(heartbeat.watch())
    thread = threading.Thread(target=hang_here)
    thread.start()
    await until(lambda: said(logging.ERROR))
    await asyncio.sleep(0.1)
    may_end.set()
    await until(lambda: said(logging.WARNING))
    thread.join()
    watching.cancel()
    (record,) = said(logging.ERROR)
    assert "a step of the engine hangs" in record.getMessage()
    assert "hang_here" in str(record.stack_info)


async def test_health_turns_while_a_step_hangs_and_back() -> None:
    engine = HangingEngine()
    async with serving(engine, step_timeout_s=1) as client:
        running = asyncio.create_task(client.complete())
        await until(lambda: engine.present)
        assert (await client.get("/health")).status_code == 200
        await until(lambda: not client.worker.ready)
        for reply in (await client.get("/health"), await client.complete()):
            assert "a step of its engine has taken 1 s" in error_of(reply, 503)["message"]
        engine.may_end.set()
        assert (await running).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.complete()).status_code == 200


def test_engine_left_behind_in_a_hanging_step_is_an_exit_code(monkeypatch) -> None:
    monkeypatch.setattr(engine_thread, "JOIN_TIMEOUT_S", 0.1)
    engine = HangingEngine()

    def visit(url: str) -> None:
        with suppress(httpx.TimeoutException):
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=0.2)
        wait_for(lambda: httpx.get(f"{url}/health", timeout=120).status_code == 503)

    assert serve_while(engine, visit, step_timeout_s=1, drain_timeout_s=0.1) == 70
    engine.may_end.set()
