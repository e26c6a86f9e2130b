"""What the tests of the relay share."""

from __future__ import annotations

import pytest
from pd_proxy.relay import fast_path as relay_fast_path
from pd_proxy.relay import idle as relay_idle
from pd_proxy.relay import stream as relay_stream

from tests.http.conftest import server

from .streams import Clock

__all__ = ["server"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (relay_stream, relay_idle, relay_fast_path):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock
