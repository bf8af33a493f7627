"""Requests that are refused, by field."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from neuroada_serve.request import SamplingParams
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    HELLO,
    Client,
    error_of,
    serving,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


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
