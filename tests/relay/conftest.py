"""What the tests of the relay share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from .serving import Server, serving

# How long an example takes says nothing here but how busy the machine is.
settings.register_profile("relay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("relay")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as running:
        yield running
