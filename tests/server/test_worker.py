"""The engine's thread: failures, full queues, idleness."""

import asyncio
from contextlib import AsyncExitStack

import pytest
import torch

from neuroada_serve.server.tasks import heard
from neuroada_serve.server.worker import Stream
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    ENDLESS,
    Client,
    busy,
    error_of,
    events,
    serving,
    until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [("poison", 500, "non-finite logits"), ("absent", 503, "adapter 'sql' cannot be used now")],
)
async def test_request_that_fails_at_once_has_an_errors_status(
    client: Client, prompt: str, status: int, message: str, stream: bool
) -> None:
    reply = await client.complete(prompt, model="sql", n=2, stream=stream)
    assert error_of(reply, status)["message"] == message
    await until(lambda: client.engine.num_leases == 0)
    assert client.worker.idle
    assert (await client.complete()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_failed_prompt_fails_its_siblings(client: Client, stream: bool) -> None:
    error_of(await client.complete(["poison", "good"], **ENDLESS, stream=stream), 500)
    await until(lambda: client.engine.present == [])
    assert client.engine.requests[1].num_sent < len(client.engine.requests[1].answer)


async def test_failure_after_the_first_token_is_an_error_event(client: Client) -> None:
    *chunks, last = events(await client.complete("poison later", model="sql", stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["s", "q"]
    assert last["error"]["code"] == 500


async def test_engine_death_ends_every_request_and_closes_shop() -> None:
    async with serving(FakeEngine(max_num_seqs=2)) as client:
        tasks = [
            asyncio.create_task(client.complete(**ENDLESS)),
            asyncio.create_task(client.chat(**ENDLESS, stream=True)),
        ]
        await until(lambda: client.engine.num_running == 2)
        tasks.append(asyncio.create_task(client.chat(**ENDLESS, stream=True)))
        await until(lambda: client.engine.num_waiting == 1)
        client.engine.dies = True
        whole, stream, not_begun = await asyncio.gather(*tasks)
        error_of(whole, 500)
        assert events(stream)[-1]["error"]["code"] == 500
        error_of(not_begun, 500)
        assert client.died.is_set()
        assert (await client.get("/health")).status_code == 503
        assert error_of(await client.complete(), 503)["type"] == "ServiceUnavailableError"


async def test_full_queue_is_503_and_free_places_are_used() -> None:
    async with serving(FakeEngine(max_num_seqs=2), max_waiting=1) as client, busy(client, 2):
        async with busy(client, 1):
            for stream in (False, True):
                refused = await client.complete(stream=stream)
                assert error_of(refused, 503)["type"] == "ServiceUnavailableError"
        await until(lambda: client.engine.num_waiting == 0)
        async with busy(client, 1):
            assert client.engine.num_waiting == 1


async def test_full_queue_takes_adapters_below_their_share() -> None:
    engine = FakeEngine(("sql", "pirate", "json"), max_num_seqs=1)
    async with serving(engine, max_waiting=2) as client, AsyncExitStack() as stack:
        await stack.enter_async_context(busy(client, 3, model="sql"))
        error_of(await client.complete(model="sql"), 503)
        for model in ("pirate", "json"):
            await stack.enter_async_context(busy(client, model=model))
        for model in ("pirate", None):  # twice as many as may wait
            error_of(await client.complete(model=model), 503)


async def test_full_queue_takes_tenants_below_their_share() -> None:
    engine = FakeEngine(max_num_seqs=1)
    async with serving(engine, max_waiting=2, tenant_header="x-tenant") as client:
        client.headers["x-tenant"] = "loud"
        async with busy(client, 3, model="sql"):
            error_of(await client.complete(model="sql"), 503)
            client.headers["x-tenant"] = "quiet"
            async with busy(client, model="sql"):
                assert [request.tenant for request in engine.requests[3:]] == ["quiet"]


async def test_idle_engine_does_what_an_adapter_change_needs() -> None:
    async with serving(allow_runtime_adapters=True) as client:
        await client.complete()
        await client.post("/v1/adapters/merge", json={"mode": "sql"})
        await until(lambda: client.engine.adapters.merging.merged == "sql")
        await client.post("/v1/adapters/merge", json={"mode": "never"})
        await until(lambda: client.engine.adapters.merging.merged is None)


async def test_engine_does_at_once_what_was_asked_for_before_it_was_served() -> None:
    engine = FakeEngine()
    engine.adapters.merging.set_mode("sql")
    async with serving(engine):
        await until(lambda: engine.adapters.merging.merged == "sql")


async def test_idle_engine_thread_sleeps(client: Client) -> None:
    await client.complete()
    await until(lambda: not client.engine.has_unfinished)
    num_polls = client.engine.num_polls
    await asyncio.sleep(0.1)
    assert client.engine.num_polls <= num_polls + 1


async def test_refused_prompt_takes_its_siblings_with_it(client: Client) -> None:
    error_of(await client.complete(["fine", "x" * 101], **ENDLESS), 400)
    assert client.engine.requests == []
    assert client.worker.idle


async def test_device_that_fails_between_two_steps_ends_the_engine_too() -> None:
    async with serving() as client:

        def fail(*args: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        client.engine.add_requests = fail
        error_of(await client.complete(), 500)
        await until(client.died.is_set)
        assert "its engine failed" in error_of(await client.get("/health"), 503)["message"]


async def test_outputs_that_cannot_be_delivered_end_every_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(FakeEngine(max_num_seqs=2)) as client:
        tasks = [
            asyncio.create_task(client.complete(**ENDLESS)),
            asyncio.create_task(client.chat(**ENDLESS, stream=True)),
        ]
        await until(lambda: client.engine.num_running == 2)

        def fail(*args: object) -> None:
            raise KeyError("of the server")

        monkeypatch.setattr(Stream, "_push", fail)
        whole, stream = await asyncio.gather(*tasks)
        error_of(whole, 500)
        assert events(stream)[-1]["error"]["code"] == 500
        assert client.died.is_set()
        assert (await client.get("/health")).status_code == 503
        assert "the server stops: KeyError: 'of the server'" in caplog.text


async def test_failure_of_a_task_beside_the_requests_is_heard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise KeyError("of the task")

    failed: list[str] = []
    kept = heard(asyncio.create_task(fail()), "the task", lambda: failed.append("the task"))
    await asyncio.wait([kept])
    await until(lambda: failed == ["the task"])
    [record] = caplog.records
    assert record.levelname == "CRITICAL"
    assert record.getMessage() == "the task failed: KeyError: 'of the task'"
    assert record.exc_info

    cancelled = heard(asyncio.create_task(asyncio.sleep(60)), "another", failed.clear)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    await asyncio.sleep(0)
    assert (failed, caplog.records) == (["the task"], [record])
