"""Callers: how tenant and client of a request are found and used."""

import asyncio
import socket
from collections import Counter

import httpx
import pytest

from neuroada_serve.config import EngineConfig
from neuroada_serve.engine.engine import Engine
from neuroada_serve.model.loader import load_base
from neuroada_serve.server.caller import client_at
from tests.support.fake_engine import FakeEngine
from tests.support.serving import serve_while, serving, until
from tests.support.tiny import random_adapter, save_tiny_model

ONE, OTHER = "127.0.0.1", "127.0.0.2"


@pytest.fixture
def two_addresses() -> None:
    with socket.socket() as probe:
        try:
            probe.bind((OTHER, 0))
        except OSError:
            pytest.skip("this system has one loopback address")


def client_from(address: str, url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    transport = httpx.AsyncHTTPTransport(local_address=address, limits=limits)
    return httpx.AsyncClient(transport=transport, base_url=url, timeout=60)


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("no address", ""),
    ],
)
def test_client_is_an_address_or_its_first_64_bits(host, client):
    assert client_at(host) == client


@pytest.mark.anyio
@pytest.mark.parametrize("route", ["complete", "chat"])
async def test_client_reaches_the_engine(route):
    async with serving() as client:
        await getattr(client, route)()
        (request,) = client.engine.requests
        assert request.client == "127.0.0.1"


@pytest.mark.usefixtures("two_addresses")
def test_only_a_proxy_on_this_machine_is_believed(monkeypatch):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    engine = FakeEngine()

    async def ask(url: str) -> None:
        for address in (ONE, OTHER):
            async with client_from(address, url) as client:
                for headers in ({}, {"X-Forwarded-For": "203.0.113.7, 198.51.100.9"}):
                    await client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)

    assert serve_while(engine, lambda url: asyncio.run(ask(url))) == 0
    assert [r.client for r in engine.requests] == [ONE, "198.51.100.9", OTHER, OTHER]


@pytest.mark.usefixtures("two_addresses")
def test_requests_of_one_client_leave_none_of_another_without_an_answer(tmp_path):
    """300 at once of one client, as many of one adapter as the queue ever takes; then another's."""
    source = save_tiny_model(tmp_path)
    engine = Engine(load_base(source), EngineConfig(max_num_seqs=4))
    engine.adapters.add_resident("a", random_adapter(source, 1))
    long = {"model": "a", "prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    flood = Counter[int]()

    async def ask(url: str) -> None:
        async def one_of_many() -> None:
            flood[(await one.post("/v1/completions", json=long)).status_code] += 1

        async with client_from(ONE, url) as one, client_from(OTHER, url) as other:
            tasks = [asyncio.create_task(one_of_many()) for _ in range(300)]
            await until(lambda: flood[503] > 150, 60)
            before = flood[200]
            for _ in range(5):
                reply = await other.post("/v1/completions", json=long | {"max_tokens": 4})
                assert reply.status_code == 200, reply.text
            assert flood[200] - before < 30, "it waited for few of them"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    assert serve_while(engine, lambda url: asyncio.run(ask(url)), max_waiting=60) == 0
