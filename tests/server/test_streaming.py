"""Streams of events, and clients that leave."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.support.fake_engine import FakeEngine, digest_of
from tests.support.serving import (
    ENDLESS,
    Client,
    busy,
    events,
    serving,
    until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


# --- streaming ------------------------------------------------------------------------------------


async def test_chat_streams_role_then_text_then_reason(client: Client) -> None:
    chunks = events(await client.chat(model="sql", stream=True))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert {c["model"] for c in chunks} == {"sql"}
    assert {c["system_fingerprint"] for c in chunks} == {digest_of("sql")}
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["delta"]["content"] for c in choices[1:]] == ["s", "q", "l"]
    assert [c["finish_reason"] for c in choices] == [None, None, None, "stop"]
    assert all("usage" not in c for c in chunks)


async def test_completion_stream_adds_up_to_the_whole(client: Client) -> None:
    fields = {"model": "pirate", "n": 2, "echo": True}
    whole = (await client.complete(["a", "b"], **fields)).json()
    texts = [""] * 4
    for chunk in events(await client.complete(["a", "b"], **fields, stream=True)):
        assert chunk["object"] == "text_completion"
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


async def test_stream_logprobs_offsets_go_on(client: Client) -> None:
    chunks = events(await client.complete(model="sql", logprobs=0, stream=True))
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks] == [[0], [1], [2]]


async def test_include_usage_adds_one_chunk_without_choices(client: Client) -> None:
    chunks = events(
        await client.chat(model="sql", stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(c["usage"] is None for c in chunks[:-1])


async def test_continuous_usage_counts_up(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await client.complete(model="sql", stream=True, stream_options=options))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


# --- the engine's troubles ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["running", "waiting"])
async def test_disconnect_aborts(place: str, stream: bool) -> None:
    async with serving(FakeEngine(max_num_seqs=1)) as client, AsyncExitStack() as stack:
        engine = client.engine
        if place == "waiting":  # for its first token
            await stack.enter_async_context(busy(client))
        leave = asyncio.Event()
        fields = {"prompt": "hi", "model": "sql", "n": 2, "stream": stream, **ENDLESS}
        body = json.dumps(fields).encode()
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        app = client._transport.app  # type: ignore[attr-defined]
        request = asyncio.create_task(app(scope, receive, send))
        await until(lambda: engine.num_leases == 2)
        leave.set()
        await request
        await until(lambda: engine.num_leases == 0)
        assert [sequence.adapter for sequence in engine.present] == [None] * (place == "waiting")
        await stack.aclose()
        await until(lambda: client.worker.idle)
