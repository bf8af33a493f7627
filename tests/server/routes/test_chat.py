"""POST /v1/chat/completions."""

import pytest

from tests.support.fake_engine import digest_of
from tests.support.serving import (
    Client,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_chat_has_openais_shape(client: Client) -> None:
    body = (await client.chat(model="pirate", max_tokens=3)).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "pirate"
    assert body["system_fingerprint"] == digest_of("pirate")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "pir"}
    assert choice["finish_reason"] == "length"


async def test_text_parts_and_developer_role_reach_the_template(client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = await client.chat(
        [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    assert reply.status_code == 200
    assert client.engine.requests[0].prompt == b"<system>be brief<user>a\nb"


async def test_chat_logprobs_have_their_shape(client: Client) -> None:
    body = (await client.chat(model="sql", logprobs=True, top_logprobs=1, max_tokens=1)).json()
    entry = {"token": "s", "logprob": -0.5, "bytes": [115]}
    assert body["choices"][0]["logprobs"] == {"content": [{**entry, "top_logprobs": [entry]}]}


@pytest.mark.parametrize(
    ("given", "used"),
    [({}, None), ({"max_tokens": 3}, 3), ({"max_completion_tokens": 2, "max_tokens": 2}, 2)],
)
async def test_chat_may_use_all_the_room_unless_limited(
    client: Client, given: dict[str, int], used: int | None
) -> None:
    await client.chat(**given)
    assert client.engine.requests[0].params.max_tokens == used
