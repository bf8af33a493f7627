"""Names of the base and of adapters, as requests give them."""

import time

import pytest

from neuroada_serve.errors import AdapterConflictError
from tests.support.fake_engine import BASE, FakeEngine
from tests.support.serving import error_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_unknown_model_is_told_the_names_there_are() -> None:
    async with serving() as client:
        error = error_of(await client.complete(model="sqll"), 404)
        assert error["code"] == "model_not_found"
        assert error["message"] == (
            f"The model 'sqll' does not exist. Available: {BASE}, pirate, sql."
        )


async def test_among_thousands_the_nearest_are_told() -> None:
    names = [f"customer-{i:05}" for i in range(10_000)] + ["triage"]
    async with serving(FakeEngine(names)) as client:
        message = error_of(await client.chat(model="traige"), 404)["message"]
        assert message.endswith("Nearest: triage. /v1/models lists all 10002.")
        assert len(error_of(await client.chat(model="customer-x"), 404)["message"]) < 300
        started = time.monotonic()
        error_of(await client.chat(model="c" * 1024), 404)
        assert time.monotonic() - started < 2


async def test_unloaded_adapter_is_not_listed() -> None:
    async with serving(allow_runtime_adapters=True) as client:
        await client.unload("pirate")
        assert "pirate" not in error_of(await client.complete(model="x"), 404)["message"]


async def test_served_names_take_the_place_of_the_bases_own() -> None:
    async with serving(served_model_name=("gpt-4o", "house")) as client:
        for name in ("gpt-4o", "house", None):
            body = (await client.complete(model=name)).json()
            assert body["model"] == "gpt-4o"
            assert body["choices"][0]["text"] == "base"
        error_of(await client.complete(model=BASE), 404)
        cards = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["gpt-4o", "house", "pirate", "sql"]
        assert [card["parent"] for card in cards] == [None, None, "gpt-4o", "gpt-4o"]
        assert (await client.get("/v1/models/house")).json()["parent"] is None


async def test_no_adapter_can_have_a_served_name(tmp_path) -> None:
    with pytest.raises(AdapterConflictError, match="sql"):
        async with serving(served_model_name=("sql",)):
            pass
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "adapter_config.json").write_text("good")
    settings = {"adapter_dir": tmp_path, "allow_runtime_adapters": True}
    async with serving(served_model_name=("house",), **settings) as client:
        error = error_of(await client.load("house", "new"), 409)
        assert "base model's name" in error["message"]
        assert "load_inplace" not in error["message"]
