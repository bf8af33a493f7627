"""GET /health and /version."""

import pytest

from tests.support.serving import (
    Client,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_version_and_health_answer(client: Client) -> None:
    assert (await client.get("/version")).json().keys() == {"version"}
    reply = await client.get("/health")
    assert (reply.status_code, reply.content) == (200, b"")
