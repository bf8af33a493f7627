"""POST /v1/completions."""

import time
from typing import Any

import pytest

from tests.support.fake_engine import digest_of
from tests.support.serving import (
    Client,
    events,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


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


async def test_stop_string_is_reported(client: Client) -> None:
    (choice,) = (await client.complete(model="sql", stop="l")).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("sq", "stop", "l")


async def test_completion_takes_16_tokens_by_default(client: Client) -> None:
    await client.complete(max_tokens=None)
    assert client.engine.requests[0].params.max_tokens == 16
