"""The HTTP endpoint over a fake engine: shapes, refusals, adapters, disconnects, death and drain.

In no reply of any test here may there be a secret: see `Client`.
"""

import asyncio
import json
import logging
import os
import pkgutil
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.request import SamplingParams
from neuroada_serve.server import routes
from neuroada_serve.server.app import ROUTERS
from neuroada_serve.server.body import BoundedRoute, require_json
from neuroada_serve.server.serve import serve
from tests.support.fake_engine import BASE, SINCE, FakeEngine, digest_of
from tests.support.serving import (
    ENDLESS,
    HELLO,
    Client,
    busy,
    error_of,
    events,
    is_listening,
    serve_while,
    serving,
    until,
    wait_for,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as client:
        yield client


# --- routers ---------------------------------------------------------------------------------


def test_every_module_of_routes_is_served() -> None:
    names = [f"{routes.__name__}.{module.name}" for module in pkgutil.iter_modules(routes.__path__)]
    assert {id(import_module(name).router) for name in names} == set(map(id, ROUTERS))


def test_every_route_bounds_its_body_and_every_post_requires_json() -> None:
    for router in ROUTERS:
        assert router.routes
        for route in router.routes:
            assert isinstance(route, BoundedRoute)
            required = [dependency.dependency for dependency in route.dependencies]
            assert route.methods == {"GET"} or require_json in required, route.path


# --- shapes ----------------------------------------------------------------------------------


async def test_completion_has_openais_shape(client: Client) -> None:
    body = (await client.complete("hi", model="sql")).json()
    assert body.pop("id").startswith("cmpl-")
    assert abs(body.pop("created") - time.time()) < 5
    assert body == {
        "object": "text_completion",
        "model": "sql",
        "system_fingerprint": digest_of("sql"),
        "choices": [
            {
                "index": 0,
                "text": "sql",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_chat_has_openais_shape(client: Client) -> None:
    body = (await client.chat(model="pirate", max_tokens=3)).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "pirate"
    assert body["system_fingerprint"] == digest_of("pirate")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "pir"}
    assert choice["finish_reason"] == "length"


async def test_base_serves_its_own_name_and_no_name(client: Client) -> None:
    for more in ({}, {"model": None}, {"model": BASE}):
        body = (await client.complete(**more)).json()
        assert body["model"] == BASE
        assert body["system_fingerprint"] is None
        assert body["choices"][0]["text"] == "base"


async def test_every_prompt_and_choice_is_answered_in_order(client: Client) -> None:
    body = (await client.complete(["a", "bc"], model="sql", n=2, echo=True)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == ["asql", "asql", "bcsql", "bcsql"]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12


async def test_cached_tokens_count_once_a_prompt(client: Client) -> None:
    fields = {"prompt": ["ab", "cde"], "model": "sql", "n": 2}
    await client.complete(**fields)
    usage = (await client.complete(**fields)).json()["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1 + 2}
    options = {"include_usage": True}
    chunks = events(await client.complete(**fields, stream=True, stream_options=options))
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1 + 2}


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
async def test_prompts_come_as_text_or_tokens(client: Client, prompt: Any) -> None:
    body = (await client.complete(prompt, echo=True)).json()
    assert body["choices"][0]["text"] == "abbase"
    assert client.engine.requests[0].prompt == b"ab"


async def test_text_parts_and_developer_role_reach_the_template(client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = await client.chat(
        [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    assert reply.status_code == 200
    assert client.engine.requests[0].prompt == b"<system>be brief<user>a\nb"


async def test_completion_logprobs_have_their_shape(client: Client) -> None:
    body = (await client.complete(model="sql", logprobs=2, max_tokens=2)).json()
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "tokens": ["s", "q"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"s": -0.5, "?": -9999.0}, {"q": -0.5, "?": -9999.0}],
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_scores_the_prompt(client: Client, stream: bool) -> None:
    reply = await client.complete("abc", echo=True, logprobs=0, max_tokens=1, stream=stream)
    parts = events(reply) if stream else [reply.json()]
    logprobs = [part["choices"][0]["logprobs"] for part in parts]
    scores = {key: sum((part[key] for part in logprobs), []) for key in logprobs[0]}
    assert scores == {
        "text_offset": [0, 1, 2, 3],
        "tokens": ["a", "b", "c", "b"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}, {"b": -0.5}],
    }


async def test_chat_logprobs_have_their_shape(client: Client) -> None:
    body = (await client.chat(model="sql", logprobs=True, top_logprobs=1, max_tokens=1)).json()
    entry = {"token": "s", "logprob": -0.5, "bytes": [115]}
    assert body["choices"][0]["logprobs"] == {"content": [{**entry, "top_logprobs": [entry]}]}


async def test_stop_string_is_reported(client: Client) -> None:
    (choice,) = (await client.complete(model="sql", stop="l")).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("sq", "stop", "l")


async def test_sampling_fields_reach_the_engine(client: Client) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "seed": 11,
        "skip_special_tokens": False,
    }
    await client.complete(**fields, max_tokens=4, logprobs=0, logit_bias={"5": -3})
    wanted = {**fields, "logit_bias": {5: -3.0}}
    assert client.engine.requests[0].params == SamplingParams(**wanted, max_tokens=4, logprobs=0)


@pytest.mark.parametrize(
    ("given", "used"),
    [({}, None), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 2, "max_tokens": 2}, 2)],
)
async def test_chat_may_use_all_the_room_unless_limited(
    client: Client, given: dict[str, int], used: int | None
) -> None:
    await client.chat(**given)
    assert client.engine.requests[0].params.max_tokens == used


async def test_completion_takes_16_tokens_by_default(client: Client) -> None:
    await client.complete(max_tokens=None)
    assert client.engine.requests[0].params.max_tokens == 16


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(("header", "tenant"), [("x-tenant", "acme"), (None, "")])
async def test_tenant_is_heard_only_where_its_header_is_set(
    route: str, header: str | None, tenant: str
) -> None:
    async with serving(tenant_header=header) as client:
        client.headers["X-Tenant"] = "acme"
        await getattr(client, route)(model="sql", cache_salt="pepper")
        (request,) = client.engine.requests
        assert (request.tenant, request.cache_salt) == (tenant, "pepper")


async def test_without_salt_and_tenant_they_are_empty() -> None:
    async with serving(tenant_header="x-tenant") as client:
        await client.complete(cache_salt=None)
        (request,) = client.engine.requests
        assert (request.tenant, request.cache_salt) == ("", "")


async def test_models_are_listed(client: Client) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == [BASE, "pirate", "sql"]
    assert [card["parent"] for card in cards] == [None, BASE, BASE]
    assert [card["created"] for card in cards[1:]] == [SINCE, SINCE]
    for card in cards:
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card


async def test_mix_of_adapters_is_a_model(client: Client) -> None:
    mix = "sql:0.7+pirate:0.3"
    body = (await client.complete(model=mix)).json()
    assert body["choices"][0]["text"] == mix[:16]
    assert body["model"] == client.engine.requests[0].adapter == mix
    assert body["system_fingerprint"] == digest_of(mix)
    chunks = events(await client.chat(model="sql+pirate:-1", stream=True))
    assert chunks[-1]["model"] == client.engine.requests[1].adapter == "sql+pirate:-1"


async def test_adapter_is_asked_for_before_the_engine_takes_the_request(client: Client) -> None:
    await client.complete(model="sql")
    (call,) = [call for call in client.engine.adapters.calls if call.what == "prefetch"]
    assert call.name == "sql"
    assert call.thread != "engine"


async def test_version_and_health_answer(client: Client) -> None:
    assert (await client.get("/version")).json().keys() == {"version"}
    reply = await client.get("/health")
    assert (reply.status_code, reply.content) == (200, b"")


# --- streaming -------------------------------------------------------------------------------


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


# --- refusals --------------------------------------------------------------------------------


async def test_unknown_model_is_404_and_never_the_base(client: Client) -> None:
    replies = [
        await client.complete(model="nobody"),
        await client.chat(model="nobody"),
        await client.chat(model="nobody", stream=True),
        await client.get("/v1/models/nobody"),
    ]
    for reply in replies:
        error = error_of(reply, 404)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert client.engine.requests == []


@pytest.mark.parametrize(
    "mix",
    ["sql+nobody", "sql:", "sql:x", "sql:0", "sql:nan", "sql:inf+pirate", "sql:1e9", "sql+", "+"]
    + ["sql+sql", ":1", " sql+pirate", "sql:0.5:0.5", "+".join(f"a{i}" for i in range(9))],
)
async def test_what_is_no_mix_is_404(client: Client, mix: str) -> None:
    for reply in (await client.complete(model=mix), await client.chat(model=mix, stream=True)):
        error = error_of(reply, 404)
        assert error["param"] == "model"
        assert mix in error["message"]
    assert client.engine.requests == []


async def test_mix_of_eight_long_names_is_no_longer_than_a_model_may_be() -> None:
    names = [f"{i}{'x' * 62}" for i in range(8)]
    mix = "+".join(f"{name}:-0.0625" for name in names)
    async with serving(FakeEngine(names)) as client:
        assert (await client.complete(model=mix)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [1, 10**30], "echo": True}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"cache_salt": 1}, "cache_salt"),
        ({"model": "x" * 1025}, "model"),
    ],
)
async def test_completion_refuses_by_field(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    error = error_of(await client.complete(**{"prompt": "hi"} | fields), 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
async def test_chat_refuses_by_field(client: Client, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.chat(**{"messages": HELLO} | fields), 400)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "hi", "model": "\ud800"}',
        rb'{"prompt": "hi", "\ud800": 1}',
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "logit_bias": {"1": Infinity}}',
        b'{"prompt": "hi"',
        b'["hi"]',
        b'"hi"',
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_hostile_bodies_are_400(client: Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(await client.post("/v1/completions", content=body, headers=headers), 400)


async def test_bookkeeping_fields_and_nulls_change_nothing(client: Client) -> None:
    bookkeeping = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    nulls = dict.fromkeys(["tools", "stop", "n", "top_p", "logprobs", "response_format", "stream"])
    assert (await client.chat(**bookkeeping, **nulls)).status_code == 200
    assert client.engine.requests[0].params == SamplingParams(max_tokens=None)


async def test_wrong_route_method_and_type_get_the_envelope(client: Client) -> None:
    assert error_of(await client.get("/v1/nothing"), 404)["type"] == "NotFoundError"
    assert error_of(await client.get("/v1/completions"), 405)["type"] == "MethodNotAllowedError"
    form = await client.post("/v1/completions", data={"prompt": "hi"})
    assert "application/json" in error_of(form, 400)["message"]
    bare = await client.post("/v1/completions", content=b'{"prompt": "hi"}')
    assert "application/json" in error_of(bare, 400)["message"]


async def test_body_above_2_mib_is_413(client: Client) -> None:
    async def in_pieces() -> AsyncIterator[bytes]:  # without a content-length
        for _ in range(5):
            yield b" " * (1 << 19)

    headers = {"content-type": "application/json"}
    for content in (b" " * ((2 << 20) + 1), in_pieces()):
        reply = await client.post("/v1/completions", content=content, headers=headers)
        error_of(reply, 413)


async def test_openapi_promises_no_422(client: Client) -> None:
    schema = await client.get("/openapi.json")
    assert schema.status_code == 200
    assert '"422"' not in schema.text


# --- the engine's troubles -------------------------------------------------------------------


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
        await until(lambda: client.engine.adapters.merged == "sql")
        await client.post("/v1/adapters/merge", json={"mode": "never"})
        await until(lambda: client.engine.adapters.merged is None)


async def test_engine_does_at_once_what_was_asked_for_before_it_was_served() -> None:
    engine = FakeEngine()
    engine.adapters.set_merge_mode("sql")
    async with serving(engine):
        await until(lambda: engine.adapters.merged == "sql")


async def test_idle_engine_thread_sleeps(client: Client) -> None:
    await client.complete()
    await until(lambda: not client.engine.has_unfinished)
    num_polls = client.engine.num_polls
    await asyncio.sleep(0.1)
    assert client.engine.num_polls <= num_polls + 1


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


async def test_refused_prompt_takes_its_siblings_with_it(client: Client) -> None:
    error_of(await client.complete(["fine", "x" * 101], **ENDLESS), 400)
    assert client.engine.requests == []
    assert client.worker.idle


# --- adapters at run time --------------------------------------------------------------------

CHANGES = [
    ("/v1/load_lora_adapter", {"lora_name": "fr", "lora_path": "new"}),
    ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
    ("/v1/adapters/rescan", {}),
    ("/v1/adapters/merge", {"mode": "sql"}),
    ("/v1/adapters/sql/pin", {}),
    ("/v1/adapters/sql/unpin", {}),
]
FROM_FILES = {"/v1/load_lora_adapter", "/v1/adapters/rescan"}


def write(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(content)


@asynccontextmanager
async def serving_adapters(
    tmp_path: Path, engine: FakeEngine | None = None
) -> AsyncIterator[Client]:
    """Folders to load from; `slow` is read once `may_read` is set."""
    root = tmp_path / "secret"
    for name in ("slow", "bad", "locked", "crash"):
        write(root / "adapters" / name, name)
    write(root / "adapters" / "new", "good 1")
    write(root / "adapters" / "newer", "good 2")
    write(root / "outside", "good")
    (root / "adapters" / "link").symlink_to(root / "outside")
    adapter_dir = root / "adapters"
    async with serving(engine, adapter_dir=adapter_dir, allow_runtime_adapters=True) as client:
        yield client
        client.engine.adapters.may_read.set()


async def test_loaded_adapter_serves_until_unloaded(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await client.load("fr", "new")
        assert reply.text == "Success: LoRA adapter 'fr' added successfully."
        assert reply.headers["content-type"].startswith("text/plain")
        body = (await client.complete(model="fr")).json()
        assert body["choices"][0]["text"] == "fr"
        assert body["system_fingerprint"] == digest_of("good 1")
        assert "fr" in (await client.get("/v1/models")).text

        gone = await client.unload("fr")
        assert gone.text == "Success: LoRA adapter 'fr' removed successfully."
        error_of(await client.complete(model="fr"), 404)
        assert "fr" not in (await client.get("/v1/models")).text


@pytest.mark.parametrize("what", ["load", "unload", "rescan", "describe"])
async def test_what_takes_long_is_done_off_engine_and_event_loop(tmp_path: Path, what: str) -> None:
    async with serving_adapters(tmp_path) as client:
        adapters = client.engine.adapters
        await client.load("fr", "new")
        await client.unload("fr")
        await client.post("/v1/adapters/rescan", json={})
        await client.get("/v1/models")
        await client.get("/v1/adapters")
        assert adapters.threads_of(what)
        assert not adapters.threads_of(what) & {"engine", threading.current_thread().name}


async def test_name_of_another_file_is_409_without_load_inplace(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        assert (await client.load("fr", "new")).status_code == 200
        error = error_of(await client.load("fr", "newer"), 409)
        assert (error["type"], error["param"]) == ("ConflictError", "lora_name")
        assert "load_inplace" in error["message"]
        assert client.engine.adapters.versions["fr"].digest == digest_of("good 1")
        assert (await client.load("fr", "newer", load_inplace=True)).status_code == 200
        assert client.engine.adapters.versions["fr"].digest == digest_of("good 2")


async def test_same_file_again_is_200(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        for more in ({}, {}, {"load_inplace": True}):
            assert (await client.load("fr", "new", **more)).status_code == 200


async def test_running_stream_keeps_its_version_while_new_requests_get_the_next(
    tmp_path: Path,
) -> None:
    async with serving_adapters(tmp_path) as client:
        await client.load("fr", "new")
        fields = {"model": "fr", "ignore_eos": True, "max_tokens": 300}
        stream = asyncio.create_task(client.complete(**fields, stream=True))
        await until(lambda: client.engine.num_running)
        await client.load("fr", "newer", load_inplace=True)
        body = (await client.complete(model="fr")).json()
        assert not stream.done()
        assert body["system_fingerprint"] == digest_of("good 2")
        chunks = events(await stream)
        assert {chunk["system_fingerprint"] for chunk in chunks} == {digest_of("good 1")}


async def test_adapter_in_use_is_409_with_the_count_and_served_as_before(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client, busy(client, 2, model="sql"):
        error = error_of(await client.unload("sql", timeout_s=0.02), 409)
        assert error["type"] == "ConflictError"
        assert "in use by 2 requests" in error["message"]
        assert (await client.complete(model="sql")).status_code == 200


async def test_unload_waits_for_running_requests_and_lets_no_new_ones_in(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        async with busy(client, model="sql"):
            unload = asyncio.create_task(client.unload("sql"))
            await until(lambda: client.engine.adapters.versions["sql"].state == "draining")
            error_of(await client.complete(model="sql"), 404)
            error_of(await client.complete(model="sql+pirate"), 404)
            assert "sql" not in (await client.get("/v1/models")).text
            _, info = (await client.get("/v1/adapters")).json()["data"]
            assert (info["name"], info["state"], info["num_leases"]) == ("sql", "draining", 1)
            assert not unload.done()
        assert (await unload).status_code == 200
        assert [info["name"] for info in (await client.get("/v1/adapters")).json()["data"]] == [
            "pirate"
        ]


async def test_unload_with_abort_ends_running_requests(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client, busy(client, model="pirate"):
        whole = asyncio.create_task(client.complete(model="sql", **ENDLESS))
        stream = asyncio.create_task(client.complete(model="sql", **ENDLESS, stream=True))
        await until(lambda: client.engine.num_running == 3)
        assert (await client.unload("sql", timeout_s=0, abort=True)).status_code == 200
        assert "its adapter is unloaded" in error_of(await whole, 503)["message"]
        assert events(await stream)[-1]["error"]["code"] == 503
        assert [sequence.adapter for sequence in client.engine.present] == ["pirate"]


@pytest.mark.parametrize(
    "fields", [{"timeout_s": -1}, {"timeout_s": 601}, {"timeout_s": "1"}, {"abort": 1}]
)
async def test_unload_refuses_by_field(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving_adapters(tmp_path) as client:
        assert error_of(await client.unload("sql", **fields), 400)["param"] in fields
        assert "sql" in client.engine.adapters.versions


async def test_slow_load_holds_up_nobody(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        slow = asyncio.create_task(client.load("fr", "slow"))
        await until(lambda: client.engine.adapters.threads_of("load"))
        assert (await client.complete(model="sql")).status_code == 200
        assert (await client.load("de", "new")).status_code == 200
        assert (await client.unload("de")).status_code == 200
        assert "fr" not in (await client.get("/v1/adapters")).text
        assert not slow.done()
        client.engine.adapters.may_read.set()
        assert (await slow).status_code == 200


async def test_many_waiting_unloads_hold_up_nobody(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(50)]
    adapters = (engine := FakeEngine(names)).adapters
    async with serving_adapters(tmp_path, engine) as client:
        leases = [adapters.acquire(name) for name in names]
        unloads = [asyncio.create_task(client.unload(name)) for name in names]
        await until(lambda: all(v.state == "draining" for v in adapters.versions.values()))
        assert (await client.load("fr", "new")).status_code == 200
        assert (await client.complete(model="fr")).status_code == 200
        for lease in leases:
            adapters.release(lease)
        assert {reply.status_code for reply in await asyncio.gather(*unloads)} == {200}


async def test_adapters_are_described(client: Client) -> None:
    client.engine.adapters.set_merge_mode("pirate")
    await until(lambda: client.engine.adapters.merged)
    async with busy(client, 2, model="sql"):
        body = (await client.get("/v1/adapters")).json()
        pirate, sql = body.pop("data")
        assert body == {
            "object": "list",
            "merge_mode": "pirate",
            "merged": "pirate",
            "memory": {"device": {"used": 1, "size": 2, "adapters": 2}},
        }
        assert sql == {
            "name": "sql",
            "digest": digest_of("sql"),
            "state": "ready",
            "tier": "disk",
            "k": 1,
            "nnz": 7,
            "size_bytes": 14,
            "num_leases": 2,
            "is_pinned": False,
            "is_merged": False,
            "since": SINCE,
            "labels": [],
        }
        assert pirate["is_merged"]
        assert (await client.get("/v1/adapters/pirate")).json() == pirate


async def test_unknown_adapter_is_404_whatever_is_asked_of_it(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        replies = [
            await client.get("/v1/adapters/nobody"),
            await client.unload("nobody"),
            await client.post("/v1/adapters/nobody/pin", json={}),
            await client.post("/v1/adapters/nobody/unpin", json={}),
            await client.post("/v1/adapters/merge", json={"mode": "nobody"}),
        ]
        for reply in replies:
            assert "nobody" in error_of(reply, 404)["message"]


async def test_pinned_adapter_is_pinned_until_unpinned(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        info = (await client.post("/v1/adapters/sql/pin", json={})).json()
        assert info == (await client.get("/v1/adapters/sql")).json()
        assert (info["is_pinned"], info["tier"]) == (True, "device")
        refused = await client.post("/v1/adapters/pirate/pin", json={})
        assert "no room" in error_of(refused, 400)["message"]
        info = (await client.post("/v1/adapters/sql/unpin", json={})).json()
        assert not info["is_pinned"]


async def test_merge_mode_is_set(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        for mode in ("auto", "sql", "never"):
            reply = await client.post("/v1/adapters/merge", json={"mode": mode})
            assert reply.json()["merge_mode"] == mode
        for body in ({}, {"mode": 1}, {"mode": "never", "name": "sql"}):
            error_of(await client.post("/v1/adapters/merge", json=body), 400)


async def test_rescan_tells_what_has_changed(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        client.engine.adapters.directory = folder = tmp_path / "secret" / "adapters"
        for name in ("slow", "bad", "crash", "link"):
            shutil.rmtree(folder / name) if name != "link" else (folder / name).unlink()
        first = (await client.post("/v1/adapters/rescan", json={})).json()
        assert first["added"] == ["new", "newer"]
        assert first["failed"].keys() == {"locked"}
        assert f"locked/{CONFIG_FILE}" in first["failed"]["locked"]  # and not where that is

        write(folder / "new", "good 3")
        shutil.rmtree(folder / "newer")
        second = (await client.post("/v1/adapters/rescan", json={})).json()
        failed = second.pop("failed")
        assert failed == first["failed"]
        assert second == {"added": [], "replaced": ["new"], "removed": ["newer"], "unchanged": 0}
        assert (await client.complete(model="new")).json()["system_fingerprint"] == digest_of(
            "good 3"
        )
        error_of(await client.complete(model="newer"), 404)


async def test_rescan_of_a_directory_that_has_gone_is_500_without_its_path(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        client.engine.adapters.directory = tmp_path / "secret" / "gone"
        error_of(await client.post("/v1/adapters/rescan", json={}), 500)
        assert (await client.complete(model="sql")).status_code == 200


async def test_absolute_path_under_adapter_dir_loads(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        path = tmp_path / "secret" / "adapters" / "new"
        assert (await client.load("fr", str(path))).status_code == 200


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", "new/../../outside", "\0", "~"])
async def test_paths_out_of_adapter_dir_are_refused(tmp_path: Path, path: str) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await client.load("fr", path)
        assert error_of(reply, 404 if path == "~" else 400)["param"] == "lora_path"
        assert "fr" not in client.engine.adapters.versions


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("bad", 400, "k is 0; values are NaN"),
        ("absent", 404, "No adapter at lora_path 'absent'"),
        ("locked", 400, "cannot be read"),
        ("crash", 500, "the server failed"),
    ],
)
async def test_broken_adapter_is_refused_with_its_faults(
    tmp_path: Path, path: str, status: int, message: str
) -> None:
    async with serving_adapters(tmp_path) as client:
        assert message in error_of(await client.load("fr", path), status)["message"]
        assert "fr" not in client.engine.adapters.versions
        assert (await client.complete()).status_code == 200


@pytest.mark.parametrize("name", ["", "../x", ".x", "a b", "a\n", "a" * 64, "é", BASE])
async def test_adapter_names_are_plain(tmp_path: Path, name: str) -> None:
    async with serving_adapters(tmp_path) as client:
        assert error_of(await client.load(name, "new"), 400)["param"] == "lora_name"


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_changes_are_403_unless_allowed(tmp_path: Path, route: str, body: Any) -> None:
    async with serving(adapter_dir=tmp_path) as client:
        error = error_of(await client.post(route, json=body), 403)
        assert error["type"] == "PermissionDeniedError"
        assert "--allow-runtime-adapters" in error["message"]
        assert client.engine.adapters.calls == []
        assert client.engine.adapters.merge_mode == "never"


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_files_need_an_adapter_dir_and_nothing_else_does(route: str, body: Any) -> None:
    async with serving(allow_runtime_adapters=True) as client:
        reply = await client.post(route, json=body)
        if route in FROM_FILES:
            assert "--adapter-dir" in error_of(reply, 403)["message"]
        else:
            assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_web_page_of_another_origin_changes_nothing(
    tmp_path: Path, route: str, body: Any
) -> None:
    async with serving_adapters(tmp_path) as client:
        content = json.dumps(body).encode()
        for headers in ({}, {"content-type": "text/plain"}):
            reply = await client.post(route, content=content, headers=headers)
            assert "application/json" in error_of(reply, 400)["message"]
        assert client.engine.adapters.calls == []
        assert client.engine.adapters.merge_mode == "never"


# --- stopping --------------------------------------------------------------------------------


async def test_drain_finishes_the_running_and_refuses_the_new(client: Client) -> None:
    running = asyncio.create_task(client.complete(ignore_eos=True, max_tokens=200))
    await until(lambda: client.engine.num_running)
    drain = asyncio.create_task(client.worker.drain(timeout_s=10))
    await asyncio.sleep(0)
    assert (await client.get("/health")).status_code == 503
    error_of(await client.complete(), 503)
    assert (await client.get("/v1/adapters")).status_code == 200
    assert len((await running).json()["choices"][0]["text"]) == 200
    await asyncio.wait_for(drain, 1)


@pytest.mark.parametrize(("route", "body"), CHANGES)
async def test_draining_server_changes_no_adapters(tmp_path: Path, route: str, body: Any) -> None:
    async with serving_adapters(tmp_path) as client:
        await client.worker.drain(timeout_s=0)
        error_of(await client.post(route, json=body), 503)
        assert client.engine.adapters.calls == []


async def test_drain_aborts_what_takes_too_long(client: Client) -> None:
    whole = asyncio.create_task(client.complete(**ENDLESS))
    stream = asyncio.create_task(client.complete(**ENDLESS, stream=True))
    await until(lambda: client.engine.num_running == 2)
    await client.worker.drain(timeout_s=0.05)
    error_of(await whole, 503)
    assert events(await stream)[-1]["error"]["code"] == 503


# --- a real socket ---------------------------------------------------------------------------


def test_openai_client_streams_two_adapters_at_once() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == [BASE, "pirate", "sql"]
            assert client.models.retrieve(BASE).owned_by == "neuroada-serve"
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="nobody", messages=HELLO)

            streams = {
                name: client.chat.completions.create(
                    model=name, messages=HELLO, stream=True, extra_body=ENDLESS
                )
                for name in ("sql", "pirate")
            }
            texts = dict.fromkeys(streams, "")
            for _ in range(20):  # in turn: both run at the same time
                for name, stream in streams.items():
                    chunk = next(stream)
                    assert chunk.model == name
                    texts[name] += chunk.choices[0].delta.content or ""
            assert texts == {"sql": ("sql" * 9)[:19], "pirate": ("pirate" * 9)[:19]}
            assert engine.num_running == 2
            for stream in streams.values():
                stream.close()
            wait_for(lambda: engine.num_running == 0)

            whole = client.completions.create(model="sql", prompt=["a", "b"], logprobs=1)
            assert [choice.text for choice in whole.choices] == ["sql", "sql"]
            assert whole.system_fingerprint == digest_of("sql")
            assert whole.usage.prompt_tokens_details.cached_tokens == 0

    assert serve_while(engine, visit) == 0


def test_sigterm_lets_a_running_stream_finish() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        fields = {"prompt": "hi", "ignore_eos": True, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=120) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health", timeout=120).status_code == 503)
            assert httpx.post(f"{url}/v1/completions", json=fields, timeout=120).status_code == 503
            chunks = [line for line in lines if line]
        assert len(chunks) == 300  # the first one was read before; [DONE] is the last
        assert chunks[-1] == "data: [DONE]"

    assert serve_while(engine, visit) == 0


def test_engine_death_ends_the_process_with_an_error() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        engine.dies = True
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=120).status_code
            == 500
        )
        wait_for(lambda: not is_listening(url))

    assert serve_while(engine, visit) == 70


def test_sighup_looks_at_the_adapter_directory_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, said = FakeEngine(), "adapter directory rescanned by SIGHUP: "
    caplog.set_level(logging.INFO, "neuroada_serve")

    def hang_up() -> str:
        num_said = len(caplog.messages)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: len(caplog.messages) > num_said)
        return caplog.messages[-1]

    def visit(url: str) -> None:
        assert hang_up() == (
            "adapter directory not rescanned by SIGHUP: there is no adapter directory; "
            "start with --adapter-dir"
        )
        engine.adapters.directory = tmp_path / "adapters"
        assert hang_up().startswith("adapter directory not rescanned by SIGHUP: [Errno 2] ")
        write(tmp_path / "adapters" / "fr", "good")
        write(tmp_path / "adapters" / "bad", "bad")
        faults = "not served: adapter 'bad': k is 0; values are NaN"
        assert hang_up() == f"{said}added fr; {faults}"
        assert caplog.records[-1].levelno == logging.WARNING  # a signal has no other answer
        assert httpx.get(f"{url}/v1/models/fr", timeout=120).status_code == 200
        shutil.rmtree(tmp_path / "adapters" / "bad")
        assert hang_up() == f"{said}nothing has changed"
        write(tmp_path / "adapters" / "fr", "good again")
        assert hang_up() == f"{said}replaced fr"
        shutil.rmtree(tmp_path / "adapters" / "fr")
        assert hang_up() == f"{said}removed fr"

    assert serve_while(engine, visit) == 0


def test_waiting_unload_does_not_keep_a_dead_server_alive() -> None:
    engine = FakeEngine()
    engine.adapters.acquire("sql")  # and never given back

    def unload(url: str) -> None:
        body = {"lora_name": "sql", "timeout_s": 20}
        with suppress(httpx.HTTPError):  # the server dies
            httpx.post(f"{url}/v1/unload_lora_adapter", json=body, timeout=120)

    def visit(url: str) -> None:
        threading.Thread(target=unload, args=(url,), daemon=True).start()
        wait_for(lambda: engine.adapters.threads_of("unload"))
        engine.dies = True
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=120).status_code
            == 500
        )
        wait_for(lambda: not is_listening(url))

    assert serve_while(engine, visit, allow_runtime_adapters=True) == 70
    lasting = {thread.name for thread in threading.enumerate() if not thread.daemon}
    assert not lasting & engine.adapters.threads_of("unload")


def test_endless_headers_are_refused() -> None:
    def visit(url: str) -> None:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=120) as connection:
            start = b"GET /health HTTP/1.1\r\nHost: x\r\nx: "
            connection.sendall(start.ljust((64 << 10) + 1, b"y"))
            assert connection.recv(100).startswith(b"HTTP/1.1 431")

    assert serve_while(FakeEngine(), visit) == 0


def test_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}"):
            serve(FakeEngine(), ServerConfig(port=port))
