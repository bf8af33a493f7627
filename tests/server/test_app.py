"""The HTTP endpoint over a fake engine: shapes, refusals, adapters, disconnects, death and drain.

In no reply of any test here may there be a secret: see `Client`."""

import pkgutil
from importlib import import_module

import pytest

from neuroada_serve.request import SamplingParams
from neuroada_serve.server import routes
from neuroada_serve.server.app import ROUTERS
from neuroada_serve.server.body import BoundedRoute, require_json
from tests.support.fake_engine import BASE, digest_of
from tests.support.serving import (
    Client,
    events,
    serving,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


# --- routers --------------------------------------------------------------------------------------


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


# --- shapes ---------------------------------------------------------------------------------------


async def test_base_serves_its_own_name_and_no_name(client: Client) -> None:
    for more in ({}, {"model": None}, {"model": BASE}):
        body = (await client.complete(**more)).json()
        assert body["model"] == BASE
        assert body["system_fingerprint"] is None
        assert body["choices"][0]["text"] == "base"


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
