"""Memory that is not there, as clients of a real engine see it over a socket."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.engine.kv_budget import CPU_BLOCK_TOKENS
from neuroada_serve.model.loader import load_base
from neuroada_serve.ops import matrix
from tests.support.serving import serve_while
from tests.support.tiny import FAMILIES, save_tiny_model

pytestmark = pytest.mark.timeout(120)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
REFUSAL = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
MOST_TOKENS = 256  # of a sequence, for which steps find memory
SHORT = {"prompt": "abc", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
STEADY = {**SHORT, "max_tokens": 200, "stream": True}
LONG = {**SHORT, "prompt": "x" * 300}
GROWING = {**SHORT, "prompt": "y" * 200, "max_tokens": 100, "stream": True}
FEW_BLOCKS = 12  # a steady stream needs seven


@pytest.fixture
def new_engine(tmp_path, monkeypatch):
    weight = torch.randn(64, 64).bfloat16()
    if matrix.packs_faster(weight) and not matrix.packed_matrix(weight).in_blocks_of_64:
        monkeypatch.setattr(matrix, "_onednn_packs", lambda: False)
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | SIZES)
    source = save_tiny_model(tmp_path, "llama", torch.bfloat16)

    def make(dtype: str, **config: Any) -> Engine:
        engine = Engine(load_base(source, dtype), EngineConfig(max_num_seqs=8, **config))
        assert (engine._runner._cpu_decoder is None) is (dtype == "float32")
        return engine

    return make


def refuse_long_sequences(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step that computes a token beyond MOST_TOKENS find no memory."""
    run = engine._runner.run

    def limited(schedule, merged):
        lengths = [s.num_computed + 1 for s in schedule.decodes]
        lengths += [c.sequence.num_computed + c.num_tokens for c in schedule.prefills]
        if max(lengths) > MOST_TOKENS:
            raise RuntimeError(REFUSAL)
        return run(schedule, merged)

    monkeypatch.setattr(engine._runner, "run", limited)


def visit(engine: Engine, see: Callable[[httpx.Client], None]) -> None:
    """Serve an engine while a client sees it; nothing is held at the end."""

    def come(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            see(client)

    assert serve_while(engine, come) == 0
    assert engine.metrics.kv.used == 0


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
    assert "found no memory" in error["message"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # as one kernel, and as modules
def test_request_without_memory_fails_alone_and_says_why(new_engine, dtype, monkeypatch) -> None:
    engine = new_engine(dtype)
    refuse_long_sequences(engine, monkeypatch)

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

    visit(engine, see)


def test_streams_of_a_pool_that_is_too_small_for_them_all_end_right(new_engine) -> None:
    def see(client: httpx.Client) -> None:
        bodies = [STEADY | {"prompt": f"{i}{i}"} for i in range(6)]
        expected = [streamed(post(client, body)) for body in bodies]
        kv_cache = client.get("/v1/adapters").json()["kv_cache"]
        assert (kv_cache["blocks"], kv_cache["preemptions"]) == (FEW_BLOCKS, 0)
        with ThreadPoolExecutor(6) as pool:
            replies = [pool.submit(post, client, body) for body in bodies]
            assert [streamed(reply.result()) for reply in replies] == expected
        kv_cache = client.get("/v1/adapters").json()["kv_cache"]
        assert kv_cache["preemptions"] > 0
        assert (kv_cache["used"], kv_cache["shared"]) == (0, 0)
        assert kv_cache["free"] + kv_cache["cached"] == FEW_BLOCKS

    token_bytes = 1024  # two layers of two heads, keys and values, in float32
    visit(new_engine("float32", kv_cache_memory=FEW_BLOCKS * CPU_BLOCK_TOKENS * token_bytes), see)
