"""Memory that is not there, as clients of a real engine see it over a socket."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine import kv_cache
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from tests.support.serving import serve_while
from tests.support.tiny import FAMILIES, save_tiny_model

pytestmark = pytest.mark.timeout(120)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
REFUSAL = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
MOST_TOKENS = 256  # that a KV cache finds memory for
SHORT = {"prompt": "abc", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
STEADY = {**SHORT, "max_tokens": 200, "stream": True}
LONG = {**SHORT, "prompt": "x" * 300}
GROWING = {**SHORT, "prompt": "y" * 200, "max_tokens": 100, "stream": True}


@pytest.fixture(params=["bfloat16", "float32"])  # as one kernel, and as modules
def engine(request, tmp_path, monkeypatch):
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
    source = save_tiny_model(tmp_path, "llama", torch.bfloat16)
    engine = Engine(load_base(source, request.param), EngineConfig(max_num_seqs=8))
    assert (engine._runner._cpu_decoder is None) is (request.param == "float32")
    make = kv_cache._zeros

    def zeros(shape, like):
        if shape[2] > MOST_TOKENS:
            raise RuntimeError(REFUSAL)
        return make(shape, like)

    monkeypatch.setattr(kv_cache, "_zeros", zeros)
    return engine


def post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/completions", json=body)


def text(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["text"])


def streamed(reply: httpx.Response) -> tuple[str, dict[str, Any] | None]:
    """The text of a stream, and the error in it."""
    assert reply.status_code == 200
    *events, done, _ = reply.text.split("\n\n")
    assert done == "data: [DONE]"
    data = [json.loads(event.removeprefix("data: ")) for event in events]
    error = data.pop()["error"] if "error" in data[-1] else None
    return "".join(one["choices"][0]["text"] for one in data), error


def check_refusal(error: dict[str, Any], num_prompt_tokens: int) -> None:
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    assert f"{num_prompt_tokens} prompt tokens" in error["message"]
    assert "no memory for a KV cache" in error["message"]


def test_request_without_memory_fails_alone_and_says_why(engine) -> None:
    def visit(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            see(client)

    def see(client: httpx.Client) -> None:
        right = text(post(client, SHORT))
        steady, _ = streamed(post(client, STEADY))
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(post, client, STEADY) for _ in range(3)]
            growing = [pool.submit(post, client, GROWING) for _ in range(2)]
            refused = [pool.submit(post, client, LONG | {"stream": i == 0}) for i in range(2)]
            assert client.get("/health").status_code == 200
            for reply in [one.result() for one in refused]:
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
                check_refusal(reply.json()["error"], 300)
            for reply in [one.result() for one in growing]:
                begun, error = streamed(reply)
                assert begun
                check_refusal(error, 200)
            for reply in [one.result() for one in others]:
                assert streamed(reply) == (steady, None)
            after = [pool.submit(post, client, SHORT) for _ in range(200)]
            assert client.get("/health").status_code == 200
            assert {text(one.result()) for one in after} == {right}

    assert serve_while(engine, visit) == 0
    assert not list(engine._cache.layers())
