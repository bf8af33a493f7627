"""The HTTP endpoint over a fake engine: shapes, refusals, disconnects, death and drain."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import BASE, FakeEngine

from neuroada_serve.adapters.format import CONFIG_FILE
from neuroada_serve.config import ServerConfig
from neuroada_serve.errors import UsageError
from neuroada_serve.request import SamplingParams
from neuroada_serve.server.app import create_app
from neuroada_serve.server.serve import serve
from neuroada_serve.server.worker import Worker

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(20)]

ENDLESS = {"ignore_eos": True, "max_tokens": 5000}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Client(httpx.AsyncClient):
    """A client, and what is behind it."""

    engine: FakeEngine
    worker: Worker

    async def complete(self, prompt: Any = "hi", **more: Any) -> httpx.Response:
        return await self.post("/v1/completions", json={"prompt": prompt, **more})

    async def chat(self, messages: Any = HELLO, **more: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", json={"messages": messages, **more})


@asynccontextmanager
async def serving(engine: FakeEngine | None = None, **config: Any) -> AsyncIterator[Client]:
    engine = engine or FakeEngine()
    settings = ServerConfig(**config)
    async with Worker(engine, settings.max_waiting) as worker:
        app = create_app(worker, settings)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://test") as client:
            client.engine, client.worker = engine, worker
            yield client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as client:
        yield client


async def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; [DONE] is checked and left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "secret" not in response.text
    return error


# --- shapes ----------------------------------------------------------------------------------


async def test_completion_has_openais_shape(client: Client) -> None:
    body = (await client.complete("hi", model="sql")).json()
    assert body.pop("id").startswith("cmpl-")
    assert abs(body.pop("created") - time.time()) < 5
    assert body == {
        "object": "text_completion",
        "model": "sql",
        "choices": [
            {
                "index": 0,
                "text": "sql",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


async def test_chat_has_openais_shape(client: Client) -> None:
    body = (await client.chat(model="pirate", max_tokens=3)).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "pirate"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "pir"}
    assert choice["finish_reason"] == "length"


async def test_base_serves_its_own_name_and_no_name(client: Client) -> None:
    for more in ({}, {"model": None}, {"model": BASE}):
        body = (await client.complete(**more)).json()
        assert body["model"] == BASE
        assert body["choices"][0]["text"] == "base"


async def test_every_prompt_and_choice_is_answered_in_order(client: Client) -> None:
    body = (await client.complete(["a", "bc"], model="sql", n=2, echo=True)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == ["asql", "asql", "bcsql", "bcsql"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


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


async def test_models_are_listed_without_paths(client: Client) -> None:
    reply = await client.get("/v1/models")
    assert "secret" not in reply.text
    assert [card["id"] for card in reply.json()["data"]] == [BASE, "sql", "pirate"]
    assert [card["parent"] for card in reply.json()["data"]] == [None, BASE, BASE]
    for card in reply.json()["data"]:
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card


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


async def test_failed_choice_is_500_or_an_error_event(client: Client) -> None:
    error = error_of(await client.complete(["good", "poison"]), 500)
    assert error["message"] == "non-finite logits"
    *_, last = events(await client.complete("poison", stream=True))
    assert last["error"]["code"] == 500
    assert (await client.complete()).status_code == 200


async def test_engine_death_ends_every_request_and_closes_shop(client: Client) -> None:
    died = asyncio.Event()
    client.worker.on_death = died.set
    waiting = [
        asyncio.create_task(client.complete(**ENDLESS)),
        asyncio.create_task(client.chat(**ENDLESS, stream=True)),
    ]
    await until(lambda: client.engine.num_running == 2)
    client.engine.dies = True
    whole, stream = await asyncio.gather(*waiting)
    error_of(whole, 500)
    assert events(stream)[-1]["error"]["code"] == 500
    assert "secret" not in stream.text
    assert died.is_set()
    assert (await client.get("/health")).status_code == 503
    late = await client.complete()
    assert error_of(late, 503)["type"] == "ServiceUnavailableError"
    assert late.headers["retry-after"]


async def test_full_queue_is_503_and_free_places_are_used() -> None:
    async with serving(FakeEngine(max_num_seqs=2), max_waiting=1) as client:
        tasks = [asyncio.create_task(client.complete(**ENDLESS)) for _ in range(3)]
        await until(lambda: client.engine.num_waiting == 1)
        refused = await client.complete()
        assert error_of(refused, 503)["type"] == "ServiceUnavailableError"
        assert refused.headers["retry-after"] == "1"
        tasks[0].cancel()
        await until(lambda: client.worker.idle or client.engine.num_waiting == 0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_idle_engine_thread_sleeps(client: Client) -> None:
    await client.complete()
    await until(lambda: not client.engine.num_running)
    num_polls = client.engine.num_polls
    await asyncio.sleep(0.1)
    assert client.engine.num_polls <= num_polls + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["running", "waiting"])
async def test_disconnect_aborts(place: str, stream: bool) -> None:
    async with serving(FakeEngine(max_num_seqs=1)) as client:
        engine = client.engine
        if place == "waiting":
            blocker = asyncio.create_task(client.complete(**ENDLESS))
            await until(lambda: engine.num_running)
        leave = asyncio.Event()
        body = json.dumps({"prompt": "hi", "n": 2, **ENDLESS, "stream": stream}).encode()
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
        others = 1 if place == "waiting" else 0
        await until(lambda: engine.num_running + engine.num_waiting == 2 + others)
        leave.set()
        await request
        await until(lambda: engine.num_running + engine.num_waiting == others)
        if place == "waiting":
            blocker.cancel()
            await asyncio.gather(blocker, return_exceptions=True)


async def test_refused_prompt_takes_its_siblings_with_it(client: Client) -> None:
    error_of(await client.complete(["fine", "x" * 101], **ENDLESS), 400)
    await until(lambda: client.engine.num_running + client.engine.num_waiting == 0)


# --- adapters at run time --------------------------------------------------------------------


@asynccontextmanager
async def serving_adapters(root: Path) -> AsyncIterator[Client]:
    for name, content in [("new", "good"), ("broken", "bad"), ("crash", "crash")]:
        (root / "adapters" / name).mkdir(parents=True)
        (root / "adapters" / name / CONFIG_FILE).write_text(content)
    (root / "outside").mkdir()
    (root / "outside" / CONFIG_FILE).write_text("good")
    (root / "adapters" / "link").symlink_to(root / "outside")
    async with serving(adapter_dir=root / "adapters", allow_runtime_adapters=True) as client:
        yield client


async def load(client: Client, name: str, path: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return await client.post("/v1/load_lora_adapter", json=body)


async def test_loaded_adapter_serves_until_unloaded(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await load(client, "fr", "new")
        assert reply.text == "Success: LoRA adapter 'fr' added successfully."
        assert reply.headers["content-type"].startswith("text/plain")
        assert (await client.complete(model="fr")).json()["choices"][0]["text"] == "fr"
        assert "fr" in (await client.get("/v1/models")).text
        assert not {"engine", threading.main_thread().name} & set(client.engine.readers)

        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "fr"})
        assert gone.text == "Success: LoRA adapter 'fr' removed successfully."
        error_of(await client.complete(model="fr"), 404)
        again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "fr"})
        error_of(again, 404)


async def test_taken_name_needs_load_inplace(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        assert "load_inplace" in error_of(await load(client, "sql", "new"), 400)["message"]
        assert (await load(client, "sql", "new", load_inplace=True)).status_code == 200
        error_of(await load(client, BASE, "new", load_inplace=True), 400)


async def test_absolute_path_under_adapter_dir_loads(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        assert (await load(client, "fr", str(tmp_path / "adapters/new"))).status_code == 200


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", "new/../../outside", "\0", "~"])
async def test_paths_out_of_adapter_dir_are_refused(tmp_path: Path, path: str) -> None:
    async with serving_adapters(tmp_path) as client:
        reply = await load(client, "fr", path)
        assert error_of(reply, 404 if path == "~" else 400)["param"] == "lora_path"
        assert str(tmp_path) not in reply.text
        assert "fr" not in client.engine.adapters


async def test_broken_adapter_is_400_with_its_faults(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as client:
        message = error_of(await load(client, "fr", "broken"), 400)["message"]
        assert "k is 0; values are NaN" in message
        reply = await load(client, "fr", "absent")
        assert error_of(reply, 404)["param"] == "lora_path"
        assert str(tmp_path) not in reply.text
        error_of(await load(client, "fr", "crash"), 500)
        assert (await client.complete()).status_code == 200


@pytest.mark.parametrize("name", ["", "../x", ".x", "a b", "a\n", "a" * 64, "é"])
async def test_adapter_names_are_plain(tmp_path: Path, name: str) -> None:
    async with serving_adapters(tmp_path) as client:
        assert error_of(await load(client, name, "new"), 400)["param"] == "lora_name"


async def test_runtime_adapters_are_off_by_default(client: Client) -> None:
    assert "--allow-runtime-adapters" in error_of(await load(client, "fr", "new"), 403)["message"]
    reply = await client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    error_of(reply, 403)


# --- stopping --------------------------------------------------------------------------------


async def test_drain_finishes_the_running_and_refuses_the_new(client: Client) -> None:
    running = asyncio.create_task(client.complete(ignore_eos=True, max_tokens=200))
    await until(lambda: client.engine.num_running)
    drain = asyncio.create_task(client.worker.drain(timeout_s=10))
    await asyncio.sleep(0)
    assert (await client.get("/health")).status_code == 503
    error_of(await client.complete(), 503)
    assert len((await running).json()["choices"][0]["text"]) == 200
    await asyncio.wait_for(drain, 1)


async def test_drain_aborts_what_takes_too_long(client: Client) -> None:
    whole = asyncio.create_task(client.complete(**ENDLESS))
    stream = asyncio.create_task(client.complete(**ENDLESS, stream=True))
    await until(lambda: client.engine.num_running == 2)
    await client.worker.drain(timeout_s=0.05)
    error_of(await whole, 503)
    assert events(await stream)[-1]["error"]["code"] == 503


# --- a real socket ---------------------------------------------------------------------------


def serve_while(engine: FakeEngine, visit: Callable[[str], None], **config: Any) -> int:
    """serve()'s exit code; `visit` gets the URL in a thread, SIGTERM follows unless it came."""
    failures: list[BaseException] = []
    threads = []

    def run(url: str) -> None:
        try:
            visit(url)
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    def on_ready(host: str, port: int) -> None:
        threads.append(threading.Thread(target=run, args=(f"http://{host}:{port}",)))
        threads[0].start()

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for one that comes late
    try:
        code = serve(engine, ServerConfig(port=0, **config), on_ready)
        threads[0].join()
    finally:
        signal.signal(signal.SIGTERM, before)
    for failure in failures:
        raise failure
    return code


