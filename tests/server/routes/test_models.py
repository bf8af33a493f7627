"""GET /v1/models."""

import pytest

from tests.support.fake_engine import BASE, SINCE
from tests.support.serving import (
    Client,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_models_are_listed(client: Client) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == [BASE, "pirate", "sql"]
    assert [card["parent"] for card in cards] == [None, BASE, BASE]
    assert [card["created"] for card in cards[1:]] == [SINCE, SINCE]
    for card in cards:
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card
