"""POST /v1/classify."""

from contextlib import AsyncExitStack

import httpx
import pytest

from neuroada_serve import LLM
from neuroada_serve.config import ServerConfig
from neuroada_serve.server.app import create_app
from neuroada_serve.server.worker import Worker
from tests.support.classifiers import LABELS, TEXTS, classifier
from tests.support.tiny import random_adapter, save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("classify") / "tiny")


@pytest.fixture
async def client(source):
    llm = LLM(str(source.path), {"mood": classifier(source, 1), "talk": random_adapter(source, 3)})
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(Worker(llm.engine))
        app = httpx.ASGITransport(create_app(worker, ServerConfig()))
        client = httpx.AsyncClient(transport=app, base_url="http://127.0.0.1")
        yield await stack.enter_async_context(client)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
async def test_a_reply_has_vllms_shape(client, source, path):
    reply = await client.post(path, json={"model": "mood", "input": TEXTS})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    expected = LLM(str(source.path), {"mood": classifier(source, 1)}).classify(TEXTS, "mood")
    assert body["id"].startswith("classify-")
    assert (body["object"], body["model"]) == ("list", "mood")
    assert body["labels"] == list(LABELS)
    assert body["system_fingerprint"] == classifier(source, 1).digest
    num_tokens = sum(len(output.prompt_token_ids) for output in expected)
    assert body["usage"] == {
        "prompt_tokens": num_tokens,
        "completion_tokens": 0,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    for index, (found, wanted) in enumerate(zip(body["data"], expected, strict=True)):
        assert found.keys() == {"index", "label", "probs", "num_classes"}
        assert (found["index"], found["label"], found["num_classes"]) == (index, wanted.label, 3)
        assert found["probs"] == pytest.approx(wanted.probs, abs=1e-5)
        assert sum(found["probs"]) == pytest.approx(1)


@pytest.mark.anyio
async def test_texts_come_as_text_or_tokens(client):
    bodies = []
    ids = tiny_tokenizer()("no").input_ids
    for given in ("no", ["no"], ids, [ids]):
        reply = await client.post("/v1/classify", json={"model": "mood", "input": given})
        assert reply.status_code == 200, reply.text
        bodies.append(reply.json()["data"])
    for other in bodies[1:]:
        assert other[0]["probs"] == pytest.approx(bodies[0][0]["probs"], abs=1e-5)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "status", "fault"),
    [
        ({"model": "mood", "input": ""}, 400, "input must not be empty"),
        ({"model": "mood", "input": ["a", ""]}, 400, "input must not be empty"),
        ({"model": "mood", "input": ["a"] * 257}, 400, "257 inputs, at most 256"),
        ({"model": "mood", "input": "a" * 300}, 400, "maximum context length is 256"),
        ({"model": "mood", "input": [9999]}, 400, "prompt token ids"),
        ({"model": "mood"}, 400, "input: Field required"),
        ({"input": "a"}, 400, "model: Field required"),
        ({"model": "mood", "input": "a", "temperature": 1}, 400, "temperature is unknown"),
        ({"model": "nobody", "input": "a"}, 404, "does not exist"),
        ({"model": "talk", "input": "a"}, 400, "'talk' is not a classifier"),
        ({"model": "tiny", "input": "a"}, 400, "the base is not a classifier"),
    ],
)
async def test_a_wrong_request_is_told(client, body, status, fault):
    reply = await client.post("/v1/classify", json=body)
    assert reply.status_code == status, reply.text
    assert fault in reply.json()["error"]["message"]


@pytest.mark.anyio
async def test_chat_with_a_classifier_is_told(client):
    reply = await client.post("/v1/completions", json={"model": "mood", "prompt": "a"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].endswith("through /v1/classify, or `neuroada classify`")
    assert reply.json()["error"]["param"] == "model"