def is_listening(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_openai_client_streams_two_adapters_at_once() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == [BASE, "sql", "pirate"]
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

    assert serve_while(engine, visit) == 0


def test_sigterm_lets_a_running_stream_finish() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        fields = {"prompt": "hi", "ignore_eos": True, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=fields) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
            assert httpx.post(f"{url}/v1/completions", json=fields).status_code == 503
            chunks = [line for line in lines if line]
        assert len(chunks) == 300  # the first one was read before; [DONE] is the last
        assert chunks[-1] == "data: [DONE]"

    assert serve_while(engine, visit) == 0


def test_engine_death_ends_the_process_with_an_error() -> None:
    engine = FakeEngine()

    def visit(url: str) -> None:
        engine.dies = True
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}).status_code == 500
        wait_for(lambda: not is_listening(url))

    assert serve_while(engine, visit) == 70


def test_endless_headers_are_refused() -> None:
    def visit(url: str) -> None:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=5) as connection:
            start = b"GET /health HTTP/1.1\r\nHost: x\r\nx: "
            connection.sendall(start.ljust((64 << 10) + 1, b"y"))
            assert connection.recv(100).startswith(b"HTTP/1.1 400")

    assert serve_while(FakeEngine(), visit) == 0


def test_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}"):
            serve(FakeEngine(), ServerConfig(port=port))
