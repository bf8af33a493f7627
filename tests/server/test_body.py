"""Bodies that cost much, or would have."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from neuroada_serve.server import body as body_module
from neuroada_serve.server.body import MAX_ITEMS, parse_body
from tests.support.serving import Client, error_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

MOST = (2 << 20) - 200
JSON = {"content-type": "application/json"}
USER = b'{"role":"user","content":"x"}'


def filled(begin: bytes, item: bytes, end: bytes, most: int = MOST) -> bytes:
    """As many items as a body of the largest size holds."""
    num = min(most, (MOST - len(begin) - len(end)) // (len(item) + 1))
    return begin + b",".join([item] * num) + end


def unknown_fields(num: int) -> bytes:
    return json.dumps({f"f{i}": 1 for i in range(num)}).encode()


# Each below every bound of the parser is there as well: what is built is still looked at cheaply.
BOMBS = {
    "messages": filled(b'{"messages":[', b"{}", b"]}"),
    "messages, fewer": filled(b'{"messages":[', b"{}", b"]}", 8000),
    "messages, 2,048": filled(b'{"messages":[', b"{}", b"]}", 2048),
    "list": filled(b"[", b"1", b"]"),
    "list, fewer": filled(b"[", b"1", b"]", 250_000),
    "parts": filled(b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}", 8000),
    "stop_token_ids": filled(b'{"prompt":"x","stop_token_ids":[', b'"x"', b"]}"),
    "stop_token_ids, fewer": filled(b'{"prompt":"x","stop_token_ids":[', b'"x"', b"]}", 60_000),
    "stop": filled(b'{"prompt":"x","stop":[', b"1", b"]}", 250_000),
    "prompts": filled(b'{"prompt":[', b"{}", b"]}", 8000),
    "prompt of mixed kinds": filled(b'{"prompt":[1,', b'"x"', b"]}", 60_000),
    "prompts of tokens": filled(b'{"prompt":[', b'["x"]', b"]}", 8000),
    "input": filled(b'{"model":"sql","input":[', b"null", b"]}", 250_000),
    "deep": b'{"prompt":' + b"[" * MOST,
    "deep objects": b'{"a":' * (MOST // 5),
    "unknown fields": unknown_fields(130_000),
    "unknown fields, fewer": unknown_fields(60_000),
    "logit_bias": b'{"prompt":"x","logit_bias":' + unknown_fields(60_000) + b"}",
    "logit_bias of texts": json.dumps(
        {"prompt": "x", "logit_bias": {str(i): "x" for i in range(60_000)}}
    ).encode(),
    "metadata": b'{"prompt":"x","metadata":' + unknown_fields(60_000) + b"}",
    "empty lists": filled(b'{"lora_name":[', b"[]", b"]}"),
}
ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/classify",
    "/v1/unload_lora_adapter",
    "/v1/adapters/merge",
)


@pytest.fixture(autouse=True)
def _collector_leaves_what_is_loaded_alone() -> Iterator[None]:
    """As the command does: a collection that looks at torch takes half a second by itself."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_bombs_are_within_the_limit_of_bodies() -> None:
    assert all(len(bomb) <= 2 << 20 for bomb in BOMBS.values())


async def longest_hold(client: Client, requests: list[tuple[str, bytes]]) -> float:
    """Seconds that the event loop was held while these were refused."""
    held = 0.0

    async def watch() -> None:
        nonlocal held
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            held = max(held, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    for route, bomb in requests:
        error_of(await client.post(route, content=bomb, headers=JSON), 400)
    watching.cancel()
    return held


@pytest.mark.parametrize("name", BOMBS)
async def test_body_bomb_holds_the_event_loop_for_moments(name: str) -> None:
    async with serving(allow_runtime_adapters=True) as client:
        held = await longest_hold(client, [(route, BOMBS[name]) for route in ROUTES])
        assert held < 0.5  # seconds without these bounds; some 0.02 on a quiet machine
        assert client.engine.requests == []


@pytest.mark.parametrize("name", BOMBS)
async def test_few_faults_are_told_of_many(name: str) -> None:
    async with serving(allow_runtime_adapters=True) as client:
        for route in ROUTES:
            reply = await client.post(route, content=BOMBS[name], headers=JSON)
            assert len(error_of(reply, 400)["message"]) < 2500


async def test_body_of_too_many_parts_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "from_json", lambda body: pytest.fail("it was built"))
    for name in ("messages", "list", "unknown fields", "empty lists", "stop_token_ids"):
        with pytest.raises(HTTPException, match="at most"):
            parse_body(BOMBS[name])


@pytest.mark.parametrize(
    "text",
    [
        "," * 1_000_000,
        '"' * 500_000,
        '\\",' * 300_000,
        "\\" * 500_000,
        "[{" * 500_000,
        "é,\n" * 9999,
    ],
)
def test_what_stands_in_a_text_is_not_counted(text: str) -> None:
    value = {"prompt": text, "after": [1, 2]}
    for ascii_only in (True, False):
        assert parse_body(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_as_many_token_ids_as_the_longest_prompts_have_are_taken() -> None:
    value: Any = {"prompt": list(range(100_000, 100_000 + 200_000))}
    assert parse_body(json.dumps(value, separators=(",", ":")).encode()) == value
    with pytest.raises(HTTPException, match="items"):
        parse_body(json.dumps([1] * (MAX_ITEMS + 2)).encode())


async def test_large_bodies_are_parsed_off_the_event_loop_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, most, threads = 0, 0, set[str]()

    def watched(body: bytes) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threads.add(threading.current_thread().name)
        time.sleep(0.005)
        running -= 1
        return parse_body(body)

    monkeypatch.setattr(body_module, "parse_body", watched)
    async with serving() as client:
        bomb = BOMBS["messages, fewer"] + b" " * 40_000
        posts = [client.post("/v1/chat/completions", content=bomb, headers=JSON) for _ in range(9)]
        assert {reply.status_code for reply in await asyncio.gather(*posts)} == {400}
    assert most == 1
    assert threading.current_thread().name not in threads
