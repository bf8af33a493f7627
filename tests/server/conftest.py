"""Fixtures of the server's tests."""

from collections.abc import AsyncIterator

import pytest

from tests.support.serving import (
    Client,
    serving,
)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as client:
        yield client
