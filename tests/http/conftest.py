"""What the tests of sockets share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .serving import Server, serving


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as running:
        yield running
